"""Outlines of masks: exact along the pixels' borders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from vpt_tools._outline import outlines, signed_area, simplified


def test_a_box_and_a_box_with_a_hole() -> None:
    mask = np.zeros((8, 9), dtype=bool)
    mask[2:6, 3:8] = True
    assert outlines(mask) == [[(3, 2), (8, 2), (8, 6), (3, 6)]] or sorted(outlines(mask)[0]) == [
        (3, 2), (3, 6), (8, 2), (8, 6),
    ]  # fmt: skip
    mask[3, 4] = False
    outer, hole = outlines(mask)
    assert (signed_area(outer), signed_area(hole)) == (20, -1)


def test_pixels_that_touch_at_a_corner_stay_apart() -> None:
    lines = outlines(np.eye(2, dtype=bool))
    assert [signed_area(line) for line in lines] == [1, 1]


def test_an_empty_mask_has_none() -> None:
    assert outlines(np.zeros((3, 3), dtype=bool)) == []


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.9))
def test_the_areas_add_up_to_the_pixels(seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((9, 11)) < share
    lines = outlines(mask)
    assert sum(signed_area(line) for line in lines) == mask.sum()
    for line in lines:
        assert len(line) >= 4
        assert len(set(line)) >= 4


def test_fewer_points_keep_the_shape() -> None:
    image = Image.new("1", (200, 200))
    ImageDraw.Draw(image).ellipse((20, 30, 180, 170), fill=1)
    mask = np.asarray(image)
    (line,) = outlines(mask)
    few = simplified(line, 24)
    assert len(few) == 24
    assert signed_area(few) == pytest.approx(mask.sum(), rel=0.03)
    assert simplified(line[:5], 3) == simplified(line[:5], 4)
