"""One token of one row on a CPU: the pass of :mod:`vpt_agent.model.direct` in the fewest steps.

Weights stream through the caches once a token, so whatever lies between two products starts cold:
each small operator costs some 5 to 50 microseconds, whatever it computes. Norms are folded into the
products (the scale of a row may be multiplied in behind the product), sums into them as well.
Where :mod:`vpt_agent.model.compiled` is in use, that computes the whole pass.

D width, H heads, K key-value heads, d head width, S cache slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache

from vpt_agent.model import compiled

if TYPE_CHECKING:
    from vpt_agent.model.direct import DirectDecoder


def takes(embeds: Tensor, mask: Tensor | None) -> bool:
    """Whether this is one token [1, 1, D] on a CPU that may see its whole row.

    Not in float16: a row that waits for its norm's scale may be larger than float16 holds.
    """
    if mask is not None or embeds.shape[:2] != (1, 1) or embeds.device.type != "cpu":
        return False
    return embeds.dtype != torch.float16


def one_row(decoder: DirectDecoder, embeds: Tensor, positions: Tensor, cache: Cache) -> Tensor:
    """Final-norm hidden state [1, 1, D] of one token ``embeds`` at ``positions`` [3, 1, 1]."""
    whole = compiled.one_row(decoder, embeds, positions, cache)
    if whole is not None:
        return whole
    d, heads, kv = decoder.head_dim, decoder.heads, decoder.kv_heads
    # [d / 2]: text has one position. A model that was cast has the speeds in its type.
    angles = positions[0, 0] * decoder.text.rotary_emb.inv_freq.float()
    cos, sin = angles.cos() * decoder.scaling, angles.sin() * decoder.scaling
    cos, sin = cos.to(embeds.dtype), torch.stack((-sin, sin)).to(embeds.dtype)  # [d/2], [2, d/2]
    made = embeds.new_empty((heads + 2 * kv) * d)  # queries, keys, values of a layer
    ends = (heads * d, (heads + kv) * d)
    q, k, v = made[: ends[0]], made[ends[0] : ends[1]], made[ends[1] :]
    halves = made[: ends[1]].view(heads + kv, 2, d // 2)
    values = v.view(1, kv, 1, d)
    x = embeds.reshape(-1)
    for index, layer in enumerate(decoder.layers):
        row, scale = _normed(x, layer.before, decoder.eps)
        for part, linear in ((q, layer.q), (k, layer.k), (v, layer.v)):
            _product(linear, row, scale, part)
        turned = torch.addcmul(halves * cos, halves.flip(1), sin)  # [H + K, 2, d / 2]
        keys, seen = cache.update(turned[heads:].view(1, kv, 1, d), values, index)  # [1, K, S, d]
        # The heads that share keys are rows of one head.
        queries = turned[:heads].view(1, kv, heads // kv, d)
        out = functional.scaled_dot_product_attention(queries, keys, seen)
        x = torch.addmv(x, layer.o["weight"], out.view(-1))
        row, scale = _normed(x, layer.between, decoder.eps)
        gate = functional.silu(_product(layer.gate, row, scale), inplace=True)
        x = torch.addmv(x, layer.down["weight"], gate.mul_(_product(layer.up, row, scale)))
    row, scale = _normed(x, decoder.text.norm._parameters, decoder.eps)
    return (row * scale).view(1, 1, -1)


def _normed(x: Tensor, norm: Mapping[str, Any], eps: float) -> tuple[Tensor, float]:
    """``x`` [D] times a norm's weight, and the scale that is still to be multiplied in."""
    whole = x.float()
    mean = torch.dot(whole, whole).item() / x.shape[0]
    return x * norm["weight"], float((mean + eps) ** -0.5)


def _product(
    linear: Mapping[str, Any], row: Tensor, scale: float, out: Tensor | None = None
) -> Tensor:
    """Weight times ``row``, times ``scale``, plus bias: [m]."""
    weight, bias = linear["weight"], linear["bias"]
    if bias is None:
        start = row.new_empty(weight.shape[0]) if out is None else out
        return torch.addmv(start, weight, row, beta=0, alpha=scale, out=start)
    if out is None:
        return torch.addmv(bias, weight, row, alpha=scale)
    return torch.addmv(bias, weight, row, alpha=scale, out=out)
