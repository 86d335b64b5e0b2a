"""Select a region and look again: the published region call, and boxes in pixels or 0 to 1000."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field

from vpt_agent.errors import ModelRetry
from vpt_agent.tool import (
    GridBoxes,
    Norm1000Boxes,
    PixelBoxes,
    ToolContext,
    ToolOutput,
    ToolReturn,
    perception_tool,
)
from vpt_agent.types import View
from vpt_agent.vision.frames import Frame, in_view

DEFAULT_GRID = 8
"""Cells a side where neither the call nor the model says (as published)."""


MOST_PIXELS = 16_000_000
"""Pixels that the enlarged crops of a call may have, all together."""


@perception_tool(timeout=30.0, licence="Apache-2.0", version=2)
def crop_region(
    context: ToolContext,
    region: GridBoxes | None = None,
    box: PixelBoxes | None = None,
    box_1000: Norm1000Boxes | None = None,
    grid: Literal[4, 8, 16, 32] | None = None,
    rotate: Literal[0, 90, 180, 270] | None = None,
    enlarge: Annotated[float, Field(ge=1, le=8)] | None = None,
    source: str | None = None,
) -> ToolReturn:
    """Look closer at one or more parts of a picture, at the picture's full resolution.

    Give exactly one of region, box and box_1000.

    Args:
        grid: cells of the region grid along each side, if not the model's own
        rotate: degrees by which to turn what is cut out, clockwise
        enlarge: how many times larger to show it, 1 to 8
        source: id of the view to look at; the latest picture by default
    """
    view = context.require_view()
    given: dict[Frame, Sequence[Sequence[float]] | None] = {
        "grid": region,
        "view": box,
        "norm1000": box_1000,
    }
    named = [(frame, boxes) for frame, boxes in given.items() if boxes is not None]
    if len(named) != 1:
        raise ModelRetry(f"give exactly one of region, box, box_1000; {len(named)} were given")
    frame, boxes = named[0]
    cells = grid or _grid(context)
    for values in boxes:
        _check(values, frame, cells)
    crops = [
        context.crop(view, in_view(values, frame, view, grid=cells, policy=context.regions))
        for values in boxes
    ]
    crops = _enlarged(crops, enlarge or 1.0)
    if not rotate:
        return crops
    # A turned picture has frames of its own: boxes on it mean its own pixels.
    said = "; ".join(f"[{', '.join(f'{v:g}' for v in crop.box)}]" for crop in crops)
    return ToolOutput(
        views=[crop.image.transpose(_TURNS[rotate]) for crop in crops],
        text=f"Turned {rotate} degrees clockwise; cut from {said} of {view.root}.",
        metadata={"boxes": [list(crop.box) for crop in crops], "of": view.root, "rotate": rotate},
    )


# What was trained with the first version was trained with this one: it lacked rotate and enlarge.
crop_region.takes_calls_of = {
    "crop_region@1": "f923a8925c8cfcff475139177b616d0a65aefc811c6d4d5411f7f63d9654bb87"
}

_TURNS = {
    90: Image.Transpose.ROTATE_270,  # Pillow turns the other way
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_90,
}


def _enlarged(crops: Sequence[View], factor: float) -> list[View]:
    """The same parts of the original in more pixels."""
    sizes = [
        (max(1, round(w * factor)), max(1, round(h * factor))) for w, h in (c.size for c in crops)
    ]
    pixels = sum(w * h for w, h in sizes)
    if factor > 1 and pixels > MOST_PIXELS:
        most = (MOST_PIXELS / sum(w * h for w, h in (c.size for c in crops))) ** 0.5
        shown = " + ".join(f"{w} x {h}" for w, h in sizes[:3]) + (" + ..." if sizes[3:] else "")
        raise ModelRetry(f"enlarge={factor:g} makes {shown} pixels; at most {max(1.0, most):.1f}")
    return [
        crop
        if size == crop.size
        else replace(crop, image=crop.image.resize(size, Image.Resampling.BICUBIC))
        for crop, size in zip(crops, sizes, strict=True)
    ]


def _grid(context: ToolContext) -> int:
    """Cells a side: the row that was called, else the model's grid row, else as published."""
    rows = [context.kind] if context.kind is not None else list(context.kinds.values())
    return next((row.grid for row in rows if row.payload == "grid"), DEFAULT_GRID)


def _check(values: Sequence[float], frame: Frame, grid: int) -> None:
    """What :func:`vpt_agent.vision.frames.clamp` cannot see in pixels."""
    low, high = min(values), max(values)
    if frame == "grid":
        if low < 0 or high >= grid:
            raise ModelRetry(
                f"region {values} leaves the grid: cells are 0 to {grid - 1}", "box_outside"
            )
        if values[0] > values[2] or values[1] > values[3]:
            raise ModelRetry(f"region {values} is not x_min, y_min, x_max, y_max with min <= max")
    if frame == "norm1000" and (low < 0 or high > 1000):
        raise ModelRetry(f"box_1000 {values} leaves the view: 0 to 1000", "box_outside")
