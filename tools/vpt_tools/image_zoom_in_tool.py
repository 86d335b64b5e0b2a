"""Zoom in by the name and the arguments that Qwen's and DeepEyes' models were trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from PIL import Image
from pydantic import Field

from vpt_agent.errors import ModelRetry
from vpt_agent.tool import PerceptionTool, PixelBox, ToolArguments, ToolContext, ToolOutput
from vpt_agent.types import Box, View
from vpt_agent.vision.frames import clamp

LEAST_SIDE = 28
"""Pixels: a smaller box is widened to it, as these models' own environments do."""

LEAST_AREA = 448 * 448
"""Pixels of what is shown: 256 visual tokens of 28 x 28. Smaller crops are enlarged to it."""

MOST_TIMES = 8.0


class ZoomArguments(ToolArguments):
    """``bbox_2d`` and ``label`` are DeepEyes' names, ``img_idx`` is Qwen-Agent's."""

    bbox_2d: PixelBox
    label: str | None = Field(default=None, description="what is in the box")
    img_idx: int | None = Field(
        default=None, description="number of the picture, 0 for the first; in place of source"
    )
    source: str | None = Field(
        default=None, description="id of the picture to look at; the latest one by default"
    )


class ImageZoomIn(PerceptionTool):
    """Zoom in on the part of a picture inside a box, to see small things better."""

    name = "image_zoom_in_tool"
    arguments = ZoomArguments
    needs = frozenset({"view"})
    timeout = 30.0
    concurrency = 4
    licence = "Apache-2.0"

    def source_of(self, arguments: Mapping[str, object], views: Sequence[str]) -> object:
        """``source``, or the view that ``img_idx`` counts to."""
        source, number = arguments.get("source"), arguments.get("img_idx")
        if source is not None or number is None:
            return source
        if isinstance(number, str) and number.strip().isdecimal():
            number = int(number)
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(views):
            return views[number]
        return f"img_idx {number}"

    def run(self, arguments: ZoomArguments, context: ToolContext) -> ToolOutput:
        """The crop, enlarged if it is small; it knows its box in the original."""
        view = context.require_view()
        if arguments.source is not None and arguments.img_idx is not None:
            ids = tuple(context.views)
            if self.source_of({"img_idx": arguments.img_idx}, ids) != arguments.source:
                raise ModelRetry("source and img_idx name different pictures: give one of them")
        crop = context.crop(view, widened(arguments.bbox_2d, view.size))
        metadata = {} if arguments.label is None else {"label": arguments.label}
        return ToolOutput(views=[enlarged(crop)], metadata=metadata)


def widened(box: Sequence[float], size: tuple[int, int]) -> Box:
    """``box`` with sides of at least 28 pixels around its middle, inside a picture of ``size``.

    A box without area is a point to look at. Raises :class:`ModelRetry` for a box outside.
    """
    left, top, right, bottom = box
    if left == right or top == bottom:
        # A line is no error here, but it has to lie in the picture.
        left, right = (left - 0.5, right + 0.5) if left == right else (left, right)
        top, bottom = (top - 0.5, bottom + 0.5) if top == bottom else (top, bottom)
    inside = clamp((left, top, right, bottom), size)
    x = _at_least(inside.left, inside.right, size[0])
    y = _at_least(inside.top, inside.bottom, size[1])
    return Box(x[0], y[0], x[1], y[1])


def _at_least(low: float, high: float, most: int) -> tuple[float, float]:
    side = min(LEAST_SIDE, most)
    if high - low >= side:
        return low, high
    begin = min(max(0.0, (low + high - side) // 2), most - side)
    return begin, begin + side


def enlarged(crop: View) -> View:
    """The same part of the original in enough pixels to be looked at."""
    width, height = crop.size
    times = min((LEAST_AREA / (width * height)) ** 0.5, MOST_TIMES)
    if times <= 1:
        return crop
    size = (max(1, round(width * times)), max(1, round(height * times)))
    return replace(crop, image=crop.image.resize(size, Image.Resampling.BICUBIC))


image_zoom_in_tool = ImageZoomIn()
