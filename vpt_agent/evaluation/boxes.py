"""Regions against true boxes. All boxes are in one frame: pixels of the original picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vpt_agent.types import Box

SMALL = 1 / 64
"""An object is small under this share of the picture: one cell of the published 8 x 8 grid."""


def area(box: Sequence[float]) -> float:
    """Area of (left, top, right, bottom); 0 where an edge lies on or beyond its opposite."""
    left, top, right, bottom = box
    return max(0.0, right - left) * max(0.0, bottom - top)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Area that both boxes cover."""
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union; 0 if neither has an area."""
    both = overlap(a, b)
    union = area(a) + area(b) - both
    return both / union if union > 0 else 0.0


def iogt(region: Sequence[float], true: Sequence[float]) -> float:
    """The share of the true box that the region covers (intersection over ground truth)."""
    whole = area(true)
    return overlap(region, true) / whole if whole > 0 else 0.0


def is_small(box: Sequence[float], size: tuple[int, int]) -> bool:
    """Whether an object of this box in a picture of ``size`` (width, height) is small."""
    return area(box) < SMALL * size[0] * size[1]


@dataclass(frozen=True)
class Match:
    """One true box and how well the best of the regions met it; 0 where there was no region.

    ``best`` is the region of the largest IoGT, and of the largest IoU among those.
    """

    true: Box
    best: Box | None
    iou: float
    iogt: float
    small: bool


def match(
    regions: Sequence[Sequence[float]], true: Sequence[Sequence[float]], size: tuple[int, int]
) -> tuple[Match, ...]:
    """Each true box with the region that serves it best; ``size`` is the picture's."""
    found = []
    for box in true:
        best = max(regions, key=lambda r: (iogt(r, box), iou(r, box)), default=None)
        scores = (0.0, 0.0) if best is None else (iou(best, box), iogt(best, box))
        region = None if best is None else Box(*best)
        found.append(Match(Box(*box), region, *scores, is_small(box, size)))
    return tuple(found)
