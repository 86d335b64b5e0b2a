"""The training forward without computing anything twice: the same function, about half the work.

A control state depends only on what stands before its token. So the tokens up to there are run
once, their keys and values are kept (with gradients), and the rest of the row goes on from them.
Rows without a call take one pass. A row whose embeddings are masked is run again, since its prefix
is another one. B rows, L positions, D width; R rows, Q queries, S keys of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from vpt_agent.model.modeling import VPTForConditionalGeneration

Layers = tuple[tuple[Tensor, Tensor], ...]
Stretch = tuple[int, int]


@dataclass(frozen=True)
class Past:
    """Keys and values [R, heads, S, d] by layer; ``at`` [R, S]: their positions, -1 for padding."""

    rows: tuple[int, ...]
    layers: Layers
    at: Tensor

    def select(self, rows: Sequence[int]) -> Past:
        """The part of some of its rows."""
        if tuple(rows) == self.rows:
            return self
        index = torch.tensor([self.rows.index(r) for r in rows], device=self.at.device)
        layers = tuple((k[index], v[index]) for k, v in self.layers)
        return Past(tuple(rows), layers, self.at[index])


class Blocks:
    """Runs stretches of a batch's rows through the language model and collects what comes out.

    ``positions`` [3, B, L]. ``hidden`` gives the final-norm states of all stretches that were kept.
    """

    def __init__(self, model: VPTForConditionalGeneration, positions: Tensor) -> None:
        self.model, self.positions = model, positions
        self._pieces: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def run(
        self,
        embeds: Tensor,
        stretches: dict[int, Stretch],
        past: Past | None = None,
        hidden_keys: dict[int, Stretch] | None = None,
    ) -> tuple[Tensor, Past]:
        """Run positions ``stretches`` (first, end) by row of ``embeds`` [B, L, D] behind ``past``.

        A row sees of its past what stands before its stretch, without ``hidden_keys``. Returns the
        states [R, Q, D], each row's from its first on, and the past with the stretch added.
        """
        rows = tuple(stretches)
        width = max(end - first for first, end in stretches.values())
        at = torch.full((len(rows), width), -1)
        for i, (first, end) in enumerate(stretches.values()):
            at[i, : end - first] = torch.arange(first, end)
        at = at.to(embeds.device)
        index = torch.tensor(rows, device=embeds.device)[:, None], at.clamp(min=0)
        block = embeds[index]  # [R, Q, D]
        places = self.positions[:, index[0], index[1]]  # [3, R, Q]
        mask = None
        if past is not None:
            past = past.select(rows)
            mask = _visible(past.at, at, stretches, hidden_keys or {})
        states, layers = run_block(self.model, block, places, mask, past and past.layers)
        joined = at if past is None else torch.cat([past.at, at], dim=1)
        self.keep(rows, at, states)
        return states, Past(rows, layers, joined)

    def whole(self, embeds: Tensor, lengths: dict[int, int]) -> None:
        """Run the first ``lengths`` positions of rows of ``embeds`` [B, L, D] afresh."""
        rows = tuple(lengths)
        width = max(lengths.values())
        index = torch.tensor(rows, device=embeds.device)
        # Padding stands on the right, where a causal mask hides it.
        states = self.model.run_language_model(
            embeds[index, :width], self.positions[:, index, :width]
        )
        at = torch.arange(width, device=embeds.device).expand(len(rows), width)
        ends = torch.tensor(list(lengths.values()), device=embeds.device)[:, None]
        for row in rows:
            self._pieces.pop(row, None)
        self.keep(rows, torch.where(at < ends, at, -1), states)

    def keep(self, rows: Sequence[int], at: Tensor, states: Tensor) -> None:
        """Remember ``states`` [R, Q, D] at positions ``at`` [R, Q]; later ones win."""
        for i, row in enumerate(rows):
            self._pieces.setdefault(row, []).append((at[i], states[i]))

    def hidden(self, rows: int, length: int) -> Tensor:
        """All states in their places [B, L, D]; zero where nothing was run."""
        index: list[Tensor] = []
        values: list[Tensor] = []
        for row, pieces in sorted(self._pieces.items()):
            for number, (at, states) in enumerate(pieces):
                kept = at >= 0
                for later, _ in pieces[number + 1 :]:
                    first = later[0] if int(later[0]) >= 0 else length
                    kept = kept & (at < first)
                index.append(at[kept] + row * length)
                values.append(states[kept])
        flat = torch.cat(values)
        empty = flat.new_zeros(rows * length, flat.shape[-1])
        return empty.index_copy(0, torch.cat(index), flat).view(rows, length, -1)


def _visible(
    past: Tensor, at: Tensor, stretches: dict[int, Stretch], hidden: dict[int, Stretch]
) -> Tensor:
    """Which keys each query sees: bool [R, 1, Q, S + Q], by their positions."""
    known = past.clone()
    for i, (row, (first, _)) in enumerate(stretches.items()):
        known[i][past[i] >= first] = -1
        if row in hidden:
            start, end = hidden[row]
            known[i][(past[i] >= start) & (past[i] < end)] = -1
    keys = torch.cat([known, at], dim=1)[:, None, :]  # [R, 1, S + Q]
    queries = at[:, :, None]  # [R, Q, 1]
    # A padded query must see something, or it would be no number; nothing reads it.
    seen = ((keys >= 0) & (keys <= queries)) | (queries < 0)
    return seen[:, None]


class _Joining:
    """A cache of one layer for one call: gives back the past with what is new."""

    def __init__(self, past: tuple[Tensor, Tensor] | None) -> None:
        self.past = past

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [R, heads, S + Q, d]."""
        if self.past is not None:
            key = torch.cat([self.past[0], key], dim=2)
            value = torch.cat([self.past[1], value], dim=2)
        self.past = (key, value)
        return self.past


