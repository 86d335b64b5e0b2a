"""The training forward without computing anything twice: the same function, about half the work.

A control state depends only on what stands before its token. So the tokens up to there are run
once, their keys and values are kept (with gradients), and the rest of the row goes on from them.
Rows without a call take one pass. A row whose embeddings are masked is run again, since its prefix
is another one. B rows, L positions, D width; R rows, Q queries, S keys of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpt_agent.model.attention import ready_mask
from vpt_agent.model.deepstack import split
from vpt_agent.model.lastlayer import asked, last_layer, narrows

if TYPE_CHECKING:
    from vpt_agent.model.modeling import VPTForConditionalGeneration

Layers = tuple[tuple[Tensor, Tensor], ...]
Stretch = tuple[int, int]


def begin_run(model: VPTForConditionalGeneration) -> None:
    """Say that a run of the language model begins, where somebody asked to be told."""
    if model.runs is not None:
        model.runs.begin()


@dataclass(frozen=True)
class Past:
    """Keys and values [R, heads, S, d] by layer; ``at`` [R, S]: their positions, -1 for padding (on
    the CPU)."""

    rows: tuple[int, ...]
    layers: Layers
    at: Tensor

    def select(self, rows: Sequence[int]) -> Past:
        """The part of some of its rows."""
        if tuple(rows) == self.rows:
            return self
        index = torch.tensor([self.rows.index(r) for r in rows])
        there = index.to(self.layers[0][0].device)
        layers = tuple((k.index_select(0, there), v.index_select(0, there)) for k, v in self.layers)
        return Past(tuple(rows), layers, self.at[index])


@dataclass(frozen=True)
class _Piece:
    """States [R, Q, D] of a block, and their positions [R, Q] (-1 for padding, on the CPU)."""

    rows: tuple[int, ...]
    at: Tensor
    states: Tensor


class Blocks:
    """Runs stretches of a batch's rows through the language model and collects what comes out.

    ``positions`` [3, B, L]. ``hidden`` gives the final-norm states of all stretches that were kept,
    or of ``wanted`` positions (bool [B, L], on the CPU) at least.
    """

    def __init__(
        self, model: VPTForConditionalGeneration, positions: Tensor, wanted: Tensor | None = None
    ) -> None:
        self.model, self.positions, self.wanted = model, positions, wanted
        self._pieces: list[_Piece] = []

    def run(
        self,
        embeds: Tensor,
        stretches: Mapping[int, Stretch],
        past: Past | None = None,
        hidden_keys: Mapping[int, Stretch] | None = None,
    ) -> tuple[Tensor, Past]:
        """Run positions ``stretches`` (first, end) by row of ``embeds`` [B, L, W] behind ``past``.

        A row sees of its past what stands before its stretch, without ``hidden_keys``. Returns the
        states [R, Q, D], each row's from its first on, and the past with the stretch added.
        """
        begin_run(self.model)
        rows = tuple(stretches)
        at = _places(stretches.values())
        block, places = self._take(embeds, rows, at)
        mask = None
        if past is not None:
            past = past.select(rows)
            mask = _visible(past.at, at, stretches, hidden_keys or {}).to(embeds.device)
        known = None if past is None else past.layers
        states, layers = run_block(self.model, block, places, mask, known, self._wanted(rows, at))
        joined = at if past is None else torch.cat([past.at, at], dim=1)
        self._pieces.append(_Piece(rows, at, states))
        return states, Past(rows, layers, joined)

    def whole(self, embeds: Tensor, lengths: Mapping[int, int]) -> None:
        """Run the first ``lengths`` positions of rows of ``embeds`` [B, L, W] afresh."""
        begin_run(self.model)
        rows = tuple(lengths)
        at = _places([(0, end) for end in lengths.values()])
        block, places = self._take(embeds, rows, at)
        # Padding stands on the right, where a causal mask hides it.
        wanted = self._wanted(rows, at)
        if wanted is None:
            states = self.model.run_language_model(block, places)
        else:
            states, _ = run_block(self.model, block, places, None, None, wanted)
        self._pieces.append(_Piece(rows, at, states))

    def _wanted(self, rows: Sequence[int], at: Tensor) -> Tensor | None:
        """Which states [R, Q] of positions ``at`` of ``rows`` are read; None: all."""
        if self.wanted is None:
            return None
        index = torch.tensor(rows)[:, None]
        return self.wanted[index, at.clamp(min=0)] & (at >= 0)

    def _take(self, embeds: Tensor, rows: Sequence[int], at: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [R, Q, W] and position ids [3, R, Q] at ``at`` of ``rows``."""
        index = at.clamp(min=0) + torch.tensor(rows)[:, None] * embeds.shape[1]  # [R, Q]
        flat = index.flatten().to(embeds.device)
        block = embeds.flatten(0, 1).index_select(0, flat).view(*index.shape, -1)
        places = self.positions.flatten(1).index_select(1, flat).view(3, *index.shape)
        return block, places

    def hidden(self, rows: int, length: int) -> Tensor:
        """All states in their places [B, L, D]; zero where nothing was run.

        Where a position was run twice the later run counts, and all that it goes on with.
        """
        owner = torch.full((rows, length), -1)
        for number, piece in enumerate(self._pieces):
            for i, row in enumerate(piece.rows):
                owner[row, int(piece.at[i, 0]) :] = number
        index, values = [], []
        for number, piece in enumerate(self._pieces):
            flat = piece.at.clamp(min=0) + torch.tensor(piece.rows)[:, None] * length
            kept = (piece.at >= 0) & (owner.flatten()[flat] == number)
            chosen = kept.flatten().nonzero().flatten().to(piece.states.device)
            values.append(piece.states.flatten(0, 1).index_select(0, chosen))
            index.append(flat[kept])
        joined = torch.cat(values)
        empty = joined.new_zeros(rows * length, joined.shape[-1])
        everywhere = torch.cat(index).to(joined.device)
        return empty.index_copy(0, everywhere, joined).view(rows, length, -1)


