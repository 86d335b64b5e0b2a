"""Running a tool in time: on a thread that can be left behind, for several runs at once."""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from vpt_agent.tool.failures import OutOfTimeError
from vpt_agent.tool.output import ToolReturn
from vpt_agent.tool.ready import Slot
from vpt_agent.tool.spec import PerceptionTool

if TYPE_CHECKING:
    from vpt_agent.tool.call import Job

Work = Callable[[], Sequence[ToolReturn]]

GRACE = 0.1
"""Seconds that a tool has to stop after it was told that its time is over."""

_ELSEWHERE = "the tool goes on for the calls of other runs"
_WAITED = "it waited for its turn"


def in_time(tool: PerceptionTool, jobs: Sequence[Job], work: Work) -> Sequence[ToolReturn]:
    """What ``work`` gives, or :class:`OutOfTimeError` for all jobs that still wait.

    A job whose run is over before the others is answered meanwhile. The thread of a tool that does
    not stop keeps its slot until it does.
    """
    slot = tool.slots.take(tool.name, lambda: _someone_waits(tool, jobs))
    if slot is None or not _someone_waits(tool, jobs):
        if slot is not None:
            slot.over()
        raise OutOfTimeError(0.0, of_run=True, detail=_WAITED, abandoned=False)
    if tool.timeout is None and all(job.deadline is None for job in jobs):
        try:
            return work()
        finally:
            slot.over()
    return _Watched(tool, jobs, slot, work).run()


def _someone_waits(tool: PerceptionTool, jobs: Sequence[Job]) -> bool:
    """Answer the jobs whose run is over, but for the last: the caller answers that."""
    waiting = [job for job in jobs if not job.ended]
    if all(job.over() for job in waiting):
        return False
    for job in waiting:
        if job.over():
            job.late(tool, _WAITED)
    return True


class _Watched:
    """One attempt on a thread, and the thread that waits for it."""

    def __init__(self, tool: PerceptionTool, jobs: Sequence[Job], slot: Slot, work: Work) -> None:
        self.tool, self.jobs, self.slot, self.work = tool, jobs, slot, work
        self.news = threading.Event()  # something to look at: the end, or a job that was stopped
        self.outcome: tuple[Sequence[ToolReturn], BaseException | None] | None = None
        self.in_modes = _torch_modes()

    def run(self) -> Sequence[ToolReturn]:
        for job in self.jobs:
            job.watch(self.news)
        carried = contextvars.copy_context()
        name = f"vpt-tool-{self.tool.name}"
        thread = threading.Thread(target=carried.run, args=(self.body,), name=name, daemon=True)
        thread.start()
        error = self.wait()
        if self.outcome is None and error is not None:
            for job in self.jobs:
                if job.context is not None and not job.ended:
                    job.context.cancelled.set()
            thread.join(GRACE)
            raise self.ended(error, abandoned=thread.is_alive())
        outputs, raised = self.outcome or ((), None)
        if raised is not None:
            raise raised
        return outputs

    def body(self) -> None:
        try:
            self.outcome = (self.in_modes(self.work), None)
        except BaseException as error:
            self.outcome = ((), error)  # raised again by the thread that waits
        finally:
            self.slot.over()
            self.news.set()

    def wait(self) -> OutOfTimeError | None:
        """Until the tool is done (None), its time is over, or no run waits for it any more."""
        began = time.monotonic()
        allowed = self.tool.timeout
        while True:
            live = [job for job in self.jobs if not job.ended]
            ends = [job.deadline for job in live if job.deadline is not None]
            if allowed is not None:
                ends.append(began + allowed)
            self.news.wait(max(0.0, min(ends) - time.monotonic()) if ends else None)
            self.news.clear()
            if self.outcome is not None:
                return None
            now = time.monotonic()
            if allowed is not None and now >= began + allowed:
                return OutOfTimeError(allowed, of_run=False, detail="", abandoned=False)
            over = [job for job in live if job.over()]
            if len(over) == len(live):
                return OutOfTimeError(now - began, of_run=True, detail="", abandoned=False)
            for job in over:
                if job.context is not None:
                    job.context.cancelled.set()
                job.late(self.tool, _ELSEWHERE)

    def ended(self, error: OutOfTimeError, *, abandoned: bool) -> OutOfTimeError:
        """The error, with what became of the thread."""
        detail = "it stopped"
        if abandoned:
            self.slot.leave()
            detail = "its thread did not stop and was left behind"
        return OutOfTimeError(
            error.seconds, of_run=error.of_run, detail=detail, abandoned=abandoned
        )


def _torch_modes() -> Callable[[Work], Sequence[ToolReturn]]:
    """Carries the gradient modes of this thread to another: torch keeps them for each thread."""
    torch = sys.modules.get("torch")  # not loaded: then no tool has used it either
    if torch is None:
        return lambda work: work()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(work: Work) -> Sequence[ToolReturn]:
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work()

    return run
