"""``vpt::condition`` and ``vpt::place`` on the CPU, with fewer passes over the rows.

The features of one picture stand one after the other and share their condition, so a picture is a
product of a matrix and a vector and a rank-one update, instead of a condition copied for each row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vpt_agent.kernels.registry import plain


def _runs(segment: Tensor) -> list[tuple[int, int, int]]:
    """Stretches of equal entries in ``segment`` [N]: (entry, first, end)."""
    entries, counts = torch.unique_consecutive(segment, return_counts=True)
    ends = counts.cumsum(0)
    firsts = ends - counts
    return list(zip(entries.tolist(), firsts.tolist(), ends.tolist(), strict=True))


def _wide(features: Tensor, condition: Tensor) -> torch.dtype:
    dtype = torch.promote_types(features.dtype, condition.dtype)
    return torch.promote_types(dtype, torch.float32)


def _pieces(
    runs: list[tuple[int, int, int]], dtype: torch.dtype, condition: Tensor, *rows: Tensor
) -> Iterator[tuple[slice, int, Tensor, list[Tensor]]]:
    """Of each run: where it is, its entry, its condition [D] and its part of ``rows`` [n, D]."""
    wide = condition.to(dtype)
    for entry, first, end in runs:
        where = slice(first, end)
        yield where, entry, wide[entry], [r[where].to(dtype) for r in rows]


def condition_cpu(features: Tensor, condition: Tensor, segment: Tensor) -> Tensor:
    """As the plain version of ``vpt::condition``, but for the order of the sum over D."""
    runs = _runs(segment)
    if len(runs) * 4 > len(features):  # hardly two rows alike: nothing to gain
        result = plain("condition")(features, condition, segment)
        assert isinstance(result, Tensor)
        return result
    out = torch.empty_like(features, memory_format=torch.contiguous_format)
    dtype = _wide(features, condition)
    for where, _, c, (f,) in _pieces(runs, dtype, condition, features):
        out[where] = torch.addr(f, f @ c, c)  # [n, D]
    return out


def condition_backward_cpu(
    grad: Tensor, features: Tensor, condition: Tensor, segment: Tensor
) -> tuple[Tensor, Tensor]:
    """As the plain version of ``vpt::condition_backward``, but for the order of sums."""
    dtype = _wide(features, condition)
    to_features = torch.empty_like(features, memory_format=torch.contiguous_format)
    to_condition = torch.zeros_like(condition, dtype=dtype)
    for where, entry, c, (g, f) in _pieces(_runs(segment), dtype, condition, grad, features):
        g_c, f_c = g @ c, f @ c  # [n]
        to_features[where] = torch.addr(g, g_c, c)
        to_condition[entry] += g_c @ f + f_c @ g
    return to_features, to_condition.to(condition.dtype, copy=True)


def place_cpu(embeds: Tensor, features: Tensor, stretches: Tensor) -> tuple[Tensor, Tensor]:
    """As the plain version of ``vpt::place``, a stretch at a time."""
    out = embeds.clone(memory_format=torch.contiguous_format)
    positions = stretches.new_zeros(3, embeds.shape[0], embeds.shape[1])
    for row, first, count, feature, start, _, width in stretches.tolist():
        where = slice(first, first + count)
        if feature >= 0:
            out[row, where] = features[feature : feature + count].to(embeds.dtype)
        if width:
            place = torch.arange(count)
            positions[0, row, where] = start
            positions[1, row, where] = start + place // width
            positions[2, row, where] = start + place % width
        else:
            positions[:, row, where] = torch.arange(start, start + count)
    return out, positions
