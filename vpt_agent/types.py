"""What travels between the stages: plain values, no torch.

Coordinates: a :class:`Box` is ``left, top, right, bottom``; its frame is said by whoever holds it.
Unless said otherwise it is in pixels of the original picture, right and bottom exclusive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from vpt_agent.errors import CallErrorKind, UserError

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from vpt_agent.trace import Trace


class Box(NamedTuple):
    """A rectangle ``(left, top, right, bottom)``; right and bottom are exclusive."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """``right - left``."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """``bottom - top``."""
        return self.bottom - self.top


@dataclass(frozen=True)
class View:
    """A picture the model can look at: an original, or a crop that knows where it came from.

    ``image`` is RGB, 8 bits. ``box`` is in pixels of the original ``root``, whose size is
    ``root_size`` (width, height). For an original, ``parent`` is None and ``root`` its own id.
    """

    id: str
    image: Image.Image
    root: str
    box: Box
    root_size: tuple[int, int]
    parent: str | None = None
    origin: str = "given"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size

    @cached_property
    def sha256(self) -> str:
        """Hash of the pixels and the size: equal pictures have equal keys."""
        digest = hashlib.sha256(f"{self.image.mode}{self.image.size}".encode())
        digest.update(self.image.tobytes())
        return digest.hexdigest()


ToolChoice = str
"""``auto``, ``none``, ``required``, or the name of a tool."""

CallOrigin = Literal["sampled", "forced", "json", "user"]
TokenSource = Literal["given", "sampled", "forced", "visual"]


@dataclass(frozen=True)
class ToolCall:
    """One call of a perception tool.

    ``control`` is the hidden state [k, D] that the call carries (re-encoding kinds), on the
    model's device; ``tokens`` are the ids that spelled the call; ``repairs`` says what was mended
    when a call was read from text.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]
    origin: CallOrigin
    kind: str | None = None
    tokens: tuple[int, ...] = ()
    control: torch.Tensor | None = field(default=None, compare=False)
    repairs: tuple[str, ...] = ()


@dataclass(frozen=True)
class CallError:
    """Why a call gave no result: ``message`` is the one line the model sees."""

    kind: CallErrorKind
    message: str
    detail: str = ""


@dataclass(frozen=True)
class VisualFeatures:
    """Visual tokens [V, D] ready for the language model, and the kind whose row lays them out."""

    kind: str
    tokens: torch.Tensor
    kernel: str = ""


@dataclass(frozen=True)
class ToolResult:
    """What a call gave: views to look at, visual features, text; or an error.

    ``metadata`` is never shown to the model. ``kernels`` names the device kernels that ran.
    """

    call_id: str
    name: str
    views: tuple[View, ...] = ()
    features: VisualFeatures | None = None
    text: str | None = None
    structured: Any = None
    error: CallError | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the call gave a result."""
        return self.error is None


@dataclass(frozen=True)
class Limits:
    """What one run may spend. Reaching one is an outcome in the trace, not an exception.

    ``calls`` counts tool calls, ``rounds`` the assistant turns that may call, ``retries`` the
    failed calls the model may correct, ``visual_tokens`` and ``pixels`` what the calls may add,
    ``new_tokens`` the decoded tokens, ``seconds`` the wall clock of the run.
    """

    calls: int = 8
    rounds: int = 4
    retries: int = 2
    visual_tokens: int = 16384
    pixels: int = 64_000_000
    new_tokens: int = 512
    seconds: float | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.name == "seconds":
                continue
            allowed = int | float if f.name == "seconds" else int
            # Not `value < 0`: that is false for NaN too.
            if isinstance(value, bool) or not isinstance(value, allowed) or not value >= 0:
                raise UserError(
                    "a limit must be a number, 0 or more (whole, but for seconds)",
                    where=f"Limits.{f.name}",
                    got=repr(value),
                )


@dataclass
class Usage:
    """What one run cost. Tokens of the prompt count once: nothing is computed twice.

    ``forward_tokens`` is the number of positions the language model computed and
    ``forward_calls`` how often it ran; ``cached_tokens`` were not computed, since a run beside
    this one had them; ``encoder_calls`` counts pictures pushed through a vision
    encoder; ``reused_features`` counts pictures whose features were at hand already.

    A model on another machine is sent the conversation again with every request, so there
    ``prompt_tokens`` adds up over ``requests``, and ``cached_tokens`` are those of them that it
    had at hand. ``cost`` is in the currency of its prices, as far as they are known.
    """

    prompt_tokens: int = 0
    sampled_tokens: int = 0
    forced_tokens: int = 0
    visual_tokens: int = 0
    forward_tokens: int = 0
    forward_calls: int = 0
    encoder_calls: int = 0
    reused_features: int = 0
    tool_calls: int = 0
    pixels: int = 0
    seconds: float = 0.0
    requests: int = 0
    cached_tokens: int = 0
    cost: float = 0.0

    @property
    def new_tokens(self) -> int:
        """Tokens decoded, sampled and forced together."""
        return self.sampled_tokens + self.forced_tokens

    def to_dict(self) -> dict[str, float]:
        """All figures by name, for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "new_tokens": self.new_tokens
        }


RunStatus = Literal["answered", "limit", "failed", "refused"]
"""``refused``: a server's model would not answer; its words are the answer's text."""


@dataclass(frozen=True)
class Answer:
    """The outcome of one question. ``limit`` names the limit that ended the run, if one did."""

    text: str
    calls: tuple[ToolCall, ...]
    results: tuple[ToolResult, ...]
    views: tuple[View, ...]
    usage: Usage
    warnings: tuple[str, ...]
    trace: Trace
    status: RunStatus = "answered"
    limit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``vpt-agent ask --json``."""
        return {
            "answer": self.text,
            "status": self.status,
            "limit": self.limit,
            "calls": [
                {
                    "id": call.id,
                    "name": call.name,
                    "arguments": dict(call.arguments),
                    "origin": call.origin,
                    "error": None if r.error is None else vars(r.error),
                    "views": [{"id": v.id, "box": list(v.box)} for v in r.views],
                }
                for call, r in zip(self.calls, self.results, strict=True)
            ],
            "usage": self.usage.to_dict(),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Span:
    """A run of tokens of one source in a :class:`Record`.

    ``sampled`` tokens came from the model, ``forced`` ones from the grammar or the caller,
    ``given`` ones from the prompt, ``visual`` ones are placeholders filled with visual tokens.
    ``logprobs`` (sampled spans) are under the constraint that was in force.
    """

    source: TokenSource
    ids: tuple[int, ...]
    view: str | None = None
    kind: str | None = None
    call_id: str | None = None
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class Record:
    """A conversation as spans: what traces, data rows, collation and evaluation share."""

    spans: tuple[Span, ...]
    views: tuple[str, ...] = ()

    @property
    def ids(self) -> list[int]:
        """All token ids in order, placeholders included."""
        return [i for span in self.spans for i in span.ids]
