"""One token each of some rows on a CPU: the pass of :mod:`vpt_agent.model.direct` by columns.

For a dozen rows torch's routines multiply a weight with their columns faster than their rows with
the weight, so here what goes through a layer stands as columns [D, C] and is turned for the
attention only. Sums are part of the products. Where :mod:`vpt_agent.model.compiled` is in use, its
routines compute what they know.

R rows, C columns (R, or more where routines want that; what stands behind R is thrown away), D
width, H heads, K key-value heads, d head width, S cache slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache

from vpt_agent.model.compiled_rows import Routines, product

if TYPE_CHECKING:
    from vpt_agent.model.direct import DirectDecoder

_ROWS = {torch.float32: (7, 64), torch.bfloat16: (2, 192)}
"""From how many rows to how many: with others, products by rows are as fast (measured with MKL and
oneDNN)."""


def takes(embeds: Tensor) -> bool:
    """Whether these are one token [R, 1, D] each of so many rows on a CPU."""
    rows, length = embeds.shape[:2]
    least, most = _ROWS.get(embeds.dtype, (0, 0))
    return length == 1 and least <= rows <= most and embeds.device.type == "cpu"


def some_rows(
    decoder: DirectDecoder, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache
) -> Tensor:
    """Final-norm hidden states [R, 1, D] of ``embeds`` [R, 1, D] at ``positions`` [3, R, 1];
    ``mask`` bool [R, 1, 1, S], or None where all rows are as long."""
    angles = positions[0] * decoder.text.rotary_emb.inv_freq.float()  # [R, d / 2]: text has one
    turn = angles.cos() * decoder.scaling, angles.sin() * decoder.scaling
    steps: Routines | _Torch | None = Routines.of(decoder, embeds, turn, cache)
    if steps is None:
        steps = _Torch(decoder, embeds, turn, mask, cache)
    d, heads, kv = decoder.head_dim, decoder.heads, decoder.kv_heads
    x = steps.begin(embeds)  # [D, C]
    columns, wide = x.shape[1], decoder.layers[0].gate["weight"].shape[0]
    made = x.new_empty((heads + 2 * kv) * d, columns)  # queries, keys, values of a layer
    q, k, v = made.split((heads * d, kv * d, kv * d))
    gate, up = x.new_empty(wide, columns), x.new_empty(wide, columns)
    for index, layer in enumerate(decoder.layers):
        normed = steps.normed(x, layer.before["weight"])
        for part, linear in ((q, layer.q), (k, layer.k), (v, layer.v)):
            steps.product(linear, normed, part)
        steps.add(layer.o["weight"], steps.attend(made, index), x)
        normed = steps.normed(x, layer.between["weight"])
        steps.product(layer.gate, normed, gate)
        steps.product(layer.up, normed, up)
        steps.add(layer.down["weight"], functional.silu(gate, inplace=True).mul_(up), x)
    rows = embeds.shape[0]
    done = steps.normed(x, decoder.text.norm._parameters["weight"])[:, :rows]
    return done.t().contiguous().view(rows, 1, -1)


class _Torch:
    """The steps by torch's operators, with as many columns as rows."""

    def __init__(
        self,
        decoder: DirectDecoder,
        embeds: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache,
    ) -> None:
        self.decoder, self.mask, self.cache = decoder, mask, cache
        cos, sin = turn
        self.cos = cos.to(embeds.dtype)[:, None, None]  # [R, 1, 1, d / 2]
        self.sin = torch.stack((-sin, sin), dim=1).to(embeds.dtype)[:, None]  # [R, 1, 2, d / 2]

    def begin(self, embeds: Tensor) -> Tensor:
        """Columns [D, R] of ``embeds`` [R, 1, D]: a copy, which may be written to."""
        return embeds[:, 0].t().clone(memory_format=torch.contiguous_format)

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of the columns of ``x``; half types as :class:`DirectDecoder` has it."""
        whole = x.float()
        scale = whole.square().mean(0).add_(self.decoder.eps).rsqrt_()  # [R]
        return (whole * scale).to(x.dtype).mul_(weight[:, None])

    def product(self, linear: Mapping[str, Any], x: Tensor, out: Tensor) -> None:
        """``out`` [m, R] = weight [m, n] times ``x`` [n, R], plus bias [m]."""
        product(linear, x, out)

    def add(self, weight: Tensor, x: Tensor, to: Tensor) -> None:
        """``to`` [m, R] += weight [m, n] times ``x`` [n, R]."""
        to.addmm_(weight, x)

    def attend(self, made: Tensor, layer: int) -> Tensor:
        """What the rows see [H * d, R] by ``made`` [(H + 2 K) * d, R], queries, keys and values."""
        d, heads, kv = self.decoder.head_dim, self.decoder.heads, self.decoder.kv_heads
        rows = made.shape[1]
        turned = made.t().contiguous().view(rows, heads + 2 * kv, 2, d // 2)
        both, values = turned.split((heads + kv, kv), dim=1)
        both = torch.addcmul(both * self.cos, both.flip(2), self.sin).view(rows, -1, d)
        queries, keys = both.split((heads, kv), dim=1)  # [R, H, d], [R, K, d]
        keys, seen = self.cache.update(
            keys.unsqueeze(2), values.reshape(rows, kv, 1, d), layer
        )  # [R, K, S, d]
        # The heads that share keys are rows of one head.
        out = functional.scaled_dot_product_attention(
            queries.reshape(rows, kv, heads // kv, d), keys, seen, attn_mask=self.mask
        )
        return out.reshape(rows, -1).t()
