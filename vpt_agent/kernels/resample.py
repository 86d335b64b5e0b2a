"""Pillow's resampling as numbers: which pixels a new pixel is made of, and with what weights.

A kernel that adds with these weights in integers gives what Pillow gives, bit for bit. Written from
what Pillow computes (antialiased filters on 8 bits: weights in float64, rounded to 22 bits behind
the point, one axis after the other, each pass rounded and clipped to 8 bits); tests compare with
Pillow itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import PIL

PRECISION = 22  # bits behind the point: 32 less 8 of the pixel and 2 of room above and below

Ints = npt.NDArray[np.int32]


# Pillow 13 changed which axis comes first, and with it some of the bits.
_CHOOSES_AXIS = int(PIL.__version__.split(".")[0]) >= 13


def rows_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether the installed Pillow resizes along the height first; sizes are (width, height).

    Up to Pillow 12 never; from 13 on where the height loses more than twice what the width does.
    """
    lost = old[1] - new[1]
    return _CHOOSES_AXIS and lost > 0 and lost > 2 * (old[0] - new[0])


class Taps(NamedTuple):
    """How n new pixels come from old ones along one axis.

    ``first`` int32 [n]: the first old pixel of each; ``weights`` int32 [n, k]: of that one and
    those behind it, times 2^22, zero where there are fewer than k.
    """

    first: Ints
    weights: Ints


def nearest_index(old: int, new: int) -> Ints:
    """Which of ``old`` pixels each of ``new`` is, by NEAREST: int32 [new].

    Pillow adds the step up in float64, so the roundings of that sum are part of the answer.
    """
    step = old / new
    steps = np.full(new, step)
    steps[0] = step * 0.5
    return np.minimum(np.add.accumulate(steps).astype(np.int32), old - 1)


def nearest_path(old: int, stages: Iterable[int]) -> Ints:
    """As :func:`nearest_index` for several stages, one after the other: int32 [last stage]."""
    index = np.arange(old, dtype=np.int32)
    for new in stages:
        index = index[nearest_index(len(index), new)]
    return index


def _bilinear(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _bicubic(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Keys' cubic with a = -1/2, in Pillow's order of operations.
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


@lru_cache(maxsize=512)
def antialias_taps(old: int, new: int, *, bilinear: bool = False) -> Taps:
    """Weights of the antialiased resize of ``old`` pixels to ``new``: bicubic, or bilinear."""
    scale = old / new
    widest = max(scale, 1.0)
    support = (1.0 if bilinear else 2.0) * widest
    count = math.ceil(support) * 2 + 1
    centre = (np.arange(new) + 0.5) * scale
    # Truncated as C does, which differs from floor below zero only, where 0 is taken anyway.
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + support + 0.5).astype(np.int64), old)
    offset = np.arange(count)
    places = (offset + first[:, None] - centre[:, None] + 0.5) * (1.0 / widest)
    values = (_bilinear if bilinear else _bicubic)(places)  # [new, count]
    values[offset >= (end - first)[:, None]] = 0.0
    total = np.zeros(new)
    for tap in range(count):  # one after the other: a sum in another order rounds differently
        total += values[:, tap]
    values = values / total[:, None]
    scaled = values * (1 << PRECISION)
    weights = (scaled + np.where(values < 0, -0.5, 0.5)).astype(np.int32)
    used = max(1, int((weights != 0).any(0).nonzero()[0].max()) + 1)
    return Taps(first.astype(np.int32), np.ascontiguousarray(weights[:, :used]))
