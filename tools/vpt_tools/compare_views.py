"""Two regions side by side, of one picture or of two."""

from __future__ import annotations

from typing import Annotated

from PIL import Image, ImageChops, ImageDraw, ImageStat

from vpt_agent.errors import ModelRetry
from vpt_agent.tool import BoxFrame, PixelBox, ToolContext, ToolOutput, perception_tool
from vpt_agent.types import Box, View
from vpt_tools import _draw

LEAST_HEIGHT, MOST_HEIGHT, MOST_WIDTH = 224, 1024, 2048
"""Pixels of the panels: small regions are enlarged, large ones made smaller."""

GAP = 8

SecondBox = Annotated[PixelBox, BoxFrame("view", source="second_source")]


@perception_tool(timeout=30.0, licence="Apache-2.0")
def compare_views(
    context: ToolContext,
    first: PixelBox | None = None,
    second: SecondBox | None = None,
    second_source: str | None = None,
    difference: bool = False,
    source: str | None = None,
) -> ToolOutput:
    """Show two parts of a picture, or of two pictures, side by side.

    A box that is left out means the whole picture.

    Args:
        second_source: id of the view of the second part; that of the first by default
        difference: show and tell how far the two differ, too
        source: id of the view of the first part; the latest picture by default
    """
    one = context.require_view()
    other = one if second_source is None else context.looking_at(second_source).require_view()
    if one.id == other.id and first == second:
        raise ModelRetry("there is nothing to compare: both parts are the same; give other boxes")
    left, right = _part(context, one, first), _part(context, other, second)
    panels = _panels(left.image, right.image)
    told = [
        f"1 (left): {_place(left)}",
        f"2 (right): {_place(right)}",
    ]
    structured: dict[str, object] = {
        "first": {"of": left.root, "box": list(left.box)},
        "second": {"of": right.root, "box": list(right.box)},
    }
    if difference:
        changed = ImageChops.difference(panels[0], panels[1].resize(panels[0].size))
        mean = sum(ImageStat.Stat(changed).mean) / 3
        panels.append(changed)
        told.append(f"3: how far they differ; on average {mean:.1f} of 255")
        structured["mean_difference"] = round(mean, 3)
    return ToolOutput(views=[_beside(panels)], text="\n".join(told), structured=structured)


def _part(context: ToolContext, view: View, box: list[float] | None) -> View:
    return context.crop(view, Box(0, 0, *view.size) if box is None else Box(*box))


def _place(part: View) -> str:
    box = ", ".join(f"{value:g}" for value in part.box)
    return f"[{box}] of {part.root}"


def _panels(left: Image.Image, right: Image.Image) -> list[Image.Image]:
    """Both at one height, narrow enough to stand side by side three times."""
    height = min(max(left.height, right.height, LEAST_HEIGHT), MOST_HEIGHT)
    widest = max(image.width / image.height for image in (left, right))
    height = max(28, min(height, int(MOST_WIDTH / 3 / widest)))
    return [
        image.resize((_width(image, height), height),
                     Image.Resampling.BICUBIC)
        for image in (left, right)
    ]  # fmt: skip


def _width(image: Image.Image, height: int) -> int:
    """Its width at a height; what is very wide is squeezed."""
    return min(max(1, round(image.width * height / image.height)), MOST_WIDTH // 3)


def _beside(panels: list[Image.Image]) -> Image.Image:
    """The panels in a row, numbered, with white between them."""
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    letters = _draw.font((width, panels[0].height))
    head = round(letters.getbbox("0")[3]) + 8
    canvas = Image.new("RGB", (width, panels[0].height + head), "white")
    draw, x = ImageDraw.Draw(canvas), 0
    for number, panel in enumerate(panels, 1):
        canvas.paste(panel, (x, head))
        draw.text((x + 2, 2), str(number), fill="black", font=letters)
        x += panel.width + GAP
    return canvas
