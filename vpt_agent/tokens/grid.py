"""Cells of a region grid and pixel boxes, in both directions.

A region names the cells ``x_min, y_min, x_max, y_max`` (all inclusive) of a ``grid`` x ``grid``
raster laid over a picture: x counts columns from the left, y rows from the top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from vpt_agent.errors import UserError
from vpt_agent.types import Box

RegionPolicy = Literal["published", "cover"]
"""How cells become pixels: ``published`` widens by one cell on each side and truncates, ``cover``
takes exactly the cells, rounded outwards to whole pixels."""


class Cells(NamedTuple):
    """A region in cells of a grid; all four are inclusive."""

    x_min: int
    y_min: int
    x_max: int
    y_max: int


def check_cells(cells: Sequence[int], grid: int) -> Cells:
    """``cells`` as :class:`Cells`, or a :class:`UserError` if they are no region of this grid."""
    whole = len(cells) == 4 and all(type(c) is int for c in cells)
    if whole and 0 <= cells[0] <= cells[2] < grid and 0 <= cells[1] <= cells[3] < grid:
        return Cells(*cells)
    raise UserError(
        "this is no region of the grid",
        got=list(cells),
        expected=f"[x_min, y_min, x_max, y_max], whole numbers 0..{grid - 1}, min <= max",
    )


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise UserError("a picture has at least one pixel", got=size, expected="(width, height)")


def _span(low: int, high: int, side: int, grid: int, policy: RegionPolicy) -> tuple[int, int]:
    if policy == "published":
        low, high = max(low - 1, 0), min(high + 1, grid - 1)
        return low * side // grid, (high + 1) * side // grid
    return low * side // grid, -(-(high + 1) * side // grid)


def region_to_box(
    cells: Sequence[int],
    size: tuple[int, int],
    grid: int = 8,
    policy: RegionPolicy = "published",
    *,
    non_empty: bool = True,
) -> Box:
    """The pixels of a region, as a :class:`Box` of whole numbers in the picture of ``size``.

    ``size`` is (width, height); ``cells`` as in :class:`Cells`. ``published`` is the rule of the
    released evaluation: one cell of margin on each side inside the grid, edges truncated. In a
    picture smaller than the grid it can give a box without area; ``non_empty`` then takes the one
    pixel at its edge (False: as published). ``cover`` always holds a pixel.
    """
    x_min, y_min, x_max, y_max = check_cells(cells, grid)
    _check_size(size)
    left, right = _span(x_min, x_max, size[0], grid, policy)
    top, bottom = _span(y_min, y_max, size[1], grid, policy)
    if non_empty:
        # An edge that starts the span lies below the last pixel, so one more is always inside.
        right, bottom = max(right, left + 1), max(bottom, top + 1)
    return Box(left, top, right, bottom)


def box_to_region(box: Sequence[float], size: tuple[int, int], grid: int = 8) -> Cells:
    """The smallest region whose cells hold ``box`` (pixels of the picture of ``size``).

    Exact for fractions of pixels too. ``region_to_box(..., policy="cover")`` of it contains
    ``box``; ``published`` contains it if its edges are whole pixels. A box that is empty or leaves
    the picture is a :class:`UserError`.
    """
    _check_size(size)
    left, top, right, bottom = box
    width, height = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise UserError(
            "a box is empty or leaves the picture",
            got=tuple(box),
            expected=f"left < right within 0..{width}, top < bottom within 0..{height}",
        )

    def first(edge: float, side: int) -> int:
        return math.floor(Fraction(edge) * grid / side)

    def last(edge: float, side: int) -> int:
        return math.ceil(Fraction(edge) * grid / side) - 1

    return Cells(first(left, width), first(top, height), last(right, width), last(bottom, height))


def enclosing(xs: Iterable[int], ys: Iterable[int]) -> Cells | None:
    """The region that coordinates in any order, with gaps and repeats, stand for.

    As the published reader: the smallest and largest of each. None if either is missing.
    """
    columns, rows = list(xs), list(ys)
    if not columns or not rows:
        return None
    return Cells(min(columns), min(rows), max(columns), max(rows))
