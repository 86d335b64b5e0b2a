"""Region cells and pixel boxes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpt_agent.errors import UserError
from vpt_agent.tokens import Cells, box_to_region, check_cells, region_to_box
from vpt_agent.tokens.grid import enclosing
from vpt_agent.types import Box

GRIDS = st.sampled_from([4, 8, 16, 32])
SIDES = st.integers(1, 5000)


@st.composite
def pixel_boxes(draw: st.DrawFn) -> tuple[Box, tuple[int, int]]:
    width, height = draw(SIDES), draw(SIDES)
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right = draw(st.integers(left + 1, width))
    bottom = draw(st.integers(top + 1, height))
    return Box(left, top, right, bottom), (width, height)


@st.composite
def regions(draw: st.DrawFn) -> tuple[Cells, int]:
    grid = draw(GRIDS)
    x, y = (sorted(draw(st.tuples(*[st.integers(0, grid - 1)] * 2))) for _ in range(2))
    return Cells(x[0], y[0], x[1], y[1]), grid


def _contains(outer: Box, inner: Box) -> bool:
    return (
        outer.left <= inner.left
        and outer.top <= inner.top
        and outer.right >= inner.right
        and outer.bottom >= inner.bottom
    )


@given(pixel_boxes(), GRIDS, st.sampled_from(["published", "cover"]))
def test_the_region_of_a_box_holds_the_box(
    case: tuple[Box, tuple[int, int]], grid: int, policy: str
) -> None:
    box, size = case
    cells = box_to_region(box, size, grid)
    assert check_cells(cells, grid) == cells
    assert _contains(region_to_box(cells, size, grid, policy), box)  # type: ignore[arg-type]


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_min=True), SIDES, SIDES, GRIDS)
def test_cover_holds_boxes_between_pixels(a: float, b: float, w: int, h: int, grid: int) -> None:
    left, right = min(a, b) * w, max(a, b) * w
    if not 0 <= left < right <= w:
        return
    box = Box(left, 0, right, h)
    assert _contains(region_to_box(box_to_region(box, (w, h), grid), (w, h), grid, "cover"), box)


@given(regions(), SIDES, SIDES, st.sampled_from(["published", "cover"]))
def test_a_region_is_a_box_with_area_inside_the_picture(
    case: tuple[Cells, int], w: int, h: int, policy: str
) -> None:
    cells, grid = case
    box = region_to_box(cells, (w, h), grid, policy)  # type: ignore[arg-type]
    assert 0 <= box.left < box.right <= w
    assert 0 <= box.top < box.bottom <= h
    assert all(type(edge) is int for edge in box)


@given(regions(), st.integers(1, 200), st.integers(1, 200))
def test_cover_is_undone_where_cells_are_whole_pixels(
    case: tuple[Cells, int], a: int, b: int
) -> None:
    cells, grid = case
    size = (a * grid, b * grid)
    assert box_to_region(region_to_box(cells, size, grid, "cover"), size, grid) == cells


def test_published_margin_and_truncation() -> None:
    assert region_to_box((2, 1, 4, 6), (1818, 480)) == (227, 0, 1363, 480)
    assert region_to_box((2, 1, 4, 6), (1818, 480), policy="cover") == (454, 60, 1137, 420)


def test_a_box_without_area_becomes_one_pixel() -> None:
    assert region_to_box((3, 0, 4, 1), (1, 1), non_empty=False) == (0, 0, 0, 0)
    assert region_to_box((3, 0, 4, 1), (1, 1)) == (0, 0, 1, 1)
    assert region_to_box((0, 0, 0, 0), (3, 400), non_empty=False) == (0, 0, 0, 100)
    assert region_to_box((0, 0, 0, 0), (3, 400)) == (0, 0, 1, 100)


def test_enclosing_takes_any_order_with_gaps_and_repeats() -> None:
    assert enclosing([4, 4, 1], [7]) == (1, 7, 4, 7)
    assert enclosing([], [1]) is None
    assert enclosing([1], []) is None


@pytest.mark.parametrize(
    "cells", [(0, 0, 8, 0), (-1, 0, 1, 1), (3, 0, 2, 1), (0, 3, 1, 2), (0, 0, 1), (0, 0, 1.0, 1)]
)
def test_no_region_of_the_grid(cells: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"no region of the grid.*whole numbers 0\.\.7, min <= max"):
        region_to_box(cells, (100, 100))


def test_sizes_and_boxes_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"at least one pixel; got: \(0, 5\)"):
        region_to_box((0, 0, 1, 1), (0, 5))
    for box in [(0, 0, 11, 10), (-1, 0, 5, 5), (5, 0, 5, 5), (0, 6, 5, 5)]:
        with pytest.raises(UserError, match=r"empty or leaves the picture.*within 0\.\.10"):
            box_to_region(box, (10, 10))
