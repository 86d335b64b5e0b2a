"""Dense labels of re-encoding views: the mark on each cell, and its tag's colour and shape."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from vpt_agent.nano.alphabet import COLOURS, SHAPES
from vpt_agent.nano.batches import Labels, _block_order
from vpt_agent.nano.domain.marks import MARKS
from vpt_agent.nano.domain.sight import Pixels, place_in
from vpt_agent.nano.second.pool import DomainRecord
from vpt_agent.nano.views import PATCH

Flags = NDArray[np.bool_]
CELL: Final = {"clip": PATCH, "dino": 2 * PATCH, "sam": 8}
"""Side of a labelled cell in pixels of the view: a patch of each encoder."""
TOKEN: Final = {"clip": 2 * PATCH, "dino": 2 * PATCH, "sam": 32}
"""Side of what one visual token shows, in pixels of the view."""
_MARK: Final = {name: i + 1 for i, name in enumerate(MARKS)}
_COLOUR: Final = {name: i + 1 for i, name in enumerate(COLOURS)}
_SHAPE: Final = {name: i + 1 for i, name in enumerate(SHAPES)}
REACH: Final = 8.0
"""A sticker reaches so far from its middle, in pixels of every re-encoding view."""


def again_labels(
    record: DomainRecord, kind: str, height: int, width: int, left: float = 0, top: float = 0
) -> Labels:
    """(rows, columns, 3): mark, colour, shape of every cell of a window of a kind's view.

    0 is none. The cell with a mark's middle bears it; its neighbours under the sticker have no
    label for marks (-100).
    """
    cell = CELL[kind]
    grid = np.zeros((height // cell, width // cell, 3), dtype=np.int64)
    for tag in record.marks:
        codes = (_COLOUR[tag.colour], _SHAPE[tag.shape])
        x0, y0 = place_in(kind, record.scene.size, tag.box[0], tag.box[1])
        x1, y1 = place_in(kind, record.scene.size, tag.box[2], tag.box[3])
        columns = _cells(x0 - left, x1 - left, cell, 0.4)
        rows = _cells(y0 - top, y1 - top, cell, 0.4)
        grid[rows, columns, 1:] = codes
    for tag in record.marks:
        if tag.mark is None:
            continue
        x, y = tag.at[kind][0] - left, tag.at[kind][1] - top
        near = _cells(y - REACH, y + REACH, cell, 0), _cells(x - REACH, x + REACH, cell, 0)
        grid[(*near, 0)] = -100
        row, column = int(y // cell), int(x // cell)
        if 0 <= row < grid.shape[0] and 0 <= column < grid.shape[1]:
            grid[row, column] = (_MARK[tag.mark], _COLOUR[tag.colour], _SHAPE[tag.shape])
    return grid


def _cells(low: float, high: float, cell: int, share: float) -> slice:
    """Cells of which more than ``share`` lies between ``low`` and ``high``."""
    first, last = int(np.floor(low / cell + share)), int(np.ceil(high / cell - share))
    return slice(max(0, first), max(0, last))


def in_block_order(grid: Labels) -> Labels:
    """(patches, k) in the base tower's order."""
    return _block_order(grid)


def spots(record: DomainRecord, kind: str, view: Pixels, tags: list[int]) -> Labels:
    """Which visual tokens of a view, row by row, show the marks of these tags: (tokens,) 0 or 1."""
    side, (height, width) = TOKEN[kind], view.shape[:2]
    grid = np.zeros((height // side, width // side), dtype=np.int64)
    for number in tags:
        if record.marks[number].mark is not None:
            x, y = record.marks[number].at[kind]
            grid[min(int(y // side), len(grid) - 1), min(int(x // side), grid.shape[1] - 1)] = 1
    return grid.reshape(-1)


def middles(record: DomainRecord, tags: list[int], rows: int, columns: int) -> Flags:
    """(rows, columns): the visual tokens of the first look with the middles of these tags."""
    sx, sy = columns / record.scene.size[0], rows / record.scene.size[1]
    grid = np.zeros((rows, columns), dtype=np.bool_)
    for number in tags:
        x0, y0, x1, y1 = record.marks[number].box
        column, row = int((x0 + x1) / 2 * sx), int((y0 + y1) / 2 * sy)
        grid[min(row, rows - 1), min(column, columns - 1)] = True
    return grid


def on_tags(record: DomainRecord, tags: list[int], rows: int, columns: int) -> Flags:
    """(rows, columns): which visual tokens of the first look lie on these tags."""
    sx, sy = columns / record.scene.size[0], rows / record.scene.size[1]
    grid = np.zeros((rows, columns), dtype=np.bool_)
    for number in tags:
        x0, y0, x1, y1 = record.marks[number].box
        left, right = int(x0 * sx + 0.25), int(x1 * sx + 0.75)
        top, bottom = int(y0 * sy + 0.25), int(y1 * sy + 0.75)
        grid[top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return grid
