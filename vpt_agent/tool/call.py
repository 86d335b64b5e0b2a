"""Calls on their way: check the arguments, run the tool in time, sort what went wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from vpt_agent.errors import ToolDefinitionError, ToolFailed
from vpt_agent.tool.arguments import read_values
from vpt_agent.tool.context import ToolContext
from vpt_agent.tool.failures import (
    RAISED,
    OutOfTimeError,
    attempt,
    call_error,
    free_memory,
    out_of_memory,
)
from vpt_agent.tool.output import ToolReturn, to_result
from vpt_agent.tool.ready import NoSlotError, NotReadyError
from vpt_agent.tool.spec import PerceptionTool
from vpt_agent.tool.timed import in_time
from vpt_agent.types import CallError, ToolCall, ToolResult

ContextFactory = Callable[[], ToolContext]
Clock = Callable[[], float]
Outcome = ToolResult | BaseException

__all__ = ["RAISED", "Job", "call_error", "execute", "execute_batch", "run_jobs"]


class Job:
    """One call on its way. ``answer`` is called once, from any thread: with the result, or with
    one of :data:`RAISED`, the faults of users and authors, and ours."""

    def __init__(
        self,
        call: ToolCall,
        factory: ContextFactory,
        answer: Callable[[Outcome], None],
        *,
        deadline: float | None = None,
    ) -> None:
        self.call, self.factory, self.deadline = call, factory, deadline
        self.arguments: object = None
        self.context: ToolContext | None = None
        self.repairs = call.repairs
        self.seconds = 0.0
        self.stopped = self.ended = False
        self._answer = answer
        self._news: threading.Event | None = None
        self._lock = threading.Lock()

    def end(self, outcome: Outcome) -> None:
        """Answer, unless that was done."""
        with self._lock:
            if self.ended:
                return
            self.ended = True
        self._answer(outcome)

    def stop(self) -> None:
        """Nobody waits for the result any more."""
        self.stopped = True
        if self.context is not None:
            self.context.cancelled.set()
        if self._news is not None:
            self._news.set()

    def watch(self, news: threading.Event) -> None:
        """``news`` is set when the job is stopped."""
        self._news = news
        if self.stopped:
            news.set()

    def over(self) -> bool:
        """Whether its run waits no more: stopped, or its time has come."""
        return self.stopped or (self.deadline is not None and time.monotonic() >= self.deadline)

    def fail(self, tool: PerceptionTool, error: BaseException) -> None:
        """Answer with an error, said in one line to the model."""
        told: dict[str, object] = {"repairs": list(self.repairs)} if self.repairs else {}
        if isinstance(error, OutOfTimeError) and error.abandoned:
            told["abandoned"] = True
        self.end(
            ToolResult(
                call_id=self.call.id,
                name=self.call.name,
                error=call_error(tool, error),
                metadata=told,
                seconds=self.seconds,
            )
        )

    def late(self, tool: PerceptionTool, detail: str) -> None:
        """Answer that the run's time is over."""
        self.fail(tool, OutOfTimeError(0.0, of_run=True, detail=detail, abandoned=False))


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
    ``view`` (for tools that need one). What was mended to read them is in
    ``metadata["repairs"]``. The tool runs on a thread of its own if it has a timeout or the run
    has a deadline; one that does not stop is left behind, and ``metadata["abandoned"]`` is true.
    Raises only :data:`RAISED`: the faults of users and authors, and ours.
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
    found: list[list[Outcome]] = [[] for _ in calls]
    jobs = [
        Job(call, factory, place.append)
        for (call, factory), place in zip(calls, found, strict=True)
    ]
    run_jobs(tool, jobs, clock=clock)
    outcomes = [place[0] for place in found]
    fault = next((o for o in outcomes if isinstance(o, BaseException)), None)
    if fault is not None:
        raise fault
    return [o for o in outcomes if isinstance(o, ToolResult)]


