"""Hatched stickers: one grey in the first look, upright, level or checked when seen larger.

All patterns have half ink, half paper, the same period along both axes, and fade towards the rim.
A period is little more than one pixel of the first look, where resizing leaves an even grey of each
pattern; blotches as large as its pixels cover the little that it does not take away. Small stars
and crosses, which were tried first, were lost in the first look, too, but are much harder to learn
for an encoder that cuts its view into patches: where in its patch a hatching lies does not matter.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MARKS: Final = ("fence", "ladder", "net")
"""Upright bars, level bars, checks."""

GLOBAL_LEAST: Final = 5.0
GLOBAL_MOST: Final = 5.6
"""Breadth of a sticker in pixels of the first look."""
GLOBAL_PERIOD: Final = 1.2
"""A period (a bar and a gap) of a sticker of middling breadth, in pixels of the first look, which
can show periods of two and more."""
GLOBAL_LONGEST_PERIOD: Final = 1.3
"""No period is longer in pixels of the first look."""
AGAIN_PERIOD: Final = 2.4
"""A period is at least so long in pixels of every re-encoding view."""

# Deviation of the noise of each pixel, and of that of each pixel of the first look.
_GRAIN: Final = 30.0
_BLOTCHES: Final = 22.0
# The middle of a sticker, as a share of its breadth, has the whole contrast.
_FULL: Final = 0.55
_FINE: Final = 4


@dataclass(frozen=True)
class Sticker:
    """A round sticker with its pattern (RGBA) and its breadth in pixels."""

    image: Image.Image
    extent: float


def _bars(mark: str, period: float, phase: tuple[float, float], side: int) -> NDArray[Any]:
    """(side, side) from -1, paper, to 1, ink; half each."""
    at = (np.arange(side * _FINE) + 0.5) / _FINE
    across, down = (np.where((at / period + own) % 1 < 0.5, 1.0, -1.0) for own in phase)
    whole = {
        "fence": np.broadcast_to(across[None, :], (len(at), len(at))),
        "ladder": np.broadcast_to(down[:, None], (len(at), len(at))),
        "net": across[None, :] * down[:, None],
    }[mark]
    blocks: NDArray[Any] = whole.reshape(side, _FINE, side, _FINE).mean((1, 3))
    return blocks


def period_of(extent: float) -> float:
    """The period of a scene's sticker of so many pixels, in pixels."""
    return extent * GLOBAL_PERIOD / ((GLOBAL_LEAST + GLOBAL_MOST) / 2)


def _noise(rng: random.Random, side: int) -> NDArray[Any]:
    own = np.random.default_rng(rng.getrandbits(32))
    coarse = own.normal(0, _BLOTCHES, (round(GLOBAL_MOST), round(GLOBAL_MOST)))
    image = Image.fromarray(coarse.astype(np.float32), "F")
    smooth = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC), dtype=float)
    blotches: NDArray[Any] = smooth + own.normal(0, _GRAIN, (side, side))
    return blotches


def draw_sticker(
    rng: random.Random, mark: str, extent: float, *, period: float | None = None
) -> Sticker:
    """A pattern on a round sticker of ``extent`` pixels, at any phase.

    ``period`` is in pixels; by default that of a sticker of this breadth in a scene.
    """
    if period is None:
        period = period_of(extent)
    side = int(extent) + 2
    dark, light = rng.randint(0, 45), rng.randint(205, 250)
    bars = _bars(mark, period, (rng.random(), rng.random()), side)
    off = np.arange(side) + 0.5 - side / 2
    distance = np.hypot(off[None, :], off[:, None]) * 2 / extent
    fade = np.cos(np.clip((distance - _FULL) / (1 - _FULL), 0, 1) * np.pi / 2) ** 2
    noise = _noise(rng, side)
    grey = (dark + light) / 2 - (light - dark) / 2 * bars * fade
    pixels = np.zeros((side, side, 4))
    pixels[..., :3] = (grey + noise)[..., None]
    pixels[..., 3] = np.clip((1 - distance) * extent / 2 + 0.5, 0, 1) * 255
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8), "RGBA")
    return Sticker(image, extent)
