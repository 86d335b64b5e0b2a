"""Coordinate frames and crops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vpt_agent.errors import ModelRetry, UserError
from vpt_agent.types import Box, View
from vpt_agent.vision import clamp, crop_view, in_view, load_views, to_original, to_view
from vpt_agent.vision.frames import cells_of, from_norm1000, to_norm1000


def _view(width: int = 200, height: int = 120) -> View:
    rng = np.random.default_rng(5)
    return load_views(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))[0]


VIEW = _view()
INSIDE = st.tuples(
    st.integers(0, 198), st.integers(0, 118), st.integers(1, 200), st.integers(1, 120)
).filter(lambda b: b[0] < b[2] and b[1] < b[3])


@given(INSIDE, st.data())
def test_a_crop_knows_its_box_in_the_original(
    box: tuple[int, int, int, int], data: st.DataObject
) -> None:
    crop = crop_view(VIEW, box, id="crop_1", origin="test")
    assert crop.box == box
    assert (crop.parent, crop.root, crop.root_size) == ("image_1", "image_1", (200, 120))
    width, height = crop.size
    left = data.draw(st.integers(0, width - 1))
    top = data.draw(st.integers(0, height - 1))
    inner = (left, top, data.draw(st.integers(left + 1, width)), height)
    again = crop_view(crop, inner, id="crop_2")
    assert again.root == "image_1"
    assert again.parent == "crop_1"
    assert again.box == to_original(inner, crop)
    assert again.image.tobytes() == VIEW.image.crop(tuple(map(int, again.box))).tobytes()


@given(INSIDE, st.tuples(*[st.floats(-50, 250)] * 4), st.sampled_from([1, 3]))
def test_frames_are_undone(box: tuple[int, ...], values: tuple[float, ...], zoom: int) -> None:
    crop = crop_view(VIEW, box, id="c")
    if zoom > 1:
        large = crop.image.resize((crop.size[0] * zoom, crop.size[1] * zoom))
        crop = View("z", large, crop.root, crop.box, crop.root_size, "c")
    back = to_view(to_original(values, crop), crop)
    assert back == pytest.approx(values, abs=1e-6)
    assert from_norm1000(to_norm1000(values, crop.size), crop.size) == pytest.approx(values)


def test_frames() -> None:
    crop = crop_view(VIEW, (100, 40, 180, 120), id="c")
    assert in_view((0, 500, 1000, 1000), "norm1000", crop) == (0, 40, 80, 80)
    assert in_view((1, 2, 3, 4), "view", crop) == (1, 2, 3, 4)
    assert in_view((100, 40, 120, 60), "original", crop) == (0, 0, 20, 20)
    assert in_view((2, 2, 3, 3), "grid", crop) == (10, 10, 50, 50)
    assert in_view((2, 2, 3, 3), "grid", crop, policy="cover") == (20, 20, 40, 40)
    assert in_view((2, 2, 3, 3), "grid", crop, grid=4, policy="cover") == (40, 40, 80, 80)
    assert cells_of((20, 20, 40, 40), crop) == (2, 2, 3, 3)
    with pytest.raises(UserError, match=r"unknown coordinate frame cm; expected: grid, norm1000"):
        in_view((0, 0, 1, 1), "cm", crop)


@given(st.tuples(*[st.floats(-300, 500)] * 4), st.integers(1, 30))
def test_clamp_gives_whole_pixels_inside_or_says_why(
    box: tuple[float, float, float, float], at_least: int
) -> None:
    ordered = box[0] < box[2] and box[1] < box[3]
    inside = ordered and box[0] < 200 and box[1] < 120 and box[2] > 0 and box[3] > 0
    try:
        got = clamp(box, (200, 120), at_least=at_least)
    except ModelRetry:
        # one pixel is always there if the box touches the picture
        assert not inside or at_least > 1
        return
    assert inside
    assert 0 <= got.left <= got.right - at_least
    assert got.right <= 200
    assert 0 <= got.top <= got.bottom - at_least
    assert got.bottom <= 120
    assert got.left <= max(box[0], 0)
    assert got.right >= min(box[2], 200)


@pytest.mark.parametrize(
    ("box", "kind", "message"),
    [
        ((5, 5, 4, 9), "invalid_arguments", r"box \[5, 5, 4, 9\] is not left, top, right, bottom"),
        ((float("nan"), 0, 1, 1), "invalid_arguments", "is not left, top"),
        ((0, 0, float("inf"), 1), "invalid_arguments", "is not left, top"),
        ((5, 5, 5, 9), "box_too_small", "has no area"),
        ((300, 5, 310, 9), "box_outside", "outside the picture of 200 x 120 pixels"),
        ((0, 120, 5, 130), "box_outside", "outside the picture"),
        ((198, 5, 260, 90), "box_too_small", r"covers 2 x 85 pixels; at least 4 x 4"),
    ],
)
def test_boxes_that_cannot_be_looked_at(box: tuple[float, ...], kind: str, message: str) -> None:
    with pytest.raises(ModelRetry, match=message) as caught:
        crop_view(VIEW, box, id="c", at_least=4)
    assert caught.value.kind == kind


def test_a_resized_view_needs_the_original() -> None:
    crop = crop_view(VIEW, (10, 20, 70, 80), id="c")
    zoomed = View("z", crop.image.resize((90, 90)), crop.root, crop.box, crop.root_size, "c")
    with pytest.raises(UserError, match=r"was resized.*pass root="):
        crop_view(zoomed, (30, 30, 60, 60), id="x")
    again = crop_view(zoomed, (30, 30, 60, 60), id="x", root=VIEW)
    assert again.box == Box(30, 40, 50, 60)
    assert again.image.tobytes() == VIEW.image.crop((30, 40, 50, 60)).tobytes()
    other = View("image_2", Image.new("RGB", (5, 5)), "image_2", Box(0, 0, 5, 5), (5, 5))
    with pytest.raises(UserError, match=r"not the original of the view.*image_1 \(200, 120\)"):
        crop_view(zoomed, (30, 30, 60, 60), id="x", root=other)