def run_block(
    model: VPTForConditionalGeneration,
    embeds: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    past: Layers | None,
) -> tuple[Tensor, Layers]:
    """Final-norm states [R, Q, D] of ``embeds`` [R, Q, D], and keys and values with the new ones.

    ``positions`` [3, R, Q]; ``mask`` bool [R, 1, Q, S + Q] (None: plain causal, no past). Gradients
    flow into ``past``. Gradient checkpointing is obeyed, layer by layer.
    """
    text = model.model
    if mask is not None and text.config._attn_implementation == "eager":
        lowest = torch.finfo(embeds.dtype).min
        mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, lowest)
    if mask is None and text.config._attn_implementation == "eager":
        q = embeds.shape[1]
        lowest = torch.finfo(embeds.dtype).min
        mask = torch.full((1, 1, q, q), lowest, device=embeds.device, dtype=embeds.dtype).triu(1)
    rotary = text.rotary_emb(embeds, positions)
    hidden, layers = embeds, []
    for i, layer in enumerate(text.layers):
        step = _layer_step(layer, mask, rotary)
        known = () if past is None else past[i]
        if layer.gradient_checkpointing and layer.training:
            hidden, key, value = checkpoint(step, hidden, *known, use_reentrant=False)
        else:
            hidden, key, value = step(hidden, *known)
        layers.append((key, value))
    return text.norm(hidden), tuple(layers)


def _layer_step(
    layer: nn.Module, mask: Tensor | None, rotary: tuple[Tensor, Tensor]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def step(hidden: Tensor, *past: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joining = _Joining((past[0], past[1]) if past else None)
        module: Any = layer
        on = module.gradient_checkpointing
        module.gradient_checkpointing = False  # transformers' own would drop the past
        try:
            result = module(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                past_key_values=joining,
                use_cache=True,
            )
        finally:
            module.gradient_checkpointing = on
        assert joining.past is not None
        return (result, *joining.past)

    return step
