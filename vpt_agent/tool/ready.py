"""A tool's life in a process: set up once, closed by its last user, a bounded number of slots."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

from vpt_agent.errors import ToolFailed

POLL = 0.05
"""Seconds between looks at whether a call that waits for a slot is still wanted."""


class NotReadyError(Exception):
    """A tool's setup is still going on; it goes on, and later calls may find it done."""


class NoSlotError(ToolFailed):
    """Every slot of a tool is closed: its threads have not stopped."""


class _Going:
    """One setup on a thread of its own."""

    def __init__(self, setup: Callable[[str], None], device: str) -> None:
        self.device = device
        self.done = threading.Event()
        self.error: BaseException | None = None
        self._setup = setup
        carried = contextvars.copy_context()
        name = f"vpt-setup-{device}"
        threading.Thread(target=carried.run, args=(self._run,), name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._setup(self.device)
        except BaseException as error:
            self.error = error  # raised again by those who wait
        finally:
            self.done.set()


class Ready:
    """Whether a tool is set up, where, and how many users it has."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._on: str | None = None
        self._going: _Going | None = None
        self._users = 0

    def prepare(
        self, setup: Callable[[str], None] | None, device: str, *, seconds: float | None = None
    ) -> None:
        """Have ``setup`` done for ``device``, by one thread, whoever asks; wait ``seconds`` at most
        (None: as long as it takes). A setup that failed is tried again by the next caller; no
        setup is always done. Raises :class:`NotReadyError`, and what the setup raises."""
        while True:
            with self._lock:
                if setup is None:
                    self._on = device
                if self._on == device or setup is None:
                    return
                going = self._going
                if going is None:
                    going = self._going = _Going(setup, device)
            if not going.done.wait(seconds):
                raise NotReadyError(f"the setup for {going.device} is still going on")
            with self._lock:
                if self._going is going:
                    self._going = None
                    self._on = None if going.error is not None else going.device
            if going.error is not None and going.device == device:
                raise going.error

    def hold(self) -> None:
        """One user more."""
        with self._lock:
            self._users += 1

    def let_go(self, close: Callable[[], None]) -> None:
        """One user less; the last one closes."""
        with self._lock:
            self._users -= 1
            last = self._users <= 0
        if last:
            self.release(close)

    def release(self, close: Callable[[], None]) -> None:
        """Call ``close`` if the tool is set up; the next call sets it up again."""
        with self._lock:
            was, self._on = self._on, None
        if was is not None:
            close()


class Slot:
    """The right to run one call or batch. Given back by the thread that ran, when it ends."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._left = self._over = False

    def leave(self) -> None:
        """Nobody waits any more: the slot is closed until its thread ends."""
        self._slots.count(self, left=True)

    def over(self) -> None:
        """The thread has ended."""
        self._slots.count(self, left=False)


class Slots:
    """How many calls (or batches) of one tool run at once, in the whole process."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._open = number
        self._closed = 0
        self._change = threading.Condition()

    @property
    def closed(self) -> int:
        """Slots whose threads did not stop when they were told to."""
        return self._closed

    def take(self, name: str, wanted: Callable[[], bool]) -> Slot | None:
        """A slot, once there is one; None when ``wanted`` says that nobody waits for it any more.

        Raises :class:`NoSlotError` when all slots are closed.
        """
        with self._change:
            while self._open == 0:
                if self._closed == self.number:
                    raise NoSlotError(f"{name} takes no calls now: earlier ones have not stopped")
                self._change.wait(POLL)
                if not wanted():
                    return None
            self._open -= 1
            return Slot(self)

    def count(self, slot: Slot, *, left: bool) -> None:
        """Keep the books, for :class:`Slot`."""
        with self._change:
            if left and not slot._over:
                slot._left = True
                self._closed += 1
            if not left and not slot._over:
                slot._over = True
                self._closed -= slot._left
                self._open += 1
            self._change.notify_all()
