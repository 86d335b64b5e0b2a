"""Calls of many runs, tool by tool: queued, put together to batches, run on threads, answered.

Calls are handed in with :meth:`ToolPool.submit` and start with :meth:`Pending.start`. The loop that
drives the runs hands in all that came up in one step before it starts any, so that calls of one
tool from different runs stand in one batch; what comes while a tool is busy waits and goes together
next.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from vpt_agent.errors import UserError
from vpt_agent.tool.call import ContextFactory, Job, Outcome, run_jobs
from vpt_agent.tool.spec import PerceptionTool
from vpt_agent.types import CallError, ToolCall, ToolResult

Around = Callable[[], contextlib.AbstractContextManager[object]]

_WAITED = "it waited for its turn"


@dataclass(frozen=True)
class Submitted:
    """One call as it is handed in. ``deadline`` is the ``time.monotonic()`` of its run's end."""

    tool: PerceptionTool | CallError
    call: ToolCall
    factory: ContextFactory
    deadline: float | None = None


@dataclass(frozen=True)
class Pending:
    """Calls on their way. A future never raises for the model's or a tool's fault."""

    futures: tuple[Future[ToolResult], ...]
    start: Callable[[], None]
    cancel: Callable[[], None]


@dataclass(eq=False)
class _Queue:
    """What waits for one tool, and how many batches of it are on threads."""

    tool: PerceptionTool
    jobs: deque[Job] = field(default_factory=deque)
    timers: dict[Job, threading.Timer] = field(default_factory=dict)
    running: int = 0


class ToolPool:
    """Runs calls on threads; one for all runs of an agent.

    ``around`` is entered in the thread that runs a batch. ``inspect`` sees every result before its
    run does, and may raise what is the author's fault.
    """

    def __init__(
        self,
        *,
        workers: int = 16,
        around: Around = contextlib.nullcontext,
        inspect: Callable[[ToolResult], None] | None = None,
    ) -> None:
        self._around, self._inspect = around, inspect
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="vpt-tools")
        self._lock = threading.RLock()
        self._queues: dict[PerceptionTool, _Queue] = {}
        self._closed = False

    def submit(self, calls: Iterable[Submitted]) -> Pending:
        """Take calls; they run once :meth:`Pending.start` (of any of them) is called."""
        made: list[tuple[Future[ToolResult], Job | None, PerceptionTool | None]] = []
        with self._lock:
            if self._closed:
                raise UserError("this agent is closed: its tools do not run any more")
            for item in calls:
                future: Future[ToolResult] = Future()
                if isinstance(item.tool, CallError):
                    error = ToolResult(item.call.id, item.call.name, error=item.tool)
                    future.set_result(error)
                    made.append((future, None, None))
                    continue
                job = Job(item.call, item.factory, self._answer(future), deadline=item.deadline)
                self._queue(item.tool).jobs.append(job)
                made.append((future, job, item.tool))

        def cancel() -> None:
            for future, job, tool in made:
                if job is not None and tool is not None:
                    self._cancel(tool, job, future)

        return Pending(tuple(future for future, _, _ in made), self.start, cancel)

    def start(self) -> None:
        """Start what waits, as far as the tools have slots."""
        with self._lock:
            for queue in self._queues.values():
                self._launch(queue)

    def close(self) -> None:
        """Take no more calls and stop those on their way; tools that no other agent uses are
        closed when their last call has ended."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for queue in self._queues.values():
                for job in tuple(queue.jobs):
                    self._take_out(queue, job)
                    job.late(queue.tool, "its agent was closed")
            idle = [queue.tool for queue in self._queues.values() if not queue.running]
            self._threads.shutdown(wait=False)
        for tool in idle:
            _let_go(tool)

    def _queue(self, tool: PerceptionTool) -> _Queue:
        if tool not in self._queues:
            tool.hold()
            self._queues[tool] = _Queue(tool)
        return self._queues[tool]

    def _answer(self, future: Future[ToolResult]) -> Callable[[Outcome], None]:
        def answer(outcome: Outcome) -> None:
            if not future.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                if isinstance(outcome, BaseException):
                    raise outcome
                if self._inspect is not None:
                    self._inspect(outcome)
            except BaseException as error:
                future.set_exception(error)  # raised again by the loop, in the run
            else:
                future.set_result(outcome)

        return answer

    def _launch(self, queue: _Queue) -> None:
        tool = queue.tool
        while queue.jobs and queue.running < tool.concurrency:
            batch = [queue.jobs[0]]
            while len(batch) < min(tool.batch_size, len(queue.jobs)):
                batch.append(queue.jobs[len(batch)])
            for job in batch:
                self._take_out(queue, job)
            queue.running += 1
            self._threads.submit(self._work, queue, batch)
        for job in queue.jobs:
            if job.deadline is not None and job not in queue.timers:
                wait = max(0.0, job.deadline - time.monotonic())
                timer = threading.Timer(wait, self._overdue, (queue, job))
                timer.daemon = True
                queue.timers[job] = timer
                timer.start()

    def _take_out(self, queue: _Queue, job: Job) -> None:
        queue.jobs.remove(job)
        timer = queue.timers.pop(job, None)
        if timer is not None:
            timer.cancel()

    def _overdue(self, queue: _Queue, job: Job) -> None:
        with self._lock:
            if job not in queue.jobs:
                return
            self._take_out(queue, job)
        job.late(queue.tool, _WAITED)

    def _cancel(self, tool: PerceptionTool, job: Job, future: Future[ToolResult]) -> None:
        with self._lock:
            queue = self._queues[tool]
            if job in queue.jobs:
                self._take_out(queue, job)
        future.cancel()
        job.stop()

    def _work(self, queue: _Queue, batch: Sequence[Job]) -> None:
        try:
            with self._around():
                run_jobs(queue.tool, batch)
        except BaseException as error:  # ours: nobody waits for this thread, so the runs are told
            for job in batch:
                job.end(error)
        finally:
            with self._lock:
                queue.running -= 1
                last = self._closed and not queue.running
                if not self._closed:
                    self._launch(queue)
            if last:
                _let_go(queue.tool)


def _let_go(tool: PerceptionTool) -> None:
    """A tool that cannot close is its author's trouble, and no reason to leave others open."""
    try:
        tool.let_go()
    except Exception as error:
        warnings.warn(f"closing the tool {tool.full_name} failed: {error!r}", stacklevel=2)
