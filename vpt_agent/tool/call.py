"""One call: check the arguments, run the tool in time, and sort what went wrong."""

from __future__ import annotations

import contextvars
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

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
from vpt_agent.tool.context import ToolContext
from vpt_agent.tool.output import ToolReturn, to_result
from vpt_agent.tool.spec import PerceptionTool
from vpt_agent.tool.text import one_line
from vpt_agent.types import CallError, ToolCall, ToolResult

ContextFactory = Callable[[], ToolContext]
Clock = Callable[[], float]

RAISED = (CheckpointError, InternalError, MissingExtraError, ToolDefinitionError, TraceError)
"""Faults that no call can cause and no model can mend: they end the run."""

GRACE = 0.1
"""Seconds that a tool has to stop after it was told that its time is over."""

_LONGEST_DETAIL = 20_000


class _OutOfTime(Exception):  # noqa: N818 - a private message from the waiting thread
    def __init__(self, seconds: float, *, of_run: bool, abandoned: bool) -> None:
        self.seconds, self.of_run, self.abandoned = seconds, of_run, abandoned
        super().__init__(f"{seconds:g} s")


@dataclass
class _Item:
    """One call on its way: ``output`` is what the tool gave, ``error`` what ended it instead."""

    call: ToolCall
    arguments: object = None
    context: ToolContext | None = None
    output: object = None
    error: BaseException | None = None
    seconds: float = 0.0


def execute(
    tool: PerceptionTool | CallError,
    call: ToolCall,
    context_factory: ContextFactory,
    *,
    clock: Clock = time.monotonic,
) -> ToolResult:
    """Run one call. Whatever the model wrote and however the tool fails, there is a result.

    ``tool`` is what :meth:`ToolRegistry.get` gave, an error included. ``context_factory`` is
    called once the arguments are valid; a view that they name as ``source`` becomes the context's
    ``view`` (for tools that need one). The tool runs on a thread of its own if it has a timeout or
    the run has a deadline; one that does not stop is left behind, and ``metadata["abandoned"]`` is
    true. Raises only :data:`RAISED`: the faults of users and authors, and ours.
    """
    return execute_batch(tool, [(call, context_factory)], clock=clock)[0]


def execute_batch(
    tool: PerceptionTool | CallError,
    calls: Sequence[tuple[ToolCall, ContextFactory]],
    *,
    clock: Clock = time.monotonic,
) -> list[ToolResult]:
    """Run several calls of one tool, at most ``tool.batch_size`` at a time; results in order.

    A batch that fails (out of memory, or one bad call) is split in halves until the call that
    cannot be done stands alone. Otherwise as :func:`execute`.
    """
    if isinstance(tool, CallError):
        return [ToolResult(call.id, call.name, error=tool) for call, _ in calls]
    items = [_Item(call) for call, _ in calls]
    for item, (_, factory) in zip(items, calls, strict=True):
        began = clock()
        item.error = _attempt(partial(_check, tool, item, factory))
        item.seconds = clock() - began
    ready = [item for item in items if item.error is None]
    for start in range(0, len(ready), tool.batch_size):
        _run(tool, ready[start : start + tool.batch_size], clock)
    return [_result(tool, item) for item in items]


def _attempt(step: Callable[[], None]) -> BaseException | None:
    """The one place that sorts: what ends the run is raised, what ends the call is given back."""
    try:
        step()
    except RAISED:
        raise
    except (Exception, SystemExit) as error:
        return error
    return None


def _check(tool: PerceptionTool, item: _Item, factory: ContextFactory) -> None:
    """Arguments, view and needs, before anything runs."""
    item.arguments = tool.spec.parse(item.call.arguments)
    context = factory()
    if "view" in tool.needs:
        # The parsed value, not the written one: a default or a validator may have changed it.
        named = item.arguments
        values = named if isinstance(named, Mapping) else vars(named)
        source = values.get("source")
        if source is not None:
            context = context.looking_at(str(source))
        context.require_view()
    if "control" in tool.needs and context.control is None:
        raise ToolFailed(
            f"{tool.name} needs the control state, which only its perception tokens carry"
        )
    for need in sorted(tool.needs):
        encoder = need.removeprefix("encoder:")
        if encoder != need and encoder not in context.kinds:
            raise ToolFailed(f"{tool.name} needs the encoder {encoder}, which this model lacks")
    tool.prepare(context.device)
    item.context = context


def _run(tool: PerceptionTool, items: Sequence[_Item], clock: Clock) -> None:
    """Fill the outcomes of ``items``; a batch that fails as a whole is split."""
    began = clock()
    outputs: list[object] = []
    error = _attempt(lambda: outputs.extend(_in_time(tool, items, clock)))
    if error is not None and len(items) > 1 and not isinstance(error, _OutOfTime):
        error = None  # it holds the frames, and so the memory, of what failed
        middle = len(items) // 2
        _run(tool, items[:middle], clock)
        _run(tool, items[middle:], clock)
        return
    share = (clock() - began) / len(items)
    for index, item in enumerate(items):
        item.seconds += share
        item.error = error
        if error is None:
            item.output = outputs[index]
            if isinstance(item.output, RAISED):
                raise item.output
            if isinstance(item.output, Exception):
                item.error = item.output


