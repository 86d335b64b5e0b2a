"""The loop: runs join and leave at every step, and whoever waits for one of them keeps it going.

There is one list of live runs. A step lets finished tools tell their runs, encodes the pictures
that runs ask for, and computes tokens; each in as few batches as there can be. Steps are made by
the threads that wait for runs, one at a time; a run that nobody waits for
(:meth:`Scheduler.submit`) is kept going by a thread that lives as long as there are such runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, Protocol

import torch

from vpt_agent.engine.live import Live, Run, T
from vpt_agent.engine.parts import Fed, Look, Looked, nothing
from vpt_agent.errors import UserError

BREATH = 16
"""Steps that a thread makes of the only run there is before it looks whether others wait."""

Outcome = tuple[Live, Fed | UserError | None]
"""The answer to what a run asked for, why there is none, or None: only a part was computed."""


class Worker(Protocol):
    """What the loop works with."""

    def look_all(self, looks: Sequence[Look]) -> list[list[Looked]]:
        """Features of pictures, one batch an encoder."""

    def step(self, feeding: Sequence[Live], everyone: Sequence[Live]) -> list[Outcome]:
        """Compute what fits into one step of what ``feeding`` ask for."""


class Scheduler:
    """Runs of all threads, together. At most ``most`` run at once, those not counted whose tools
    are running; the others wait in the order in which they came. ``patience`` is that of
    :class:`~vpt_agent.engine.plan.Measures`, in seconds."""

    def __init__(self, worker: Worker, *, most: int, patience: float = 0.0) -> None:
        self.worker, self.most, self.patience = worker, most, patience
        self._lives: list[Live] = []  # by age
        self._count = 0
        self._changed = threading.Condition()  # its lock is reentrant: a collector may close runs
        self._leader: int | None = None  # the thread that makes a step
        self._news = 0  # counts what may let a run go on: a new run, a tool's result
        self._server: threading.Thread | None = None

    # --- for those who want runs done -----------------------------------------------------

    def drive(self, runs: Sequence[Run[T]]) -> list[T]:
        """Run all to their ends; their results in order. What one of them raises ends them all."""
        lives = self._join(runs)
        for _ in self._steps(lives, BREATH):
            pass
        return [live.result for live in lives]

    def steps(self, runs: Sequence[Run[T]]) -> Generator[None, None, None]:
        """As :meth:`drive`, giving control back after every step."""
        return self._steps(self._join(runs))

    def submit(self, run: Run[T]) -> Future[T]:
        """Run it beside whatever else is running; any thread may ask. Cancelling the future stops
        the run."""
        future: Future[T] = Future()
        with self._changed:
            self._join([run], future)
            if self._server is None:
                self._server = threading.Thread(target=self._serve, name="engine", daemon=True)
                self._server.start()
        return future

    def _join(self, runs: Sequence[Run[Any]], future: Future[Any] | None = None) -> list[Live]:
        with self._changed:
            lives = [Live(run, self._count + i, future=future) for i, run in enumerate(runs)]
            self._count += len(lives)
            self._lives += lives
        self._tell()
        return lives

    def _steps(self, lives: list[Live], most: int = 1) -> Generator[None, None, None]:
        try:
            while not all(live.finished for live in lives):
                self._turn(lives, most)
                broken = next((live.error for live in lives if live.error is not None), None)
                if broken is not None:
                    raise broken
                yield
        finally:
            self._drop(lives)

    def _serve(self) -> None:
        """The thread of :meth:`submit`: ends when there is no such run any more."""
        while True:
            with self._changed:
                lives = [live for live in self._lives if live.future is not None]
                if not lives:
                    self._server = None
                    return
            self._turn(lives)

    # --- whose turn it is -----------------------------------------------------------------

    def _turn(self, mine: list[Live], most: int = 1) -> None:
        """One step, by this thread or by another one; nothing if all of ``mine`` are finished.
        Up to ``most`` steps as long as nobody else wants anything."""
        me = threading.get_ident()
        if self._leader == me:  # a run that runs others: they are a step of their own
            self._sleep(self._news, quiet=not self._step(mine))
            return
        with self._changed:
            self._changed.wait_for(lambda: self._leader is None or all(e.finished for e in mine))
            if all(live.finished for live in mine):
                return
            self._leader, news = me, self._news
            lives = list(self._lives)
        moved = True
        try:
            moved = self._step(lives)
            while moved and most > 1 and self._quiet(lives, news):
                most -= 1
                moved = self._step(lives)
        finally:
            with self._changed:
                self._leader = None
                self._lives = [live for live in self._lives if not live.finished]
                self._changed.notify_all()
        self._sleep(news, quiet=not moved)

    def _quiet(self, lives: Sequence[Live], news: int) -> bool:
        """Whether there is one run only, which asks for tokens, and nothing new."""
        return len(lives) == 1 and lives[0].feeds() and self._news == news

    def _sleep(self, news: int, *, quiet: bool) -> None:
        """Wait for news, if nothing moved: every run waits for its tools."""
        if quiet:
            with self._changed:
                self._changed.wait_for(lambda: self._news != news)

    def _tell(self, _: object = None) -> None:
        with self._changed:
            self._news += 1
            self._changed.notify_all()

    def _drop(self, lives: Sequence[Live]) -> None:
        """Close what is not finished; another thread's step comes to its end first."""
        with self._changed:
            me = threading.get_ident()
            self._changed.wait_for(lambda: self._leader in (None, me))
            self._lives = [live for live in self._lives if live not in lives]
            for live in lives:
                live.finished = True
                live.run.close()

    # --- one step -------------------------------------------------------------------------

    def _step(self, lives: Sequence[Live]) -> bool:
        """Let every run go on that can; whether one did."""
        moved = self._start(lives)
        moved |= self._hear_tools(lives)
        looking = [e for e in lives if not e.finished and isinstance(e.want, list)]
        if looking:
            # One batch per encoder over all runs.
            self._look_together(looking)
            moved = True
        feeding = [e for e in lives if e.feeds()]
        if feeding:
            everyone = [e for e in lives if not e.finished]
            for live, answer in self.worker.step(feeding, everyone):
                moved = True
                if isinstance(answer, UserError):
                    self._throw(live, answer)
                elif answer is not None:
                    self._advance(live, answer)
        return moved

    def _start(self, lives: Sequence[Live]) -> bool:
        """Start new runs, as many as may run at once; close those that were cancelled."""
        moved = False
        active = sum(live.started and not live.finished and not live.waits() for live in lives)
        for live in lives:
            if live.finished:
                continue
            if live.future is not None and live.future.cancelled():
                live.finished = True
                live.run.close()
                moved = True
            elif not live.started and active < self.most:
                live.started = moved = True
                active += 1
                self._advance(live, None)
        return moved

    def _hear_tools(self, lives: Sequence[Live]) -> bool:
        """Advance the runs whose tools are done."""
        waiting = [live for live in lives if live.waits()]
        for live in waiting:
            live.want.start()
        fresh = [live for live in waiting if not live.heard]
        for live in fresh:
            live.heard = True
            for future in live.want.futures:
                future.add_done_callback(self._tell)
        begun = [live for live in fresh if live.want.start is not nothing]
        if len(begun) > max(1, sum(live.feeds() for live in lives)):
            self._be_patient([f for live in begun for f in live.want.futures])
        ready = [live for live in waiting if all(f.done() for f in live.want.futures)]
        for live in ready:
            futures = live.want.futures
            broken = next((e for f in futures if (e := f.exception())), None)
            if broken is not None:  # the user's or our fault: that run's, not everybody's
                self._throw(live, broken)
            else:
                self._advance(live, [f.result() for f in futures])
        return bool(ready)

    def _be_patient(self, futures: Sequence[Future[Any]]) -> None:
        """Wait a moment for tools that have just begun, as long as one after another comes to its
        end: a pass of one row takes nearly as long as one of all of them, and while a step is
        made, tools that need the model cannot go on. Where most runs have something else to do,
        nothing is waited for."""
        end = time.monotonic() + self.patience
        with self._changed:
            while left := _going(futures):
                rest = min(self.patience / 4, end - time.monotonic())
                fewer = partial(_fewer, futures, left)
                if rest <= 0 or not self._changed.wait_for(fewer, rest):
                    return

    def _look_together(self, looking: Sequence[Live]) -> None:
        """Features for all of ``looking`` in one batch; a picture that cannot be encoded is the
        trouble of the run that showed it."""
        try:
            answers = iter(self.worker.look_all([w for e in looking for w in e.want]))
        except UserError as error:
            if len(looking) == 1:
                self._throw(looking[0], error)
                return
            for entry in looking:
                self._look_together([entry])
            return
        for entry in looking:
            self._advance(entry, [next(answers) for _ in entry.want])

    # --- one run --------------------------------------------------------------------------

    def _advance(self, live: Live, answer: Any) -> None:
        self._resume(live, lambda: live.run.send(answer))

    def _throw(self, live: Live, error: BaseException) -> None:
        """Tell a run of its trouble; it may know what to do."""
        self._resume(live, lambda: live.run.throw(error))

    def _resume(self, live: Live, go: Callable[[], Any]) -> None:
        """Let a run go on. What it raises is for those who wait for it: they get it, not the
        thread that happens to make this step."""
        try:
            with torch.inference_mode():
                live.wants(go())
            return
        except StopIteration as stop:
            live.result = stop.value
        except Exception as error:
            live.error = error
        except BaseException as error:  # the user's interrupt, which is for this thread, too
            live.error, live.finished = error, True
            raise
        live.finished = True
        if live.future is not None:
            _settle(live.future, live)


def _going(futures: Sequence[Future[Any]]) -> int:
    return sum(not future.done() for future in futures)


def _fewer(futures: Sequence[Future[Any]], than: int) -> bool:
    return _going(futures) < than


def _settle(future: Future[Any], live: Live) -> None:
    """Give a run's end to its future, if nobody has cancelled that."""
    try:
        if live.error is not None:
            future.set_exception(live.error)
        else:
            future.set_result(live.result)
    except InvalidStateError:
        return
