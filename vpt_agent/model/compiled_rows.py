"""One token each of some rows by routines in C: what :mod:`vpt_agent.model.somerows` computes.

Attention reads keys and values where they lie in the cache, so that nothing is copied and no row
is padded; norms are one pass. In float32 the products are ours, too; in bfloat16 the processor's
matrix unit (oneDNN) is faster. :mod:`vpt_agent.model.compiled` says when they are in use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vpt_agent.model import compiled

if TYPE_CHECKING:
    from vpt_agent.model.direct import DirectDecoder

_BLOCK = 16
"""Columns that are computed together."""
_MOST = 32
"""Columns, at most, for which the products in float32 are ours: MKL is as fast with more."""


class RowSlots(NamedTuple):
    """Where one token each of R rows stands: its slot [R], the slots that its row sees [R, S], and
    how many of those are real [R], itself included; all int64."""

    slots: Tensor
    seen: Tensor
    counts: Tensor


class Routines:
    """One pass's; R rows stand in C columns, a multiple of 16."""

    def __init__(
        self,
        decoder: DirectDecoder,
        embeds: Tensor,
        turn: tuple[Tensor, Tensor],
        where: RowSlots,
        cache: Any,
        library: Any,
    ) -> None:
        self.decoder, self.cache, self.library = decoder, cache, library
        self.cos, self.sin = (part.float().contiguous() for part in turn)
        self.where = RowSlots(*(part.contiguous() for part in where))
        self.half, self.rows = embeds.dtype == torch.bfloat16, embeds.shape[0]
        self.columns = -(-self.rows // _BLOCK) * _BLOCK
        d, heads, kv = decoder.head_dim, decoder.heads, decoder.kv_heads
        seen = self.where.seen.shape[1]
        self.shape = (ctypes.c_int64 * 6)(self.rows, self.columns, heads, kv, d, seen)
        padded = -(-seen // _BLOCK) * _BLOCK
        self.room = torch.empty(2 * (heads + kv) * d + heads // kv * padded)
        self.out = embeds.new_zeros(heads * d, self.columns)
        self.ours = not self.half and self.columns <= _MOST

    @classmethod
    def of(
        cls, decoder: DirectDecoder, embeds: Tensor, turn: tuple[Tensor, Tensor], cache: Any
    ) -> Routines | None:
        """Those for tokens ``embeds`` [R, 1, D], turned by cosines and sines [R, d / 2]; None where
        torch must compute them.

        ``cache`` says by ``several()`` where the tokens stand (:class:`RowSlots`, or None), and
        has ``keys`` and ``values`` [slots, K * d] of each layer, which are written.
        """
        library, several = compiled.active(), getattr(cache, "several", None)
        if library is None or library.rows_attend is None or several is None:
            return None
        where = several()
        if where is None or not compiled.fits(cache, embeds):
            return None
        if not compiled.knows(decoder, embeds.dtype):
            return None
        return cls(decoder, embeds, turn, where, cache, library)

    def begin(self, embeds: Tensor) -> Tensor:
        """``embeds`` [R, 1, D] as columns [D, C]; those behind the rows are zero."""
        x = embeds.new_zeros(embeds.shape[-1], self.columns)
        x[:, : self.rows] = embeds.view(self.rows, -1).t()
        return x

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMS norm of the columns of ``x`` [n, C], times ``weight`` [n]."""
        out, (n, columns) = torch.empty_like(x), x.shape
        self.library.columns_norm(
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), n, columns, self.decoder.eps, self.half
        )
        return out

    def product(self, linear: Mapping[str, Any], x: Tensor, out: Tensor) -> None:
        """``out`` [m, C] = weight [m, n] times ``x`` [n, C], plus bias [m]."""
        if self.ours:
            self._columns(linear["weight"], linear["bias"], x, out, added=False)
        else:
            product(linear, x, out)

    def add(self, weight: Tensor, x: Tensor, to: Tensor) -> None:
        """``to`` [m, C] += weight [m, n] times ``x`` [n, C]."""
        if self.ours:
            self._columns(weight, None, x, to, added=True)
        else:
            to.addmm_(weight, x)

    def _columns(
        self, weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor, *, added: bool
    ) -> None:
        self.library.columns(
            weight.data_ptr(), None if bias is None else bias.data_ptr(), x.data_ptr(),
            y.data_ptr(), *weight.shape, x.shape[1], added,
        )  # fmt: skip

    def attend(self, made: Tensor, layer: int) -> Tensor:
        """What the rows see [H * d, C] by ``made`` [(H + 2 K) * d, C], queries, keys and values in
        columns; keys and values are written to the cache. The next call writes over it."""
        self.library.rows_attend(
            self.shape, made.data_ptr(), self.cos.data_ptr(), self.sin.data_ptr(),
            self.cache.keys[layer].data_ptr(), self.cache.values[layer].data_ptr(),
            self.where.slots.data_ptr(), self.where.seen.data_ptr(), self.where.counts.data_ptr(),
            self.out.data_ptr(), self.room.data_ptr(), self.half,
        )  # fmt: skip
        return self.out


def product(linear: Mapping[str, Any], x: Tensor, out: Tensor) -> None:
    """``out`` [m, R] = weight [m, n] times ``x`` [n, R], plus bias [m], by torch."""
    weight, bias = linear["weight"], linear["bias"]
    if bias is None:
        torch.mm(weight, x, out=out)
    else:
        torch.addmm(bias[:, None], weight, x, out=out)


def times(weight: Tensor, columns: Tensor) -> Tensor | None:
    """``weight`` [m, n] times ``columns`` [n, R] on a CPU; None where torch must compute it."""
    library, (n, rows) = compiled.active(), columns.shape
    padded = -(-rows // _BLOCK) * _BLOCK
    if library is None or library.columns is None or padded > _MOST or n % _BLOCK:
        return None
    if weight.dtype != torch.float32 or columns.dtype != torch.float32:
        return None
    if not weight.is_contiguous() or weight.device.type != "cpu" or weight.shape[1] != n:
        return None
    x = columns.new_zeros(n, padded)
    x[:, :rows] = columns
    out = x.new_empty(weight.shape[0], padded)
    library.columns(
        weight.data_ptr(), None, x.data_ptr(), out.data_ptr(), *weight.shape, padded, False
    )
    return out[:, :rows]
