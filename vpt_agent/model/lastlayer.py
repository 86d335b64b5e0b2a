"""The last layer of a training pass, for those positions only whose states somebody reads.

A loss reads the states before labels, a call the state before its control token; what the last
layer computes elsewhere serves nothing but its keys and values. So these are computed for all
positions, and queries, attention and MLP for the few. The same function; of a language model of six
layers it saves up to a sixth, of one of 28 a 28th.

R rows, Q queries, S keys, m states asked for in a row, D width, d head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vpt_agent.model.modeling import VPTForConditionalGeneration

Rotary = tuple[Tensor, Tensor]
WORTH = 2
"""Narrowed where at most one position in so many is read."""


def narrows(model: VPTForConditionalGeneration, levels: int) -> bool:
    """Whether the last layer can be narrowed: one that is known, as transformers made it (sdpa; no
    adapters, hooks or shards), without gradient checkpoints; ``levels`` layers get DeepStack's."""
    text = model.model
    last = text.layers[-1]
    checkpoints = getattr(last, "gradient_checkpointing", False) and last.training
    return (
        model.direct_decoder(gradients=True) is not None
        and not checkpoints
        and levels < len(text.layers)
    )


def asked(wanted: Tensor) -> Tensor | None:
    """Columns [R, m] where ``wanted`` [R, Q] (CPU) is true, -1 behind a row's last; None: too many
    to be worth it."""
    counts = wanted.sum(1)
    m = max(1, int(counts.max()))
    if m * WORTH > wanted.shape[1]:
        return None
    order = torch.argsort(wanted.to(torch.int8), dim=1, descending=True, stable=True)[:, :m]
    return order.masked_fill(torch.arange(m) >= counts[:, None], -1)


def last_layer(
    model: VPTForConditionalGeneration,
    hidden: Tensor,
    places: Tensor,
    rotary: Rotary,
    mask: Tensor | None,
    past: tuple[Tensor, Tensor] | None,
    columns: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """States behind the last layer [R, Q, D], zero but for ``columns`` [R, m]; keys and values
    [R, heads, S, d] of all.

    ``hidden`` [R, Q, D] at ``places`` [3, R, Q]; ``mask`` bool [R, 1, Q, S] (None: causal, no
    ``past``): attention is sdpa here.
    """
    layer: Any = model.model.layers[-1]
    key, value = _keys_and_values(model, layer, hidden, places)
    if past is not None:
        key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
    real = (columns >= 0).to(hidden.device)
    at = columns.clamp(min=0).to(hidden.device)
    if mask is None:
        seen = torch.arange(hidden.shape[1], device=hidden.device) <= at[:, :, None]
        narrow = seen[:, None]
    else:
        narrow = mask.take_along_dim(at[:, None, :, None], dim=2)
    chosen: Tensor = layer(
        hidden.take_along_dim(at[:, :, None], dim=1),
        attention_mask=narrow,
        position_embeddings=tuple(t.take_along_dim(at[:, :, None], dim=-2) for t in rotary),
        past_key_values=_Ready(key, value),
        use_cache=True,
    )
    index = (at + torch.arange(len(at), device=at.device)[:, None] * hidden.shape[1])[real]
    states = torch.zeros_like(hidden).flatten(0, 1).index_copy(0, index, chosen[real])
    return states.view_as(hidden), key, value


class _Ready:
    """A cache of one layer that has all keys and values already, the new ones, too."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.known = key, value

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [R, heads, S, d]."""
        return self.known


def _keys_and_values(
    model: VPTForConditionalGeneration, layer: Any, hidden: Tensor, places: Tensor
) -> tuple[Tensor, Tensor]:
    """What ``layer`` keeps of ``hidden`` [R, Q, D]: [R, heads, Q, d] each."""
    direct = model.direct_decoder(gradients=True)
    assert direct is not None
    normed = layer.input_layernorm(hidden)
    shape = (*hidden.shape[:2], direct.kv_heads, direct.head_dim)
    key, value = (
        project(normed).view(shape) for project in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    cos, sin = direct.angles(places, hidden.dtype)
    a, b = key.chunk(2, dim=-1)
    key = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return key.transpose(1, 2), value.transpose(1, 2)
