"""Small marks on stickers: alike when they are 2 pixels wide, easy to tell apart at 4.

All marks are arms around a middle, as long as each other and with the same ink at every distance
from the middle. What differs is only how the arms stand around it (four straight, four aslant,
five), which is the first thing that a small picture loses: dots, rings and bars of that size can
be told apart in the first look by their darkness and breadth.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw

# Arms of each mark, and where the first one points, in degrees from straight up.
_ARMS: Final = {"plus": (4, 0.0), "cross": (4, 45.0), "star": (5, 0.0)}
MARKS: Final = tuple(_ARMS)

GLOBAL_LEAST: Final = 1.75
GLOBAL_MOST: Final = 1.95
"""Marks are at most so broad (tip to tip) in pixels of the first look."""
AGAIN_LEAST: Final = 3.5
"""Marks are at least so broad in pixels of every re-encoding view."""

# In shares of the breadth: all the arms' widths together, and the sticker.
_INK: Final = 0.9
_STICKER: Final = 1.7
_FINE: Final = 8


@dataclass(frozen=True)
class Sticker:
    """A drawn mark on its sticker (RGBA) and the mark's breadth from tip to tip in pixels."""

    image: Image.Image
    extent: float


def _mask(mark: str, extent: float, side: int) -> Image.Image:
    """The mark's ink in the middle of a square of ``side`` pixels."""
    fine = Image.new("L", (side * _FINE, side * _FINE), 0)
    draw = ImageDraw.Draw(fine)
    middle, length = side * _FINE / 2, extent * _FINE / 2
    arms, first = _ARMS[mark]
    half = _INK * extent * _FINE / arms / 2
    for arm in range(arms):
        angle = math.radians(first + 360 / arms * arm)
        x, y = math.sin(angle), -math.cos(angle)
        corners = [(0, -half), (length, -half), (length, half), (0, half)]
        draw.polygon(
            [
                (middle + along * x - off * y, middle + along * y + off * x)
                for along, off in corners
            ],
            fill=255,
        )
    return fine.reduce(_FINE)


def draw_sticker(rng: random.Random, mark: str, extent: float) -> Sticker:
    """A mark of ``extent`` pixels on a round sticker, dark on light or light on dark."""
    side = int(extent * _STICKER + 0.5) + 2
    dark = tuple(rng.randint(0, 45) for _ in range(3))
    light = tuple(rng.randint(215, 255) for _ in range(3))
    paper, ink = (light, dark) if rng.random() < 0.5 else (dark, light)
    fine = Image.new("L", (side * _FINE, side * _FINE), 0)
    rim = _FINE
    ImageDraw.Draw(fine).ellipse((rim, rim, side * _FINE - rim, side * _FINE - rim), fill=255)
    image = Image.new("RGB", (side, side), paper)
    image.paste(Image.new("RGB", (side, side), ink), (0, 0), _mask(mark, extent, side))
    image.putalpha(fine.reduce(_FINE))
    return Sticker(image, extent)
