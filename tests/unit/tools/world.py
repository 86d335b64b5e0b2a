"""Pictures and calls for the tests of the tools."""

from __future__ import annotations

from PIL import Image, ImageDraw

from vpt_agent.tool import PerceptionTool, ToolContext, execute
from vpt_agent.types import Box, ToolCall, ToolResult, View


def scene(size: tuple[int, int] = (200, 100)) -> Image.Image:
    """Grey, with a red square of 20 x 20 at (20, 30) and a blue one of 40 x 40 at (120, 40)."""
    image = Image.new("RGB", size, (128, 128, 128))
    draw = ImageDraw.Draw(image)
    draw.rectangle((20, 30, 39, 49), fill=(255, 0, 0))
    draw.rectangle((120, 40, 159, 79), fill=(0, 0, 255))
    return image


def view(image: Image.Image | None = None, id_: str = "image_1") -> View:
    """An original."""
    made = image or scene()
    return View(id_, made, id_, Box(0, 0, *made.size), made.size)


def context(*views: View) -> ToolContext:
    """What a call is given; the first view is the one to look at."""
    return ToolContext(views={v.id: v for v in views or (view(),)})


def call(
    tool: PerceptionTool, around: ToolContext | None = None, **arguments: object
) -> ToolResult:
    """A call as an agent makes it."""
    made = ToolCall("c1", tool.name, arguments, "json")
    return execute(tool, made, lambda: around or context())


def told(result: ToolResult) -> tuple[str, str]:
    """Kind and message of a call that failed."""
    assert result.error is not None, result.text
    assert result.views == ()
    return result.error.kind, result.error.message
