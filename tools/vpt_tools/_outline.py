"""From a mask to its outlines."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Point = tuple[float, float]
Mask = npt.NDArray[np.bool_]


def outlines(mask: Mask) -> list[list[Point]]:
    """Closed lines along the pixels' borders of ``mask`` [H, W], the largest part first.

    A point is (x, y), the corner of a pixel. Outer lines go clockwise (on a picture, y down), those
    of holes the other way, so the signed areas add up to the number of pixels.
    """
    ahead = _border(mask)
    lines = []
    while ahead:
        begin = next(iter(ahead))
        line, at, came = [begin], begin, (0, 0)
        while True:
            ways = ahead[at]
            # Where two pixels touch at a corner, the turn to the right keeps them apart.
            best = max(range(len(ways)), key=lambda i: _turn(came, at, ways[i]))
            to = ways.pop(best)
            if not ways:
                del ahead[at]
            came, at = (to[0] - at[0], to[1] - at[1]), to
            if at == begin:
                break
            line.append(at)
        lines.append(_straight(line))
    return sorted(lines, key=lambda line: -abs(signed_area(line)))


def _border(mask: Mask) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """Pieces of the border, one pixel long, from corner to corner, the mask on their right."""
    full = np.pad(mask, 1)
    inside = full[1:-1, 1:-1]
    ahead: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    sides = (
        (full[:-2, 1:-1], (0, 0), (1, 0)),  # above: to the right along the top
        (full[1:-1, 2:], (1, 0), (1, 1)),  # right: down
        (full[2:, 1:-1], (1, 1), (0, 1)),  # below: to the left
        (full[1:-1, :-2], (0, 1), (0, 0)),  # left: up
    )
    for beyond, begin, end in sides:
        for y, x in np.argwhere(inside & ~beyond).tolist():
            ahead[x + begin[0], y + begin[1]].append((x + end[0], y + end[1]))
    return ahead


def _turn(came: tuple[int, int], at: tuple[int, int], to: tuple[int, int]) -> int:
    """How far to the right a way goes: 1, 0 or -1."""
    return came[0] * (to[1] - at[1]) - came[1] * (to[0] - at[0])


def _straight(line: Sequence[tuple[int, int]]) -> list[Point]:
    """Without the points in the middle of straight pieces."""
    kept: list[Point] = []
    for i, (x, y) in enumerate(line):
        before, after = line[i - 1], line[(i + 1) % len(line)]
        if (x - before[0]) * (after[1] - y) != (y - before[1]) * (after[0] - x):
            kept.append((float(x), float(y)))
    return kept


def signed_area(line: Sequence[Point]) -> float:
    """Pixels inside a closed line; negative for a hole."""
    pairs = zip(line, [*line[1:], *line[:1]], strict=True)
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in pairs) / 2


def simplified(line: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` (4 or more) points of a closed line, those that matter most for its shape.

    Visvalingam's way: again and again the point goes whose triangle is the smallest.
    """
    kept = list(line)
    if len(kept) > 2000:  # the way below looks at every point for each that goes
        kept = kept[:: -(-len(kept) // 2000)]
    while len(kept) > max(4, most):
        areas = [abs(signed_area([kept[i - 1], kept[i], kept[(i + 1) % len(kept)]]))
                 for i in range(len(kept))]  # fmt: skip
        del kept[areas.index(min(areas))]
    return kept
