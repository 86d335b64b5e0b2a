"""One step of the policy gradient: rollouts in, moved weights and figures out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vpt_agent.errors import TrainingError
from vpt_agent.training.reinforce.config import UpdatePart
from vpt_agent.training.reinforce.episode import Episode
from vpt_agent.training.reinforce.objective import Objective, advantages, objective, weights_of
from vpt_agent.training.reinforce.rollouts import Rollout
from vpt_agent.training.reinforce.scoring import Scorer, drawn

if TYPE_CHECKING:
    from vpt_agent.model import VPTForConditionalGeneration


@dataclass(frozen=True)
class _Part:
    """Conversations that are computed together; tensors [n] over their choices."""

    episodes: tuple[Episode, ...]
    batch: dict[str, Any]
    old: Tensor
    advantage: Tensor
    weights: Tensor
    start: Tensor | None


class Learner:
    """AdamW on ``model``'s parameters that learn. ``start`` is the start model (None: no KL)."""

    def __init__(
        self,
        model: VPTForConditionalGeneration,
        scorer: Scorer,
        part: UpdatePart,
        *,
        start: VPTForConditionalGeneration | None = None,
    ) -> None:
        self.model, self.scorer, self.part, self.start = model, scorer, part, start
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        learning = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            learning,
            lr=part.learning_rate,
            betas=part.betas,
            eps=part.epsilon,
            weight_decay=part.weight_decay,
        )

    def step(self, groups: Sequence[Sequence[Rollout]], *, number: int) -> dict[str, float]:
        """Learn from ``groups`` in step ``number`` (from 1).

        Figures: ``skipped`` share of groups without spread, ``choices`` learnt from; of the first
        pass ``loss`` and ``gap`` (the largest difference between a recorded and a computed log
        probability: rounding only, unless something is wrong); of the last one, before its step,
        ``kl`` to the start model a choice, ``ratio`` (mean |ratio - 1|; with one pass it is the
        rounding again) and the ``clipped`` share. Where all groups were skipped nothing moves. A
        loss that is no number is a :class:`TrainingError`.
        """
        kept, skipped = self._kept(groups)
        told = {"skipped": skipped / len(groups), "choices": 0.0}
        if not kept:
            return told
        rate = self.part.learning_rate * min(1.0, number / max(1, self.part.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = list(self._parts(kept))
        n = sum(len(part.old) for part in parts)
        told |= {"choices": float(n), "rate": rate}
        for turn in range(self.part.passes):
            done, gap = self._pass(parts, number)
            if turn == 0:
                told |= {"loss": sum(float(d.loss.detach()) for d in done), "gap": gap}
        told["ratio"] = sum(d.ratio for d in done) / n
        told["clipped"] = sum(d.clipped for d in done) / n
        if self.start is not None:
            told["kl"] = sum(d.kl for d in done) / n
        return told

    def _kept(self, groups: Sequence[Sequence[Rollout]]) -> tuple[list[tuple[Episode, float]], int]:
        """Episodes with their advantages, the longest last; the number of groups skipped."""
        kept: list[tuple[Episode, float]] = []
        skipped = 0
        for group in groups:
            found = advantages([r.reward for r in group], group=self.part.advantage)
            if found is None:
                skipped += 1
                continue
            kept += [(r.episode, a) for r, a in zip(group, found, strict=True) if r.episode]
        return sorted(kept, key=lambda pair: len(pair[0].record.ids)), skipped

    def _parts(self, kept: Sequence[tuple[Episode, float]]) -> Iterator[_Part]:
        device = self.scorer.device
        lengths = [len(episode.choices) for episode, _ in kept]
        weights = iter(weights_of(lengths, mean=self.part.mean))
        for first in range(0, len(kept), self.part.rows):
            pairs = kept[first : first + self.part.rows]
            episodes = tuple(episode for episode, _ in pairs)
            repeated = [a for episode, a in pairs for _ in episode.choices]
            batch = self.scorer.batch(episodes)
            start = None
            if self.start is not None:
                with torch.no_grad():
                    start = self.scorer.score(self.start, episodes, batch)
            yield _Part(
                episodes,
                batch,
                drawn(episodes).to(device),
                torch.tensor(repeated, device=device),
                torch.tensor([next(weights) for _ in repeated], device=device),
                start,
            )

    def _pass(self, parts: Sequence[_Part], number: int) -> tuple[list[Objective], float]:
        self.optimizer.zero_grad(set_to_none=True)
        done, gap = [], 0.0
        for part in parts:
            scores = self.scorer.score(self.model, part.episodes, part.batch)
            made = objective(
                scores,
                part.old,
                part.advantage,
                part.weights,
                clip=self.part.clip,
                start=part.start,
                kl=self.part.kl or 0.0,
            )
            if not math.isfinite(float(made.loss.detach())):
                raise TrainingError(
                    "the loss is no number any more",
                    where=f"step {number}",
                    got=float(made.loss.detach()),
                    fix="lower update.learning_rate or raise update.warmup",
                )
            made.loss.backward()
            gap = max(gap, float((scores.detach() - part.old).abs().max()))
            done.append(made)
        learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(learning, self.part.max_norm)
        self.optimizer.step()
        return done, gap

    # --- what a resume needs ------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write AdamW's state: one tensor for each name and quantity."""
        state = self.optimizer.state_dict()["state"]
        tensors = {
            f"{key}/{self.names[index]}": value.detach().cpu().contiguous()
            for index, values in state.items()
            for key, value in values.items()
        }
        save_file(tensors, path)

    def load(self, path: Path) -> None:
        """Take up what :meth:`save` wrote."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(path).items():
            key, _, parameter = name.partition("/")
            state.setdefault(self.names.index(parameter), {})[key] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
