"""Every error of the library: the user's, the model's and ours are different types.

An error says what went wrong, where, what was given, what was expected and what to do.
"""

from __future__ import annotations

from typing import Any, Literal

CallErrorKind = Literal[
    "unknown_tool",
    "invalid_json",
    "invalid_arguments",
    "unknown_source",
    "box_outside",
    "box_too_small",
    "timeout",
    "limit",
    "tool_failed",
]
"""The closed list of ways in which a tool call can fail."""


class VPTError(Exception):
    """Base of the library's errors. The message is built from its parts, so none is forgotten."""

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        parts = [what]
        for label, value in (("where", where), ("got", got), ("expected", expected), ("do", fix)):
            if value is not None:
                parts.append(f"{label}: {value}")
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[Any, ...]:
        """So that an error of any of these types comes whole out of another process."""
        plain = {
            name: value if isinstance(value, str | int | float | None) else str(value)
            for name, value in self.__dict__.items()
        }
        return _rebuilt, (type(self), self.args, plain)


def _rebuilt(kind: type[VPTError], args: tuple[Any, ...], parts: dict[str, Any]) -> VPTError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(parts)
    return error


class UserError(VPTError, ValueError):
    """The caller passed something that cannot be used."""


class ImageError(UserError):
    """A picture is missing, broken, too large or of a kind that cannot be read."""


class CheckpointError(UserError):
    """A checkpoint directory is incomplete, or its weights do not fit its config."""


class ToolDefinitionError(UserError):
    """A tool was defined or registered wrongly: the author's fault, found before any run."""


class TraceError(UserError):
    """A trace cannot be read or written."""


class MissingExtraError(VPTError, ImportError):
    """An optional dependency is not installed; the message names the extra."""


class ServerError(VPTError, RuntimeError):
    """A server, of a model or of tools, did not answer or refused, as often as it was tried."""


class TrainingError(VPTError, RuntimeError):
    """Training cannot go on, though its input was fine: the loss is no number any more."""


class InternalError(VPTError, RuntimeError):
    """A state that should be impossible: our fault."""


class ModelRetry(Exception):  # noqa: N818 - the field's name for it (pydantic-ai)
    """Raised by a tool: the model can fix this call. Said to it in one line, and counted."""

    def __init__(self, message: str, kind: CallErrorKind = "invalid_arguments") -> None:
        self.message, self.kind = message, kind
        super().__init__(message)


class ToolFailed(Exception):  # noqa: N818
    """Raised by a tool: this did not work and will not; the model is told, the run goes on."""

    def __init__(self, message: str, kind: CallErrorKind = "tool_failed") -> None:
        self.message, self.kind = message, kind
        super().__init__(message)