def _in_time(tool: PerceptionTool, items: Sequence[_Item], clock: Clock) -> Sequence[ToolReturn]:
    pairs = [(item.arguments, item.context) for item in items if item.context is not None]
    contexts = [context for _, context in pairs]

    def work() -> Sequence[ToolReturn]:
        if len(pairs) == 1 and type(tool).run is not PerceptionTool.run:
            return [tool.run(*pairs[0])]
        outputs = tool.run_batch(pairs)
        if not isinstance(outputs, list | tuple) or len(outputs) != len(pairs):
            raise ToolDefinitionError(
                "run_batch gives one result for each call",
                where=tool.owner,
                got=len(outputs) if isinstance(outputs, list | tuple) else repr(type(outputs)),
                expected=len(pairs),
            )
        return outputs

    deadlines = [c.deadline for c in contexts if c.deadline is not None]
    left = min(deadlines) - clock() if deadlines else None
    if left is None and tool.timeout is None:
        return work()
    of_run = left is not None and (tool.timeout is None or left < tool.timeout)
    seconds = left if left is not None and of_run else tool.timeout
    if seconds is None or seconds <= 0:
        raise _OutOfTime(0.0, of_run=True, abandoned=False)
    outcome: list[tuple[Sequence[ToolReturn] | None, BaseException | None]] = []

    def body() -> None:
        try:
            outcome.append((_in_torch_mode(work), None))
        except BaseException as error:
            outcome.append((None, error))  # raised again by the thread that waits

    _in_torch_mode = _torch_mode()
    carried = contextvars.copy_context()
    thread = threading.Thread(
        target=carried.run, args=(body,), name=f"vpt-tool-{tool.name}", daemon=True
    )
    thread.start()
    thread.join(seconds)
    if not outcome:
        for context in contexts:
            context.cancelled.set()
        thread.join(GRACE)
        raise _OutOfTime(seconds, of_run=of_run, abandoned=thread.is_alive())
    outputs, error = outcome[0]
    if error is not None:
        raise error
    return outputs or ()


def _torch_mode() -> Callable[[Callable[[], Sequence[ToolReturn]]], Sequence[ToolReturn]]:
    """Carries the gradient modes of this thread to another: torch keeps them for each thread."""
    torch = sys.modules.get("torch")  # not loaded: then no tool has used it either
    if torch is None:
        return lambda work: work()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(work: Callable[[], Sequence[ToolReturn]]) -> Sequence[ToolReturn]:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work()

    return run


def _result(tool: PerceptionTool, item: _Item) -> ToolResult:
    results: list[ToolResult] = []
    context = item.context
    if item.error is None and context is not None:

        def convert() -> None:
            results.append(to_result(tool.owner, item.call, item.output, context, item.seconds))

        item.error = _attempt(convert)
    if item.error is None:
        return results[0]
    left_behind = isinstance(item.error, _OutOfTime) and item.error.abandoned
    return ToolResult(
        call_id=item.call.id,
        name=item.call.name,
        error=call_error(tool, item.error),
        metadata={"abandoned": True} if left_behind else {},
        seconds=item.seconds,
    )


def call_error(tool: PerceptionTool, error: BaseException) -> CallError:
    """An exception as one of the closed list of kinds: a line for the model, the rest as detail."""
    if isinstance(error, ModelRetry | ToolFailed):
        cause = error.__cause__
        detail = "" if cause is None else f"{type(cause).__name__}: {cause}"
        return CallError(error.kind, one_line(error.message), detail[:_LONGEST_DETAIL])
    if isinstance(error, _OutOfTime):
        left = "its thread did not stop and was left behind" if error.abandoned else "it stopped"
        if error.of_run:
            return CallError("limit", f"the time of the run is over; {tool.name} was ended", left)
        line = f"{tool.name} took longer than {error.seconds:g} s and was ended"
        return CallError("timeout", line, left)
    detail = "".join(traceback.format_exception(error))[-_LONGEST_DETAIL:]
    if _out_of_memory(error):
        return CallError("tool_failed", f"{tool.name} ran out of memory", detail)
    # The text of a stranger's exception can hold paths and data: it stays in the trace.
    said = one_line(error.what) if isinstance(error, VPTError) else type(error).__name__
    return CallError("tool_failed", f"{tool.name} failed: {said}", detail)


def _out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    kind = getattr(torch, "OutOfMemoryError", MemoryError)
    return isinstance(error, MemoryError | kind)
