"""A perception tool: how bright a part of a picture is."""

from __future__ import annotations

from PIL import ImageStat

from vpt_agent import ModelRetry, ToolContext, ToolOutput, perception_tool
from vpt_agent.tool import PixelBox


@perception_tool(timeout=10.0, licence="Apache-2.0")
def brightness(
    context: ToolContext, box: PixelBox | None = None, source: str | None = None
) -> ToolOutput:
    """Say how bright a part of a picture is, from 0 (black) to 255 (white), and show that part.

    Args:
        box: the part, [left, top, right, bottom] in pixels of the source view; all of it by default
        source: id of the picture to look at; the latest one by default
    """
    view = context.require_view()
    part = view if box is None else context.crop(view, box)
    if min(part.size) < 4:
        # The model reads this line and may call again.
        raise ModelRetry("the box is too small to judge: at least 4 pixels a side", "box_too_small")
    mean = round(ImageStat.Stat(part.image.convert("L")).mean[0])
    return ToolOutput(
        text=f"brightness {mean} of 255",
        views=[] if part is view else [part],
        structured={"brightness": mean},
        metadata={"pixels": part.size[0] * part.size[1]},  # for the trace: no model sees it
    )
