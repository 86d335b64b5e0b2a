"""Group advantages and the clipped objective (GRPO; "Dr. GRPO" without the division)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt_agent.training.reinforce.config import Group, Mean

SPREAD = 1e-6
"""Rewards of a group that lie closer than this are equal: nothing can be learnt from them."""


def advantages(rewards: Sequence[float], *, group: Group) -> list[float] | None:
    """How much better than its group each run was; None where all were worth the same.

    ``none``: reward less the mean, so that a small price stays small. ``std``: divided by the
    standard deviation (with n - 1), as in GRPO: there a group that differs in the price only counts
    as much as one that differs in being right.
    """
    values = torch.tensor(rewards, dtype=torch.float64)
    if float(values.max() - values.min()) < SPREAD:
        return None
    centred = values - values.mean()
    if group == "std":
        centred = centred / values.std()
    result: list[float] = centred.tolist()
    return result


@dataclass(frozen=True)
class Objective:
    """``loss`` (scalar, with gradient) of one batch, and sums over its choices [n] for the figures:
    ``kl`` to the start model, ``ratio`` (sum of |ratio - 1|), ``clipped`` choices."""

    loss: Tensor
    kl: float
    ratio: float
    clipped: int


def weights_of(lengths: Sequence[int], *, mean: Mean) -> list[float]:
    """The weight of each choice of sequences with ``lengths`` choices; they sum to 1."""
    filled = [n for n in lengths if n]
    if mean == "token":
        return [1 / sum(filled)] * sum(filled)
    return [1 / (n * len(filled)) for n in filled for _ in range(n)]


def objective(
    scores: Tensor,
    old: Tensor,
    advantage: Tensor,
    weights: Tensor,
    *,
    clip: float,
    start: Tensor | None = None,
    kl: float = 0.0,
) -> Objective:
    """The loss of choices with log probabilities ``scores`` [n], drawn with ``old`` [n].

    -min(r A, clamp(r, 1 - clip, 1 + clip) A) with r = exp(scores - old), plus ``kl`` times the
    unbiased, positive estimate exp(d) - d - 1, d = ``start`` - ``scores``; weighted by ``weights``.
    """
    ratio = torch.exp(scores - old)
    within = ratio.clamp(1 - clip, 1 + clip)
    loss = -(torch.minimum(ratio * advantage, within * advantage) * weights).sum()
    away = 0.0
    if start is not None:
        difference = start - scores
        divergence = torch.exp(difference) - difference - 1
        away = float(divergence.detach().sum())
        if kl:
            loss = loss + kl * (divergence * weights).sum()
    moved = ratio.detach()
    outside = (moved * advantage) > (within.detach() * advantage)
    return Objective(loss, away, float((moved - 1).abs().sum()), int(outside.sum()))
