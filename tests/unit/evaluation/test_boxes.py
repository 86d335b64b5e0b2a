"""Overlap of regions with true boxes."""

from __future__ import annotations

import pytest

from vpt_agent.evaluation import iogt, iou, is_small, match
from vpt_agent.evaluation.boxes import area, overlap


def test_overlap_of_two_boxes() -> None:
    a, b = (0, 0, 10, 10), (5, 0, 15, 10)
    assert overlap(a, b) == overlap(b, a) == 50
    assert iou(a, b) == pytest.approx(50 / 150)
    assert iogt(a, b) == iogt(b, a) == 0.5
    assert iogt((0, 0, 100, 100), a) == 1
    assert iou(a, a) == 1
    assert iou(a, (20, 20, 30, 30)) == 0


def test_boxes_without_area_overlap_nothing() -> None:
    assert area((5, 5, 5, 9)) == area((9, 0, 5, 5)) == 0
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0
    assert iogt((0, 0, 9, 9), (3, 3, 3, 3)) == 0


def test_a_cell_of_the_published_grid_is_the_border() -> None:
    assert not is_small((0, 0, 80, 60), (640, 480))
    assert is_small((0, 0, 79, 60), (640, 480))


def test_every_object_gets_the_region_that_serves_it_best() -> None:
    regions = [(0, 0, 50, 50), (40, 40, 60, 60)]
    near, far = match(regions, [(42, 42, 58, 58), (90, 90, 99, 99)], (100, 100))
    assert near.best == (40, 40, 60, 60)
    assert near.iogt == 1
    assert near.iou == pytest.approx(256 / 400)
    assert not near.small
    assert (far.iogt, far.iou, far.small) == (0, 0, True)
    (missed,) = match([], [(0, 0, 9, 9)], (100, 100))
    assert missed.best is None
    assert missed.iou == 0
