"""Log probabilities of an episode's choices, computed again in one forward with gradients.

The forward sees what the run saw (pictures, crops, conditioned features), under the causal control
rule; each choice is scored under the constraint and the temperature it was drawn with. For the
weights that sampled them the values equal the recorded ones; a test holds that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vpt_agent.data import IGNORED, Encoded
from vpt_agent.errors import UserError
from vpt_agent.model.masking import MaskRule
from vpt_agent.training.collate import Collator, Item
from vpt_agent.training.reinforce.episode import Choice, Episode
from vpt_agent.types import View

if TYPE_CHECKING:
    from vpt_agent.model import VPTForConditionalGeneration


class Scorer:
    """Scores episodes with a model; ``collator`` makes its batches."""

    def __init__(self, collator: Collator, device: torch.device) -> None:
        self.collator, self.device = collator, device

    def batch(self, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Arguments of ``forward``; the labels are the choices."""
        items = [
            Item(f"rollout {i}", _encoded(e), e.views, {n: _key(v) for n, v in e.views.items()})
            for i, e in enumerate(episodes)
        ]
        made = self.collator.batch(items)
        made.pop("rows")
        moved: dict[str, Any] = _to(made, self.device)
        return moved

    def score(
        self,
        model: VPTForConditionalGeneration,
        episodes: Sequence[Episode],
        batch: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Log probabilities [n] float32 of all choices of ``episodes``, one after the other."""
        if not any(episode.choices for episode in episodes):
            raise UserError("there is no choice to score", where="Scorer.score")
        output = model(
            **(self.batch(episodes) if batch is None else batch),
            control="causal",
            passes="one",
            masking=MaskRule(),  # the engine never masks
            labelled_only=True,
        )
        logits: Tensor = output.logits  # [n, vocab] float32
        choices = [choice for episode in episodes for choice in episode.choices]
        heat = torch.tensor(
            [e.temperature for e in episodes for _ in e.choices], device=logits.device
        )
        kept = logits.masked_fill(
            ~open_ids(choices, logits.shape[-1]).to(logits.device), -torch.inf
        )
        ids = torch.tensor([choice.id for choice in choices], device=logits.device)
        scores = torch.log_softmax(kept / heat[:, None], -1)
        return scores.gather(1, ids[:, None])[:, 0]


def open_ids(choices: Sequence[Choice], vocabulary: int) -> Tensor:
    """Which ids could stand at each choice: bool [n, vocabulary]."""
    rows: dict[tuple[frozenset[int] | None, frozenset[int]], Tensor] = {}
    for choice in choices:
        key = (choice.allowed, choice.banned)
        if key not in rows:
            row = torch.full((vocabulary,), choice.allowed is None)
            row[sorted(choice.allowed or ())] = True
            row[sorted(choice.banned)] = False
            rows[key] = row
    return torch.stack([rows[choice.allowed, choice.banned] for choice in choices])


def drawn(episodes: Sequence[Episode]) -> Tensor:
    """The recorded log probabilities [n] float32 of all choices."""
    return torch.tensor([choice.logprob for e in episodes for choice in e.choices])


def _key(view: View) -> str:
    """Names a picture to its tower: rollouts of a group show the same one, encoded once."""
    return f"{'whole' if view.parent is None else 'crop'} {view.sha256}"


def _encoded(episode: Episode) -> Encoded:
    labels = [IGNORED] * len(episode.record.ids)
    for choice in episode.choices:
        labels[choice.position] = choice.id
    return Encoded(episode.record, tuple(labels))


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    return value
