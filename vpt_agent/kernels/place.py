"""Visual features and positions by stretches: ``vpt::place``.

As ``vpt::splice``, but told by a few numbers a stretch instead of one index a token, so that
nothing as long as the sequence is built on the host; M-RoPE positions are written as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vpt_agent.kernels.registry import define, one_device, require


class Stretch(NamedTuple):
    """The positions of ``tokens`` tokens from ``first`` on, in a row of the batch.

    ``feature`` is the first row of the features that stand there, -1 where the embeddings stay.
    ``start`` is the first M-RoPE position; ``height`` and ``width`` are the merged grid of a
    picture whose tokens have places in two dimensions, 0 where positions count on by one.
    """

    row: int
    first: int
    tokens: int
    feature: int = -1
    start: int = 0
    height: int = 0
    width: int = 0


def _tokens(stretches: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token in a stretch: its stretch's fields [T, 7], its number there [T], and its flat
    position [T]."""
    counts = stretches[:, 2]
    fields = stretches.repeat_interleave(counts, dim=0)  # [T, 7]
    ends = counts.cumsum(0)
    inside = torch.arange(len(fields), device=stretches.device)
    inside = inside - (ends - counts).repeat_interleave(counts)  # [T]
    return fields, inside, fields[:, 0] * length + fields[:, 1] + inside


def _place(embeds: Tensor, features: Tensor, stretches: Tensor) -> tuple[Tensor, Tensor]:
    rows, length = embeds.shape[:2]
    fields, inside, flat = _tokens(stretches, length)
    result = embeds.clone(memory_format=torch.contiguous_format)  # [B, L, D]
    shown = fields[:, 3] >= 0
    source = (fields[:, 3] + inside)[shown]
    result.view(-1, embeds.shape[-1])[flat[shown]] = features[source].to(embeds.dtype)
    positions = stretches.new_zeros(3, rows * length)
    start, width = fields[:, 4], fields[:, 6]
    spread, wide = width > 0, width.clamp(min=1)
    positions[0, flat] = torch.where(spread, start, start + inside)
    positions[1, flat] = torch.where(spread, start + inside // wide, start + inside)
    positions[2, flat] = torch.where(spread, start + inside % wide, start + inside)
    return result, positions.view(3, rows, length)


def _place_fake(embeds: Tensor, features: Tensor, stretches: Tensor) -> tuple[Tensor, Tensor]:
    result = torch.empty_like(embeds, memory_format=torch.contiguous_format)
    return result, stretches.new_empty(3, embeds.shape[0], embeds.shape[1])


def _index(stretches: Tensor, length: int, count: int) -> Tensor:
    """Where each of ``count`` features stands: flat positions [N]. Features stand in order."""
    counts = torch.where(stretches[:, 3] >= 0, stretches[:, 2], 0)
    firsts = stretches[:, 0] * length + stretches[:, 1] - stretches[:, 3]
    # The size is known, so a GPU is not waited for.
    shifts = firsts.repeat_interleave(counts, output_size=count)
    return shifts + torch.arange(count, device=stretches.device)


_op = define("place", _place, _place_fake)


def _setup(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor],
    output: tuple[Tensor, Tensor],
) -> None:
    _, features, stretches = inputs
    ctx.save_for_backward(stretches)
    ctx.features_like = (features.shape[0], features.dtype)  # type: ignore[attr-defined]
    ctx.mark_non_differentiable(output[1])


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor
) -> tuple[Tensor, Tensor, None]:
    (stretches,) = ctx.saved_tensors  # type: ignore[attr-defined]
    count, dtype = ctx.features_like  # type: ignore[attr-defined]
    index = _index(stretches, grad.shape[1], count)
    rows = grad.reshape(-1, grad.shape[-1])  # [B*L, D]
    to_embeds = rows.index_fill(0, index, 0).view(grad.shape)
    return to_embeds, rows.index_select(0, index).to(dtype), None


_op.register_autograd(_backward, setup_context=_setup)


def _check(stretches: Sequence[Stretch], rows: int, length: int, features: int) -> None:
    where = "kernels.place"
    taken = sorted((s.row, s.first, s.first + s.tokens) for s in stretches)
    for row, first, end in taken:
        require(
            0 <= row < rows and 0 <= first < end <= length,
            "a stretch is empty or leaves the batch",
            where=where,
            got=f"row {row}, positions {first}..{end - 1}",
            expected=f"rows 0..{rows - 1}, positions 0..{length - 1}",
        )
    for (row, _, end), (other, first, _) in itertools.pairwise(taken):
        require(
            row != other or end <= first,
            "two stretches overlap",
            where=where,
            got=f"row {row}, position {first}",
            expected="each position at most once",
        )
    done = 0
    for stretch in stretches:
        if stretch.feature < 0:
            continue
        require(
            stretch.feature == done,
            "the features do not stand in order",
            where=where,
            got=f"feature {stretch.feature}",
            expected=f"feature {done}",
        )
        done += stretch.tokens
    require(
        done == features,
        "the stretches take another number of features",
        where=where,
        got=done,
        expected=features,
    )
    for stretch in stretches:
        require(
            stretch.width == 0 or stretch.height * stretch.width == stretch.tokens,
            "a stretch is not as long as its grid",
            where=where,
            got=f"{stretch.tokens} tokens, {stretch.height} x {stretch.width}",
            expected="height * width tokens",
        )


def place(embeds: Tensor, features: Tensor, stretches: Sequence[Stretch]) -> tuple[Tensor, Tensor]:
    """A copy of ``embeds`` with ``features`` in their places, and M-RoPE positions.

    ``embeds`` [B, L, D], ``features`` [N, D] (cast to the dtype of ``embeds``), all of which stand
    in ``stretches``, in order. Returns [B, L, D] and int64 [3, B, L] (time, height, width), 0
    outside all stretches. Gradients go to both; the replaced rows of ``embeds`` get zero.

    Stretches are checked on the host, whose numbers they are, so a GPU is not waited for. What
    does not fit is a :class:`UserError`.
    """
    where = "kernels.place"
    require(
        embeds.dim() == 3 and features.dim() == 2 and features.shape[1] == embeds.shape[2],
        "features do not fit the embeddings",
        where=where,
        got=f"{tuple(features.shape)} into {tuple(embeds.shape)}",
        expected="[N, D] into [B, L, D]",
    )
    one_device(where, embeds, features)
    _check(stretches, embeds.shape[0], embeds.shape[1], features.shape[0])
    table = torch.tensor([list(s) for s in stretches], dtype=torch.int64).view(-1, 7)
    result: tuple[Tensor, Tensor] = _op(embeds, features, table.to(embeds.device))
    return result
