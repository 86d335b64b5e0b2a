"""Where the time goes: seconds by name, measured around calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from vpt_agent.bench.timing import Timer


@dataclass
class Clock:
    """Seconds by name. What is measured inside a measurement is taken out of the outer one
    (of the same thread).

    ``device``: on a GPU each measurement waits for what was launched, so a run under the clock is
    slower than one without. ``timer`` cpu counts CPU time of the process.
    """

    device: torch.device | None = None
    timer: Timer = "wall"
    seconds: dict[str, float] = field(default_factory=dict)
    _local: threading.local = field(default_factory=threading.local)

    def now(self) -> float:
        """Seconds since some moment."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() if self.timer == "wall" else time.process_time()

    @contextmanager
    def measure(self, name: str) -> Generator[None, None, None]:
        """Count the time inside to ``name``."""
        inner: list[float] = self._local.__dict__.setdefault("inner", [])
        inner.append(0.0)
        began = self.now()
        try:
            yield
        finally:
            spent = self.now() - began
            self.add(name, spent - inner.pop())
            if inner:
                inner[-1] += spent

    def add(self, name: str, seconds: float) -> None:
        """Count ``seconds`` to ``name``."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
