"""vpt_agent: a multimodal LLM that controls its own eyes.

The public names come on first use, so ``import vpt_agent`` is fast and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpt_agent.agent import PerceptionAgent
    from vpt_agent.errors import ModelRetry, ToolFailed
    from vpt_agent.tool import (
        PerceptionTool,
        ToolContext,
        ToolOutput,
        ToolRegistry,
        perception_tool,
    )
    from vpt_agent.trace import Trace
    from vpt_agent.types import Answer, Box, Limits, View

__version__ = "0.1.0"

_HOMES = {
    "PerceptionAgent": "agent",
    "ModelRetry": "errors",
    "ToolFailed": "errors",
    "PerceptionTool": "tool",
    "ToolContext": "tool",
    "ToolOutput": "tool",
    "ToolRegistry": "tool",
    "perception_tool": "tool",
    "Trace": "trace",
    "Answer": "types",
    "Box": "types",
    "Limits": "types",
    "View": "types",
}

__all__ = [
    "Answer",
    "Box",
    "Limits",
    "ModelRetry",
    "PerceptionAgent",
    "PerceptionTool",
    "ToolContext",
    "ToolFailed",
    "ToolOutput",
    "ToolRegistry",
    "Trace",
    "View",
    "__version__",
    "perception_tool",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
