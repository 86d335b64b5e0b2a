"""M-RoPE positions: text counts on by one, a picture of the base tower spreads in two dimensions.

Position rule of Qwen2-VL. Only pictures that went through the base tower as themselves (the
``<|image_pad|>`` placeholder) are 2-D; placeholders of re-encoded pictures count as text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpt_agent.errors import UserError

Grid = tuple[int, int, int]
"""Patches of one picture: (t, h, w), before the merge."""


def span_positions(
    start: int, grid: Grid | None, count: int, *, merge: int = 2
) -> tuple[Tensor, int]:
    """Positions of ``count`` tokens that begin at position ``start``.

    ``grid`` (t, h, w) in patches makes them a picture, whose tokens share ``t`` and count rows and
    columns of the merged grid; None makes them text. Returns positions [3, count] int64 (t, h, w)
    and the first position after them. A grid that does not give ``count`` tokens, or has more than
    one frame, is a :class:`UserError`.
    """
    if grid is None:
        return (torch.arange(count) + start).expand(3, count).clone(), start + count
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    if frames != 1:
        raise UserError(
            "a picture has one frame; videos are not supported", got=f"grid {tuple(grid)}"
        )
    if rows * columns != count:
        raise UserError(
            "the picture's grid does not give this many tokens",
            got=f"grid {tuple(grid)}, {count} tokens",
            expected=f"{rows * columns} tokens",
        )
    positions = torch.full((3, count), start, dtype=torch.int64)  # [3, count]
    positions[1] += torch.arange(rows).repeat_interleave(columns)
    positions[2] += torch.arange(columns).repeat(rows)
    return positions, start + max(rows, columns)


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """The stretches of True in ``mask`` [L], as (first position, length)."""
    edges = torch.diff(mask.cpu().to(torch.int8), prepend=torch.zeros(1), append=torch.zeros(1))
    firsts = (edges == 1).nonzero().flatten().tolist()
    ends = (edges == -1).nonzero().flatten().tolist()
    return [(first, end - first) for first, end in zip(firsts, ends, strict=True)]


def rope_positions(
    input_ids: Tensor, grids: Sequence[Grid], image_token_id: int, *, merge: int = 2
) -> Tensor:
    """M-RoPE positions [3, L] int64 of one sequence ``input_ids`` [L] without padding.

    ``grids`` are the grids of its pictures in order, one for each run of ``image_token_id``.
    """
    stretches = runs(input_ids == image_token_id)
    if len(stretches) != len(grids):
        raise UserError(
            "the sequence's pictures and its grids differ in number",
            got=f"{len(stretches)} runs of placeholders, {len(grids)} grids",
            fix="pass one grid (t, h, w) for each <image> of the sequence, in order",
        )
    parts: list[Tensor] = []
    done = position = 0
    for (first, length), grid in zip(stretches, grids, strict=True):
        text, position = span_positions(position, None, first - done)
        picture, position = span_positions(position, grid, length, merge=merge)
        parts += [text, picture]
        done = first + length
    parts.append(span_positions(position, None, len(input_ids) - done)[0])
    return torch.cat(parts, dim=1)
