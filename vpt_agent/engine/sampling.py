"""Choosing the next token: greedy or sampled, under a constraint whose cost is recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt_agent.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 switch those off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or self.temperature < 0:
            raise UserError("temperature must be 0 (greedy) or more", got=repr(self.temperature))
        if not _is_whole(self.top_k) or self.top_k < 0:
            raise UserError("top_k must be 0 (off) or more, a whole number", got=repr(self.top_k))
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UserError("top_p must be in (0, 1]", got=repr(self.top_p))
        if self.seed is not None and not (_is_whole(self.seed) and -(2**63) <= self.seed < 2**63):
            raise UserError(
                "the seed must be a whole number of 64 bits, or None", got=repr(self.seed)
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Choice:
    """A token, its log probability under the constraint, and the mass the constraint removed.

    ``free`` is what greedy decoding without the constraint would have taken. ``drawn`` is the log
    probability with which the token was drawn: under the constraint, the temperature, top-k and
    top-p; 0 where decoding is greedy.
    """

    token: int
    logprob: float
    removed: float
    free: int
    drawn: float


class Sampler:
    """One run's random numbers: the same seed gives the same tokens, alone or in a batch."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._last: tuple[tuple[object, ...], Tensor | None] | None = None
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(
        self,
        logits: Tensor,
        *,
        allowed: Iterable[int] | Tensor | None = None,
        banned: Iterable[int] = (),
    ) -> Choice:
        """Pick from ``logits`` [vocab] float32; only ``allowed`` ids (or where a bool tensor [n],
        n at most vocab, is true), none of ``banned``.

        Logits that are no numbers are a :class:`UserError`: nothing can be chosen by them.
        """
        logprobs = torch.log_softmax(logits.float(), -1)
        free = int(logprobs.argmax())
        if math.isnan(float(logprobs[free])):
            raise UserError(
                "the model computes no numbers: its logits are NaN",
                where="Sampler",
                fix="load it with dtype='float32' or 'bfloat16' (float16 overflows), and check "
                "the checkpoint",
            )
        removed = 0.0
        keep = self._kept(logprobs, allowed, banned)
        if keep is not None:
            kept = logprobs.masked_fill(~keep, float("-inf"))
            mass = torch.logsumexp(kept, -1)
            removed = max(0.0, 1.0 - float(mass.exp()))
            logprobs = kept - mass
        token, drawn = self._pick(logprobs)
        return Choice(token, float(logprobs[token]), removed, free, drawn)

    def _kept(
        self,
        logprobs: Tensor,
        allowed: Iterable[int] | Tensor | None,
        banned: Iterable[int],
    ) -> Tensor | None:
        """Where ids may be chosen, bool [vocab]; None: everywhere. The last sets that do not change
        are remembered: most tokens of a turn come under the same ones."""
        fixed = isinstance(banned, frozenset) and isinstance(allowed, frozenset | None)
        under = (allowed, banned, len(logprobs), logprobs.device)
        if fixed and self._last is not None and self._last[0] == under:
            return self._last[1]
        keep = _mask(logprobs, allowed, banned)
        if fixed:
            self._last = under, keep
        return keep

    def _pick(self, logprobs: Tensor) -> tuple[int, float]:
        s = self.sampling
        if s.temperature == 0:
            return int(logprobs.argmax()), 0.0
        # From the largest down and in double, so that no small temperature overflows.
        scaled = (logprobs - logprobs.max()).double() / s.temperature
        if s.top_k:
            bound = scaled.topk(min(s.top_k, scaled.shape[-1])).values[-1]
            scaled = scaled.masked_fill(scaled < bound, float("-inf"))
        if s.top_p < 1:
            ordered, order = scaled.softmax(-1).sort(descending=True)
            # Keep the smallest set whose mass reaches top_p: drop what comes after it.
            drop = ordered.cumsum(-1) - ordered >= s.top_p
            scaled = scaled.index_fill(-1, order[drop], float("-inf"))
        weights = scaled.softmax(-1).cpu()
        token = int(torch.multinomial(weights, 1, generator=self._generator))
        return token, float(weights[token].log())

    def probability_of(self, logits: Tensor, token: int) -> float:
        """Probability of ``token`` without any constraint: what a forced token's mass was."""
        return float(torch.log_softmax(logits.float(), -1)[token].exp())


def _mask(
    logprobs: Tensor, allowed: Iterable[int] | Tensor | None, banned: Iterable[int]
) -> Tensor | None:
    """True at ids of ``logprobs`` [vocab] that are allowed (None: any) and not banned; None where
    that is all of them."""
    keep: Tensor | None = None
    if allowed is not None:
        keep = torch.zeros_like(logprobs, dtype=torch.bool)
        if isinstance(allowed, Tensor):
            keep[: len(allowed)] = allowed.to(keep.device)
        else:
            keep[torch.tensor(sorted(allowed), device=keep.device)] = True
    ban = sorted(banned)
    if ban:
        if keep is None:
            keep = torch.ones_like(logprobs, dtype=torch.bool)
        keep[torch.tensor(ban, device=keep.device)] = False
    return keep
