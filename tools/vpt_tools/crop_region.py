"""Select a region and look again: the published region call, and boxes in pixels or 0 to 1000."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from vpt_agent.errors import ModelRetry
from vpt_agent.tool import GridBoxes, Norm1000Boxes, PixelBoxes, ToolContext, perception_tool
from vpt_agent.types import View
from vpt_agent.vision.frames import Frame, in_view

DEFAULT_GRID = 8
"""Cells a side where neither the call nor the model says (as published)."""


@perception_tool(timeout=30.0, licence="Apache-2.0")
def crop_region(
    context: ToolContext,
    region: GridBoxes | None = None,
    box: PixelBoxes | None = None,
    box_1000: Norm1000Boxes | None = None,
    grid: Literal[4, 8, 16, 32] | None = None,
    source: str | None = None,
) -> list[View]:
    """Look closer at one or more parts of a picture, at the picture's full resolution.

    Give exactly one of region, box and box_1000.

    Args:
        grid: cells of the region grid along each side, if not the model's own
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
    return [
        context.crop(view, in_view(values, frame, view, grid=cells, policy=context.regions))
        for values in boxes
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