def _places(stretches: Iterable[Stretch]) -> Tensor:
    """Positions [R, Q] of ``stretches``, each from the left, -1 behind its end; on the CPU."""
    known = list(stretches)
    at = torch.full((len(known), max(end - first for first, end in known)), -1)
    for i, (first, end) in enumerate(known):
        at[i, : end - first] = torch.arange(first, end)
    return at


def _visible(
    past: Tensor, at: Tensor, stretches: Mapping[int, Stretch], hidden: Mapping[int, Stretch]
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
    wanted: Tensor | None = None,
) -> tuple[Tensor, Layers]:
    """Final-norm states [R, Q, D] of ``embeds`` [R, Q, W], and keys and values with the new ones.

    ``positions`` [3, R, Q]; ``mask`` bool [R, 1, Q, S + Q] (None: plain causal, no past). Gradients
    flow into ``past``. Gradient checkpointing is obeyed, layer by layer. States that
    are not ``wanted`` (bool [R, Q], on the CPU) may be zero.
    """
    text = model.model
    embeds, levels = split(embeds, model.config.text_config.hidden_size)
    mask = ready_mask(mask, embeds, text.config._attn_implementation)
    rotary = text.rotary_emb(embeds, positions)
    hidden, layers = embeds, []
    columns = None if wanted is None or not narrows(model, len(levels)) else asked(wanted)
    for i, layer in enumerate(text.layers):
        step = _layer_step(layer, mask, rotary)
        known = () if past is None else past[i]
        if columns is not None and i + 1 == len(text.layers):
            joined = known or None
            hidden, key, value = last_layer(model, hidden, positions, rotary, mask, joined, columns)
        elif layer.gradient_checkpointing and layer.training:
            hidden, key, value = checkpoint(step, hidden, *known, use_reentrant=False)
        else:
            hidden, key, value = step(hidden, *known)
        if i < len(levels):
            hidden = hidden + levels[i]
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
