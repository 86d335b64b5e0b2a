"""How a call can fail: what ends the run, and what is one of the closed list of kinds."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from vpt_agent.errors import (
    CheckpointError,
    InternalError,
    MissingExtraError,
    ModelRetry,
    ToolDefinitionError,
    ToolFailed,
    TraceError,
    VPTError,
)
from vpt_agent.tool.ready import NotReadyError
from vpt_agent.tool.spec import PerceptionTool
from vpt_agent.tool.text import one_line
from vpt_agent.types import CallError

RAISED = (CheckpointError, InternalError, MissingExtraError, ToolDefinitionError, TraceError)
"""Faults that no call can cause and no model can mend: they end the run."""

_LONGEST_DETAIL = 20_000


class OutOfTimeError(Exception):
    """A message from the thread that waits. ``of_run``: the run's time is over, not the tool's;
    ``abandoned``: the tool's thread did not stop."""

    def __init__(self, seconds: float, *, of_run: bool, detail: str, abandoned: bool) -> None:
        self.seconds, self.of_run = seconds, of_run
        self.detail, self.abandoned = detail, abandoned
        super().__init__(f"{seconds:g} s")


def attempt(step: Callable[[], None]) -> BaseException | None:
    """The one place that sorts: what ends the run is raised, what ends the call is given back."""
    try:
        step()
    except RAISED:
        raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # SystemExit, asyncio's CancelledError, a test framework's own: none may end the run.
        return error
    return None


def call_error(tool: PerceptionTool, error: BaseException) -> CallError:
    """An exception as one of the closed list of kinds: a line for the model, the rest as detail."""
    if isinstance(error, ModelRetry | ToolFailed):
        cause = error.__cause__
        detail = "" if cause is None else f"{type(cause).__name__}: {cause}"
        return CallError(error.kind, one_line(error.message), detail[:_LONGEST_DETAIL])
    if isinstance(error, OutOfTimeError):
        if error.of_run:
            line = f"the time of the run is over; {tool.name} was ended"
            return CallError("limit", line, error.detail)
        line = f"{tool.name} took longer than {error.seconds:g} s and was ended"
        return CallError("timeout", line, error.detail)
    if isinstance(error, NotReadyError):
        line = f"{tool.name} is not ready yet: try again later, or go on without it"
        return CallError("timeout", line, f"its setup took longer than {tool.setup_timeout:g} s")
    detail = "".join(traceback.format_exception(error))[-_LONGEST_DETAIL:]
    if out_of_memory(error):
        return CallError("tool_failed", f"{tool.name} ran out of memory", detail)
    # The text of a stranger's exception can hold paths and data: it stays in the trace.
    said = one_line(error.what) if isinstance(error, VPTError) else type(error).__name__
    return CallError("tool_failed", f"{tool.name} failed: {said}", detail)


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine or the device had no memory left."""
    torch = sys.modules.get("torch")
    kind = getattr(torch, "OutOfMemoryError", MemoryError)
    return isinstance(error, MemoryError | kind)


def free_memory() -> None:
    """Give the device's cached memory back before a smaller batch is tried."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
