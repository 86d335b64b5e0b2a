"""Coordinate frames: the one module that converts between them.

| frame | means |
|---|---|
| ``grid`` | cells x_min, y_min, x_max, y_max of a k x k raster on a view, inclusive |
| ``norm1000`` | 0..1000 of a view's width and height |
| ``view`` | pixels of a view's own picture |
| ``original`` | pixels of the original picture, EXIF rotation applied |

Boxes are left, top, right, bottom; right and bottom are exclusive in all but the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

from vpt_agent.errors import ModelRetry, UserError
from vpt_agent.tokens.grid import Cells, RegionPolicy, box_to_region, region_to_box
from vpt_agent.types import Box, View

Frame = Literal["grid", "norm1000", "view", "original"]


def _scaled(box: Sequence[float], x: float, y: float) -> Box:
    return Box(box[0] * x, box[1] * y, box[2] * x, box[3] * y)


def to_original(box: Sequence[float], view: View) -> Box:
    """Pixels of ``view`` to pixels of its original."""
    x, y = view.box.width / view.size[0], view.box.height / view.size[1]
    left, top, right, bottom = _scaled(box, x, y)
    return Box(
        left + view.box.left, top + view.box.top, right + view.box.left, bottom + view.box.top
    )


def to_view(box: Sequence[float], view: View) -> Box:
    """Pixels of the original to pixels of ``view``; may lie outside it."""
    left, top, right, bottom = box
    moved = (left - view.box.left, top - view.box.top, right - view.box.left, bottom - view.box.top)
    return _scaled(moved, view.size[0] / view.box.width, view.size[1] / view.box.height)


def from_norm1000(box: Sequence[float], size: tuple[int, int]) -> Box:
    """0..1000 of a picture of ``size`` (width, height) to its pixels."""
    return Box(*(v * side / 1000 for v, side in zip(box, (*size, *size), strict=True)))


def to_norm1000(box: Sequence[float], size: tuple[int, int]) -> Box:
    """Pixels of a picture of ``size`` (width, height) to 0..1000 of it."""
    return Box(*(v * 1000 / side for v, side in zip(box, (*size, *size), strict=True)))


def in_view(
    values: Sequence[float],
    frame: Frame | str,
    view: View,
    *,
    grid: int = 8,
    policy: RegionPolicy = "published",
) -> Box:
    """Four numbers of any frame as pixels of ``view``. ``grid`` and ``policy`` are for cells."""
    if frame == "grid":
        return region_to_box([int(v) for v in values], view.size, grid, policy)
    if frame == "norm1000":
        return from_norm1000(values, view.size)
    if frame == "view":
        return Box(*values)
    if frame == "original":
        return to_view(values, view)
    raise UserError(f"unknown coordinate frame {frame}", expected=", ".join(get_args(Frame)))


def cells_of(box: Sequence[float], view: View, *, grid: int = 8) -> Cells:
    """The smallest region on ``view`` whose cells hold ``box`` (pixels of the view)."""
    return box_to_region(box, view.size, grid)


def clamp(box: Sequence[float], size: tuple[int, int], *, at_least: int = 1) -> Box:
    """The part of ``box`` inside a picture of ``size`` (width, height), in whole pixels outwards.

    The box may come from a model, so what cannot be looked at is a :class:`ModelRetry`: no numbers
    or edges in the wrong order (``invalid_arguments``), nothing inside the picture
    (``box_outside``), fewer than ``at_least`` pixels a side (``box_too_small``).
    """
    said = ", ".join(f"{v:g}" for v in box)
    if not all(math.isfinite(v) for v in box) or box[0] > box[2] or box[1] > box[3]:
        raise ModelRetry(f"box [{said}] is not left, top, right, bottom with left <= right")
    width, height = size
    if box[0] == box[2] or box[1] == box[3]:
        raise ModelRetry(f"box [{said}] has no area", "box_too_small")
    if box[0] >= width or box[1] >= height or box[2] <= 0 or box[3] <= 0:
        raise ModelRetry(
            f"box [{said}] lies outside the picture of {width} x {height} pixels", "box_outside"
        )
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
    if right - left < at_least or bottom - top < at_least:
        raise ModelRetry(
            f"box [{said}] covers {right - left} x {bottom - top} pixels; at least "
            f"{at_least} x {at_least} are needed",
            "box_too_small",
        )
    return Box(left, top, right, bottom)


def crop_view(
    view: View,
    box: Sequence[float],
    *,
    id: str,
    origin: str = "crop",
    root: View | None = None,
    at_least: int = 1,
) -> View:
    """Look closer: the part of ``view`` in ``box`` (its pixels), at the original's resolution.

    The new view knows its box in the original. A view that was resized after cropping no longer
    holds the original's pixels: then pass ``root``, the view of the original. Boxes are clamped to
    the view (see :func:`clamp` for what is refused).
    """
    inside = clamp(box, view.size, at_least=at_least)
    if root is None:
        if view.size[0] != view.box.width or view.size[1] != view.box.height:
            raise UserError(
                "this view was resized, so a crop of it needs the original picture",
                where=view.id,
                got=f"{view.size} for {view.box.width:g} x {view.box.height:g} original pixels",
                fix="pass root=, the view of the original",
            )
        root = view
    elif (root.id, root.size) != (view.root, view.root_size):
        raise UserError(
            "this is not the original of the view",
            where=view.id,
            got=f"{root.id} {root.size}",
            expected=f"{view.root} {view.root_size}",
        )
    # 6 decimals: the noise of a division must not cost a row of pixels.
    whole = clamp([round(v, 6) for v in to_original(inside, view)], view.root_size)
    left, top, right, bottom = (int(v) for v in to_view(whole, root))
    return View(
        id=id,
        image=root.image.crop((left, top, right, bottom)),
        root=view.root,
        box=whole,
        root_size=view.root_size,
        parent=view.id,
        origin=origin,
    )
