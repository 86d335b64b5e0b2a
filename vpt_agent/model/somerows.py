"""One token each of some rows on a CPU: the pass of :mod:`vpt_agent.model.direct` by columns.

For a dozen rows MKL multiplies a weight with their columns faster than their rows with the weight,
so here what goes through a layer stands as columns [D, R] and is turned for the attention only.
Sums are part of the products.

R rows, D width, H heads, K key-value heads, G = H / K, d head width, S cache slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from vpt_agent.model.direct import DirectDecoder

MOST = 64
"""Rows, at most: with more, products by rows are as fast (measured with MKL and oneDNN)."""
_DTYPES = (torch.float32, torch.bfloat16)


def takes(embeds: Tensor) -> bool:
    """Whether these are one token [R, 1, D] each of 2 to :data:`MOST` rows on a CPU."""
    rows, length = embeds.shape[:2]
    some = length == 1 and 1 < rows <= MOST
    return some and embeds.device.type == "cpu" and embeds.dtype in _DTYPES


def some_rows(
    decoder: DirectDecoder, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache
) -> Tensor:
    """Final-norm hidden states [R, 1, D] of ``embeds`` [R, 1, D] at ``positions`` [3, R, 1];
    ``mask`` bool [R, 1, 1, S], or None where all rows are as long."""
    d, heads, kv = decoder.head_dim, decoder.heads, decoder.kv_heads
    rows, groups = embeds.shape[0], heads // kv
    angles = (
        positions[0] * decoder.text.rotary_emb.inv_freq.float()
    )  # [R, d / 2]: text has one position
    cos, sin = angles.cos() * decoder.scaling, angles.sin() * decoder.scaling
    cos = cos.to(embeds.dtype)[:, None, None]  # [R, 1, 1, d / 2]
    sin = torch.stack((-sin, sin), dim=1).to(embeds.dtype)[:, None]  # [R, 1, 2, d / 2]
    made = embeds.new_empty((heads + 2 * kv) * d, rows)  # queries, keys, values of a layer
    q, k, v = made.split((heads * d, kv * d, kv * d))
    wide = decoder.layers[0].gate["weight"].shape[0]
    gate, up = embeds.new_empty(wide, rows), embeds.new_empty(wide, rows)
    x = embeds.view(rows, -1).t().contiguous()  # [D, R]
    for index, layer in enumerate(decoder.layers):
        normed = _normed(x, layer.before["weight"], decoder.eps)
        for part, linear in ((q, layer.q), (k, layer.k), (v, layer.v)):
            _product(linear, normed, part)
        turned = made.t().contiguous().view(rows, heads + 2 * kv, 2, d // 2)
        both, values = turned.split((heads + kv, kv), dim=1)
        both = torch.addcmul(both * cos, both.flip(2), sin).view(rows, -1, d)  # [R, H + K, d]
        queries, keys = both.split((heads, kv), dim=1)
        keys, seen = cache.update(
            keys.unsqueeze(2), values.reshape(rows, kv, 1, d), index
        )  # [R, K, S, d]
        # The heads that share keys are rows of one head.
        out = functional.scaled_dot_product_attention(
            queries.view(rows, kv, groups, d), keys, seen, attn_mask=mask
        )
        x = torch.addmm(x, layer.o["weight"], out.reshape(rows, -1).t())
        normed = _normed(x, layer.between["weight"], decoder.eps)
        _product(layer.gate, normed, gate)
        _product(layer.up, normed, up)
        functional.silu(gate, inplace=True).mul_(up)
        x = torch.addmm(x, layer.down["weight"], gate)
    weight = decoder.text.norm._parameters["weight"]
    return _normed(x, weight, decoder.eps).t().contiguous().view(rows, 1, -1)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of the columns of ``x`` [D, R]; half types as :meth:`DirectDecoder._norm`."""
    whole = x.float()
    scale = whole.square().mean(0).add_(eps).rsqrt_()  # [R]
    return (whole * scale).to(x.dtype).mul_(weight[:, None])


def _product(linear: Mapping[str, Any], x: Tensor, out: Tensor) -> None:
    """``out`` [m, R] = weight [m, n] times ``x`` [n, R], plus bias [m]."""
    weight, bias = linear["weight"], linear["bias"]
    if bias is None:
        torch.mm(weight, x, out=out)
    else:
        torch.addmm(bias[:, None], weight, x, out=out)
