"""The implementations besides the plain ones; importing this registers them.

Which one runs is torch's dispatcher's choice by device, never a fallback: one that fails raises.
Triton is found, not imported, until a kernel of its runs.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec

# The operators must be defined before anything is added to them.
from vpt_agent.kernels import attend, condition, look, place, project, splice  # noqa: F401
from vpt_agent.kernels.look_cpu import look_cpu, pixels_cpu
from vpt_agent.kernels.registry import Kernel, register_kernel
from vpt_agent.kernels.rows_cpu import condition_backward_cpu, condition_cpu, place_cpu

CPU: tuple[tuple[str, str, Kernel], ...] = (
    ("look", "direct", look_cpu),
    ("pixels", "direct", pixels_cpu),
    ("condition", "runs", condition_cpu),
    ("condition_backward", "runs", condition_backward_cpu),
    ("place", "runs", place_cpu),
)
TRITON = (
    ("look", "look_triton", "look_triton"),
    ("pixels", "look_triton", "pixels_triton"),
    ("condition", "rows_triton", "condition_triton"),
    ("condition_backward", "rows_triton", "condition_backward_triton"),
    ("project", "rows_triton", "project_triton"),
    ("splice", "rows_triton", "splice_triton"),
    ("place", "rows_triton", "place_triton"),
    ("attend", "attend_triton", "attend_triton"),
)
"""Operator, module, function."""


def _late(module: str, function: str) -> Kernel:
    """``function`` of a module of this package, imported when it is first called."""

    def kernel(*args: object) -> object:
        return getattr(importlib.import_module(f"vpt_agent.kernels.{module}"), function)(*args)

    return kernel


for _op, _name, _kernel in CPU:
    register_kernel(_op, "cpu", _name)(_kernel)
if find_spec("triton") is not None:
    for _op, _module, _function in TRITON:
        register_kernel(_op, "cuda", "triton")(_late(_module, _function))
