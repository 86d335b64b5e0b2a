"""Features begun before they are asked for, beside the model's own work.

A call of DINO or SAM needs the picture and nothing else, so its tower can start when the call has
only begun, or when it is known that one will come. On a GPU it runs on a stream of its own; on a
CPU on a thread, where torch has more than one (on one nothing is gained: the tower and the model
would take turns). Results are the same: the same computation on the same picture, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

MOST = 8
"""Pictures, at most, whose features were begun and not asked for yet."""


@dataclass(frozen=True)
class Done(Generic[T]):
    """What was computed early: in ``seconds``, of which nobody waited for ``hidden``; ``early``
    seconds lie between its beginning and the moment when it was asked for."""

    found: T
    seconds: float
    early: float
    hidden: float


@dataclass(frozen=True)
class _Computed(Generic[T]):
    found: T
    seconds: float
    event: Any = None  # of the side stream


@dataclass(frozen=True)
class Begun(Generic[T]):
    """Something on its way, since the moment ``began``."""

    future: Future[_Computed[T]]
    began: float

    @property
    def ready(self) -> bool:
        """Whether it needs no waiting."""
        return self.future.done()


class Early:
    """Begins computations on ``device`` beside others. ``wanted`` None: where it can gain."""

    def __init__(self, device: torch.device, *, wanted: bool | None = None) -> None:
        self.device, self.wanted = device, wanted
        self._pool: ThreadPoolExecutor | None = None
        self._stream: Any = None

    @property
    def works(self) -> bool:
        """Whether anything is begun early."""
        if self.wanted is not None:
            return self.wanted
        return self.device.type == "cuda" or torch.get_num_threads() > 1

    def begin(self, compute: Callable[[], T]) -> Begun[T]:
        """Start ``compute``. What it raises is told by :meth:`take`."""
        began = time.perf_counter()
        if self.device.type == "cuda":
            # Launched from here: another thread's work would disturb a graph that is recorded.
            future: Future[_Computed[T]] = Future()
            try:
                future.set_result(self._on_stream(compute))
            except Exception as error:
                future.set_exception(error)
            return Begun(future, began)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="early")
        return Begun(self._pool.submit(_measured, compute), began)

    def _on_stream(self, compute: Callable[[], T]) -> _Computed[T]:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        began = time.perf_counter()
        with torch.cuda.stream(self._stream):
            found = compute()
            event = torch.cuda.Event()
            event.record(self._stream)
        return _Computed(found, time.perf_counter() - began, event)

    def close(self) -> None:
        """Stop the thread, behind what was begun; a later :meth:`begin` starts another one."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None

    def take(self, begun: Begun[T]) -> Done[T] | None:
        """What was begun, once it is there; None if it failed: computing it again says why.

        On a GPU the current stream waits for it, not the host; the seconds are those of launching.
        """
        asked = time.perf_counter()
        if begun.future.exception() is not None:  # waits
            return None
        made = begun.future.result()
        waited = time.perf_counter() - asked
        if made.event is not None:
            torch.cuda.current_stream(self.device).wait_event(made.event)
        return Done(made.found, made.seconds, asked - begun.began, max(0.0, made.seconds - waited))


def _measured(compute: Callable[[], T]) -> _Computed[T]:
    began = time.perf_counter()
    with torch.inference_mode():
        found = compute()
    return _Computed(found, time.perf_counter() - began)
