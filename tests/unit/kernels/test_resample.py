"""Pillow's resampling as integers: equal to Pillow, whatever the sizes."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vpt_agent.kernels.resample import (
    PRECISION,
    Taps,
    antialias_taps,
    nearest_index,
    nearest_path,
    rows_first,
)

Pixels = npt.NDArray[np.uint8]
SIDE = st.integers(1, 120)


def _along_width(image: Pixels, taps: Taps) -> Pixels:
    count = taps.weights.shape[1]
    index = np.minimum(taps.first[:, None] + np.arange(count), image.shape[1] - 1)
    total = (image.astype(np.int64)[:, index] * taps.weights).sum(-1) + (1 << PRECISION - 1)
    assert abs(total).max() < 2**31, "a kernel adds in 32 bits"
    return np.clip(total >> PRECISION, 0, 255).astype(np.uint8)


def _resize(image: Pixels, new: tuple[int, int], *, bilinear: bool) -> Pixels:
    old = (image.shape[1], image.shape[0])
    across = antialias_taps(old[0], new[0], bilinear=bilinear)
    down = antialias_taps(old[1], new[1], bilinear=bilinear)
    if rows_first(old, new):
        return _along_width(_along_width(image.T, down).T, across)
    return _along_width(_along_width(image, across).T, down).T


@settings(max_examples=150, deadline=None)
@given(old=st.tuples(SIDE, SIDE), new=st.tuples(SIDE, SIDE), bilinear=st.booleans(),
       black_and_white=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_weights_are_pillow_s(
    old: tuple[int, int], new: tuple[int, int], bilinear: bool, black_and_white: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (old[1], old[0]), dtype=np.uint8)
    if black_and_white:  # what overshoots most
        image = (image > 127).astype(np.uint8) * np.uint8(255)
    kind = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    expected = np.asarray(Image.fromarray(image).resize(new, kind))
    assert (_resize(image, new, bilinear=bilinear) == expected).all()


@settings(max_examples=300, deadline=None)
@given(old=st.integers(1, 6000), new=st.integers(1, 3000), down=st.booleans())
def test_nearest_is_pillow_s(old: int, new: int, down: bool) -> None:
    line = np.arange(old, dtype=np.int32)
    image = Image.fromarray(line[:, None] if down else line[None])
    small = image.resize((1, new) if down else (new, 1), Image.Resampling.NEAREST)
    assert (nearest_index(old, new) == np.asarray(small).ravel()).all()


def test_stages_one_after_the_other() -> None:
    image = Image.fromarray(np.arange(900, dtype=np.int32)[None])
    for width in (512, 700, 33):
        image = image.resize((width, 1), Image.Resampling.NEAREST)
    assert (nearest_path(900, [512, 700, 33]) == np.asarray(image)[0]).all()
    assert (nearest_path(5, []) == np.arange(5)).all()


@pytest.mark.parametrize("old", [1, 2, 77])
def test_the_same_size_changes_nothing(old: int) -> None:
    taps = antialias_taps(old, old)
    weights = np.zeros((old, old), np.int64)
    for new, first in enumerate(taps.first):
        for tap, weight in enumerate(taps.weights[new]):
            if weight:
                weights[new, first + tap] = weight
    assert (weights == np.eye(old, dtype=np.int64) << PRECISION).all()
