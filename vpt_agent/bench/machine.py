"""What the machine is, and what it can do: bytes and operations a second, measured here and now."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from vpt_agent.bench.timing import timed, timer_for

STREAM_BYTES = 256 * 2**20
"""Far more than the caches hold."""


@dataclass(frozen=True)
class Machine:
    """Where a measurement was made."""

    processor: str
    cpus: int
    threads: int
    device: str
    system: str
    python: str
    torch: str
    transformers: str
    load: float  # processes that wanted a CPU, one-minute mean, when the measurement began

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe(device: torch.device) -> Machine:
    """This machine, without its name."""
    return Machine(
        processor=_processor(),
        cpus=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0,
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Rates:
    """Bytes a second that one reading of a large matrix reaches, and operations a second of a
    product of matrices that fit, both in ``dtype``. A multiply-add counts as two operations."""

    dtype: str
    bytes_per_second: float
    flops_per_second: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_rates(
    dtype: torch.dtype, device: torch.device, *, repeats: int = 7, stream: int = STREAM_BYTES
) -> Rates:
    """The best of ``repeats``: a limit is what the machine can do when nothing disturbs it.

    ``stream`` bytes are read. Bandwidth is that of reading (a matrix times a vector, or a sum where
    that is faster): decoding reads weights and writes next to nothing.
    """
    with torch.inference_mode():
        rows = stream // dtype.itemsize // 4096
        matrix = torch.randn(rows, 4096, device=device).to(dtype)
        vector = torch.randn(4096, device=device).to(dtype)
        reads: list[Callable[[], Tensor]] = [
            lambda: torch.mv(matrix, vector),
            lambda: functional.linear(vector[None], matrix),
        ]
        seconds = min(_best(read, device, repeats) for read in reads)
        side = 4096 if device.type == "cuda" else 1024
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = _best(lambda: torch.mm(a, b), device, repeats)
    read_bytes = matrix.numel() * matrix.element_size()
    name = str(dtype).removeprefix("torch.")
    return Rates(name, read_bytes / seconds, 2 * side**3 / product)


def _best(procedure: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    samples = [timed(procedure, device) for _ in range(repeats + 1)][1:]
    return min(s.by(timer_for(device)) for s in samples)


@contextmanager
def threads(count: int) -> Generator[None, None, None]:
    """Inside, torch computes with ``count`` threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stamp() -> str:
    """The time of a measurement: UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