def run_jobs(tool: PerceptionTool, jobs: Sequence[Job], *, clock: Clock = time.monotonic) -> None:
    """Answer every job. One whose run is over is answered as soon as it is, the others go on."""
    for job in jobs:
        began = clock()
        _attempted(tool, job, partial(_check, tool, job))
        job.seconds = clock() - began
    # Those with the least time first: none then waits longer for a setup than it may.
    for job in sorted(_open(jobs), key=lambda j: j.deadline or float("inf")):
        _attempted(tool, job, partial(_prepare, tool, job))
    ready = _open(jobs)
    for start in range(0, len(ready), tool.batch_size):
        _run(tool, ready[start : start + tool.batch_size], clock)


def _open(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if not job.ended]


def _attempted(tool: PerceptionTool, job: Job, step: Callable[[], None]) -> None:
    """Do a step for one job; what goes wrong is that job's answer."""
    try:
        error = attempt(step)
    except RAISED as fault:
        job.end(fault)
        return
    if error is not None:
        job.fail(tool, error)


def _check(tool: PerceptionTool, job: Job) -> None:
    """Arguments, view and needs, before anything runs."""
    job.arguments, repairs = read_values(tool.spec, job.call.arguments)
    job.repairs += repairs
    context = job.factory()
    if "view" in tool.needs:
        # The parsed value, not the written one: a default or a validator may have changed it.
        named = job.arguments
        values = named if isinstance(named, Mapping) else vars(named)
        source = tool.source_of(values, tuple(context.views))
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
    if tool.device is not None and tool.device != context.device:
        context = replace(context, device=tool.device)
    job.context, job.deadline = context, context.deadline
    if job.stopped:
        context.cancelled.set()


def _prepare(tool: PerceptionTool, job: Job) -> None:
    """Wait for the tool's setup, as long as the tool allows and the run has."""
    left = None if job.deadline is None else max(0.0, job.deadline - time.monotonic())
    waits = [s for s in (left, tool.setup_timeout) if s is not None]
    device = "cpu" if job.context is None else job.context.device
    try:
        tool.prepare(device, seconds=min(waits, default=None))
    except NotReadyError:
        if job.over():
            detail = "its setup goes on"
            raise OutOfTimeError(0.0, of_run=True, detail=detail, abandoned=False) from None
        raise


def _run(tool: PerceptionTool, jobs: Sequence[Job], clock: Clock) -> None:
    """Answer ``jobs``; a batch that fails as a whole is split."""
    began = clock()
    outputs: list[object] = []
    try:
        error = attempt(lambda: outputs.extend(in_time(tool, jobs, partial(_work, tool, jobs))))
    except RAISED as fault:
        for job in jobs:
            job.end(fault)
        return
    if error is not None and len(jobs) > 1 and not isinstance(error, OutOfTimeError | NoSlotError):
        crowded = out_of_memory(error)
        error = None  # it holds the frames, and so the memory, of what failed
        if crowded:
            free_memory()
        middle = len(jobs) // 2
        for half in (jobs[:middle], jobs[middle:]):
            if left := _open(half):
                _run(tool, left, clock)
        return
    share = (clock() - began) / len(jobs)
    for index, job in enumerate(jobs):
        if job.ended:
            continue
        job.seconds += share
        if error is not None:
            job.fail(tool, error)
        else:
            _attempted(tool, job, partial(_finish, tool, job, outputs[index]))


def _work(tool: PerceptionTool, jobs: Sequence[Job]) -> Sequence[ToolReturn]:
    """What the tool's thread does."""
    pairs = [(job.arguments, job.context) for job in jobs if job.context is not None]
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


def _finish(tool: PerceptionTool, job: Job, output: object) -> None:
    """Make the result of what the tool gave, and answer with it."""
    if isinstance(output, Exception):
        raise output
    assert job.context is not None
    metadata: dict[str, object] = {"repairs": list(job.repairs)} if job.repairs else {}
    result = to_result(tool.owner, job.call, output, job.context, job.seconds, metadata)
    job.end(result)
