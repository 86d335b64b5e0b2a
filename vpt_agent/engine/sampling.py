"""Choosing the next token: greedy or sampled, under a constraint whose cost is recorded."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
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

    @property
    def kept(self) -> int:
        """:attr:`top_k` as tensors can hold it: no vocabulary is larger."""
        return min(self.top_k, 2**31)


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
        self._chances: deque[float] = deque()  # drawn already, for a device that ran ahead
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
        chance = torch.tensor(self.take(), dtype=torch.float64, device=logprobs.device)
        token, drawn = draw(logprobs[None], Draw.of([s], logprobs.device), chance[None])
        return int(token), float(drawn)

    def ahead(self, count: int) -> list[float]:
        """The next ``count`` random numbers in [0, 1), one for each token that is drawn; they stay
        the next ones until :meth:`take` takes them."""
        missing = count - len(self._chances)
        if missing > 0:
            # One by one, so that the numbers do not depend on how many are asked for at once.
            new = [torch.rand((), dtype=torch.float64, generator=self._generator)
                   for _ in range(missing)]  # fmt: skip
            self._chances += [float(x) for x in new]
        return [self._chances[i] for i in range(count)]

    def take(self) -> float:
        """The next random number."""
        self.ahead(1)
        return self._chances.popleft()

    def probability_of(self, logits: Tensor, token: int) -> float:
        """Probability of ``token`` without any constraint: what a forced token's mass was."""
        return float(torch.log_softmax(logits.float(), -1)[token].exp())


@dataclass(frozen=True)
class Draw:
    """How rows are drawn: ``temperature`` [R] (more than 0), ``top_k`` [R] (0: off), ``top_p`` [R],
    all on the device; ``filters`` is False where top-k and top-p are off in every row."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    filters: bool

    @classmethod
    def of(cls, rows: Sequence[Sampling], device: torch.device) -> Draw:
        """The settings of ``rows``."""
        return cls(
            torch.tensor([s.temperature for s in rows], dtype=torch.float64, device=device),
            torch.tensor([s.kept for s in rows], device=device),
            torch.tensor([s.top_p for s in rows], dtype=torch.float64, device=device),
            any(filtered(s) for s in rows),
        )


def filtered(sampling: Sampling) -> bool:
    """Whether top-k or top-p leave tokens out."""
    return bool(sampling.top_k) or sampling.top_p < 1


def draw(logprobs: Tensor, how: Draw, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [R] int64 drawn from ``logprobs`` [R, vocab] with one random number ``chance`` [R]
    float64 in [0, 1) each, and the log probabilities [R] float64 with which they were drawn.

    The token is the first whose cumulative probability, in the order of ids, is above the chance.
    Only operators with fixed shapes, so that a device draws as the host does, without it.
    """
    # From the largest down and in double, so that no small temperature overflows.
    scaled = (logprobs - logprobs.amax(-1, keepdim=True)).double() / how.temperature[:, None]
    if how.filters:
        scaled = _filtered(scaled, how)
    weights = scaled.softmax(-1)
    sums = weights.cumsum(-1)
    total = sums[:, -1:]
    found = torch.searchsorted(sums, chance[:, None] * total, right=True)
    # Rounding must not lead behind the last token that has any weight.
    token = torch.minimum(found, (sums < total).sum(-1, keepdim=True))
    return token[:, 0], weights.gather(-1, token)[:, 0].log()


def _filtered(scaled: Tensor, how: Draw) -> Tensor:
    """``scaled`` [R, vocab] without what top-k, and then top-p, leave out."""
    vocab = scaled.shape[-1]
    ordered = scaled.sort(descending=True, stable=True).values
    # Never a number in torch.where: on CUDA it would be copied there, which a graph forbids.
    last = how.top_k.clamp(max=vocab).masked_fill(how.top_k <= 0, vocab) - 1
    scaled = scaled.masked_fill(scaled < ordered.gather(-1, last[:, None]), float("-inf"))
    ordered, order = scaled.softmax(-1).sort(descending=True, stable=True)
    # Keep the smallest set whose mass reaches top_p: drop what comes after it.
    drop = (ordered.cumsum(-1) - ordered >= how.top_p[:, None]) & (how.top_p[:, None] < 1)
    return scaled.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))


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
