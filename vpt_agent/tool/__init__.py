"""What a tool is, how one is defined, found and called. Loads no torch."""

from vpt_agent.errors import ModelRetry, ToolFailed
from vpt_agent.tool.arguments import ToolArguments
from vpt_agent.tool.boxes import (
    GridBox,
    GridBoxes,
    Norm1000Box,
    Norm1000Boxes,
    PixelBox,
    PixelBoxes,
)
from vpt_agent.tool.call import call_error, execute, execute_batch
from vpt_agent.tool.context import ToolContext
from vpt_agent.tool.define import FunctionTool, perception_tool
from vpt_agent.tool.output import ToolOutput, ToolReturn
from vpt_agent.tool.registry import FailedTool, ToolRegistry
from vpt_agent.tool.spec import PerceptionTool

__all__ = [
    "FailedTool",
    "FunctionTool",
    "GridBox",
    "GridBoxes",
    "ModelRetry",
    "Norm1000Box",
    "Norm1000Boxes",
    "PerceptionTool",
    "PixelBox",
    "PixelBoxes",
    "ToolArguments",
    "ToolContext",
    "ToolFailed",
    "ToolOutput",
    "ToolRegistry",
    "ToolReturn",
    "call_error",
    "execute",
    "execute_batch",
    "perception_tool",
]
