"""Marks put into views on the fly: a few hundred scenes have too few to learn them from.

On 160 scenes an encoder named 98 % of the marks that it had been shown and 17 % of new ones.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt_agent.nano.batches import Labels
from vpt_agent.nano.domain.marks import (
    GLOBAL_LEAST,
    GLOBAL_MOST,
    MARKS,
    draw_sticker,
    period_of,
)
from vpt_agent.nano.domain.sight import AGAIN, Pixels
from vpt_agent.nano.second.labels import CELL, REACH
from vpt_agent.nano.views import GLOBAL_LONGEST

# Half of the stickers are up to so many times as large as in the scenes, with as many more bars.
LARGEST: Final = 2.5
# How many pixels of a scene become one of a re-encoding view.
_FINER: Final = (1.3, 2.7)
# Breadth of a sticker in the view, for each in the first look: in square pictures, the half of all,
# and at the other end in others. Dino's view is of the shorter side.
_SCALE: Final = {
    "clip": (AGAIN["clip"] / GLOBAL_LONGEST, 0.93 * AGAIN["clip"] / GLOBAL_LONGEST),
    "dino": (512 / GLOBAL_LONGEST, 512 / GLOBAL_LONGEST / 0.75),
    "sam": (AGAIN["sam"] / GLOBAL_LONGEST, 0.93 * AGAIN["sam"] / GLOBAL_LONGEST),
}


@dataclass(frozen=True)
class _Drawn:
    """A sticker as a view shows it: float32 colours (h, w, 3), alpha (h, w, 1), its middle, and

    how far it reaches from there, in pixels.
    """

    mark: int
    colours: NDArray[np.float32]
    alpha: NDArray[np.float32]
    middle: tuple[float, float]
    reach: float


class Stickers:
    """A stock of stickers for a kind's views, each at another place between the pixels."""

    def __init__(self, kind: str, *, count: int = 1500, seed: int = 0) -> None:
        self.kind = kind
        rng = random.Random(f"stickers-{kind}-{seed}")
        # Enlarged ones are learnt much sooner, and help with the small ones.
        self.stock = [
            self._draw(rng, i % len(MARKS), rng.uniform(1.0, LARGEST) if i % 2 else 1.0)
            for i in range(count)
        ]

    def _draw(self, rng: random.Random, mark: int, zoom: float) -> _Drawn:
        finer = rng.uniform(*_FINER)
        square, other = _SCALE[self.kind]
        extent = rng.uniform(GLOBAL_LEAST, GLOBAL_MOST) * zoom
        extent *= square if rng.random() < 0.5 else rng.uniform(square, other)
        period = period_of(extent * finer / zoom)
        sticker = draw_sticker(rng, MARKS[mark], extent * finer, period=period).image
        side = math.ceil(sticker.width / finer) + 2
        canvas = Image.new("RGBA", (round(side * finer), round(side * finer)))
        # Colour without cover, or resizing would mix black into the rim.
        paper = np.asarray(sticker)[2, sticker.width // 2, :3]
        canvas.paste(Image.new("RGB", canvas.size, tuple(int(part) for part in paper)))
        canvas.putalpha(0)
        room = canvas.width - sticker.width
        x, y = rng.randint(0, room), rng.randint(0, room)
        canvas.paste(sticker, (x, y))
        bilinear = self.kind == "sam"
        filter_ = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        small = np.asarray(canvas.resize((side, side), filter_), dtype=np.float32)
        scale = side / canvas.width
        middle = ((x + sticker.width / 2) * scale, (y + sticker.height / 2) * scale)
        return _Drawn(
            mark, small[..., :3], (small[..., 3:] / 255).astype(np.float32), middle, REACH * zoom
        )

    def add(self, rng: random.Random, view: Pixels, labels: Labels, count: int) -> Pixels:
        """The view with up to ``count`` more stickers; ``labels`` (rows, columns, 3) say so, too.

        None lies on another: where a cell has a mark, or no label for one, nothing is put.
        """
        cell = CELL[self.kind]
        result = view.astype(np.float32)
        for drawn in rng.choices(self.stock, k=count):
            side = drawn.alpha.shape[0]
            left = rng.randint(0, view.shape[1] - side)
            top = rng.randint(0, view.shape[0] - side)
            x, y = left + drawn.middle[0], top + drawn.middle[1]
            rows = slice(max(0, int((y - drawn.reach) // cell)), int((y + drawn.reach) // cell) + 1)
            columns = slice(
                max(0, int((x - drawn.reach) // cell)), int((x + drawn.reach) // cell) + 1
            )
            near = labels[rows, columns, 0]
            row, column = int(y // cell), int(x // cell)
            if near.any() or row >= len(labels) or column >= labels.shape[1]:
                continue
            part = result[top : top + side, left : left + side]
            part += (drawn.colours - part) * drawn.alpha
            labels[rows, columns, 0] = -100
            labels[row, column, 0] = drawn.mark + 1
        whole: Pixels = result.clip(0, 255).astype(np.uint8)
        return whole
