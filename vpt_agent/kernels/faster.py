"""The implementations besides the plain ones; importing this registers them.

Which one runs is torch's dispatcher's choice by device, never a fallback: one that fails raises.
"""

from __future__ import annotations

# The operators must be defined before anything is added to them.
from vpt_agent.kernels import condition, look, splice  # noqa: F401
from vpt_agent.kernels.look_cpu import look_cpu, pixels_cpu
from vpt_agent.kernels.registry import register_kernel

register_kernel("look", "cpu", "direct")(look_cpu)
register_kernel("pixels", "cpu", "direct")(pixels_cpu)
