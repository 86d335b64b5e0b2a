"""Visual tokens that enter the language model at several depths.

Qwen3-VL's tower gives features of some inner layers too ("deepstack", arXiv 2406.04334): level i
is added to the hidden states behind the language model's layer i. They travel with the token, in
one row [D * (1 + levels)]: first what stands at the input, then one [D] a level. A row [D] (text,
control states, features of other towers) adds nothing anywhere. W is the width of such rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from vpt_agent.kernels import Stretch, place, splice


def widened(rows: Tensor, width: int) -> Tensor:
    """``rows`` [..., W] with zeros up to ``width``: levels at which nothing is added."""
    return rows if rows.shape[-1] == width else functional.pad(rows, (0, width - rows.shape[-1]))


def put(embeds: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """``embeds`` [B, L, W] with ``rows`` [N, W'] at the flat positions ``index`` [N].

    As :func:`vpt_agent.kernels.splice`; the narrower of the two is widened, so the result is
    [B, L, max(W, W')].
    """
    width = max(embeds.shape[-1], rows.shape[-1])
    return splice(widened(embeds, width), widened(rows, width), index)


def put_at(embeds: Tensor, rows: Tensor, stretches: Sequence[Stretch]) -> Tensor:
    """As :func:`put`, told by stretches that take ``rows`` in order (no index of N numbers)."""
    width = max(embeds.shape[-1], rows.shape[-1])
    return place(widened(embeds, width), widened(rows, width), stretches)[0]


def joined(tokens: Tensor, levels: list[Tensor] | None) -> Tensor:
    """Visual tokens [V, D] and their ``levels``, each [V, D], as rows [V, W]."""
    return torch.cat([tokens, *levels], dim=-1) if levels else tokens


def split(rows: Tensor, width: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Input embeddings [..., D] and the levels, each [..., D], of ``rows`` [..., W]; D is
    ``width``."""
    if rows.shape[-1] == width:
        return rows, ()
    embeds, *levels = rows.split(width, dim=-1)
    return embeds, tuple(levels)
