"""What a tool is, how one is defined, found and called. Loads no torch."""

from vpt_agent.errors import ModelRetry, ToolFailed
from vpt_agent.tool.access import Access
from vpt_agent.tool.arguments import ToolArguments
from vpt_agent.tool.boxes import (
    BoxFrame,
    GridBox,
    GridBoxes,
    Norm1000Box,
    Norm1000Boxes,
    PixelBox,
    PixelBoxes,
    PixelPoint,
    PixelPoints,
)
from vpt_agent.tool.call import call_error, execute, execute_batch
from vpt_agent.tool.context import (
    Cancelled,
    ControlState,
    Deadline,
    Files,
    FromContext,
    OriginalView,
    Rng,
    SourceView,
    ToolContext,
)
from vpt_agent.tool.define import FunctionTool, perception_tool
from vpt_agent.tool.output import ToolOutput, ToolReturn
from vpt_agent.tool.pool import Pending, Submitted, ToolPool
from vpt_agent.tool.registry import FailedTool, Installed, ToolRegistry, installed_tools
from vpt_agent.tool.spec import PerceptionTool
from vpt_agent.tool.written import (
    Written,
    WrittenCall,
    WrittenError,
    read_arguments,
    read_calls,
    settled,
)

__all__ = [
    "Access",
    "BoxFrame",
    "Cancelled",
    "ControlState",
    "Deadline",
    "FailedTool",
    "Files",
    "FromContext",
    "FunctionTool",
    "GridBox",
    "GridBoxes",
    "Installed",
    "ModelRetry",
    "Norm1000Box",
    "Norm1000Boxes",
    "OriginalView",
    "Pending",
    "PerceptionTool",
    "PixelBox",
    "PixelBoxes",
    "PixelPoint",
    "PixelPoints",
    "Rng",
    "SourceView",
    "Submitted",
    "ToolArguments",
    "ToolContext",
    "ToolFailed",
    "ToolOutput",
    "ToolPool",
    "ToolRegistry",
    "ToolReturn",
    "Written",
    "WrittenCall",
    "WrittenError",
    "call_error",
    "execute",
    "execute_batch",
    "installed_tools",
    "perception_tool",
    "read_arguments",
    "read_calls",
    "settled",
]
