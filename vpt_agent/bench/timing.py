"""Timing two procedures in turn, and saying how far the figures can be trusted.

The machine may be busy with other things: what counts is the median of ratios of neighbours in
time. One thread of a CPU is measured in CPU time of the process, which does not count waiting for
other processes; several threads and GPUs by the clock on the wall. Both stand in the figures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from vpt_agent.errors import UserError

Procedure = Callable[[], object]
Timer = Literal["cpu", "wall"]


def timer_for(device: torch.device) -> Timer:
    """The clock that counts on ``device``, with torch's threads as they are now."""
    return "cpu" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


@dataclass(frozen=True)
class Spread:
    """Median, and the smallest and largest value, of ``count`` measurements."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        if not values:
            raise UserError("there is nothing to take a median of", where="Spread")
        return cls(statistics.median(values), min(values), max(values), len(values))

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Sample:
    """One run: seconds on the wall, and of CPU time over all threads of the process."""

    wall: float
    cpu: float

    def by(self, timer: Timer) -> float:
        """Seconds by the clock that counts."""
        return self.wall if timer == "wall" else self.cpu


def timed(procedure: Procedure, device: torch.device | None = None) -> Sample:
    """Run once; on a GPU, until all that was launched is done."""
    _settle(device)
    wall, cpu = time.perf_counter(), time.process_time()
    procedure()
    _settle(device)
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def _settle(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turn(
    procedures: Mapping[str, Procedure],
    *,
    repeats: int,
    warmup: int = 1,
    device: torch.device | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Sample]]:
    """Run all ``repeats`` times, one after another and every second round backwards.

    ``warmup`` rounds before that are not counted.
    """
    if repeats < 1:
        raise UserError("a measurement needs a repeat", where="in_turn", got=repeats)
    found: dict[str, list[Sample]] = {name: [] for name in procedures}
    for number in range(-warmup, repeats):
        names = list(procedures)
        for name in names if number % 2 else reversed(names):
            sample = timed(procedures[name], device)
            if number >= 0:
                found[name].append(sample)
        tell(f"round {number + 1} of {repeats}" if number >= 0 else "warming up")
    return found


def ratios(slow: Sequence[Sample], fast: Sequence[Sample]) -> dict[str, Any]:
    """How many times faster ``fast`` is, pair by pair: by the wall and by CPU time."""
    pairs = list(zip(slow, fast, strict=True))
    return {
        "wall": Spread.of([a.wall / b.wall for a, b in pairs]).to_dict(),
        "cpu": Spread.of([a.cpu / max(b.cpu, 1e-9) for a, b in pairs]).to_dict(),
    }


def spreads(samples: Sequence[Sample]) -> dict[str, Any]:
    """Seconds by the wall and of CPU time."""
    return {
        "wall": Spread.of([s.wall for s in samples]).to_dict(),
        "cpu": Spread.of([s.cpu for s in samples]).to_dict(),
    }
