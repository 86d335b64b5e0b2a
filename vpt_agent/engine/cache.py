"""A pooled KV cache: many rows of one allocation, each with its own write index.

transformers' attention calls :meth:`PooledCache.update`; the engine says beforehand, with
:meth:`PooledCache.begin`, which rows the coming forward writes and how many tokens each has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpt_agent.errors import InternalError, UserError
from vpt_agent.model.direct import ExplicitCache


@dataclass(frozen=True)
class KVShape:
    """What one cached token costs: ``layers`` pairs of [heads, head_dim] in ``dtype``."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class _Write:
    """Where the tokens of the forward in progress go.

    ``uniform`` is (write index, length) where all rows are neighbours and agree: one slice is
    written. Otherwise ``scatter`` names each real token [T]: its batch index, its index in the
    block, its pool row and its slot.
    """

    rows: Tensor | slice  # [B] pool rows, or a slice when they are neighbours
    width: int  # slots that the attention sees
    uniform: tuple[int, int] | None
    scatter: tuple[Tensor, Tensor, Tensor, Tensor] | None


class PooledCache(ExplicitCache):
    """Keys and values [rows, heads, slots, head_dim] a layer, grown by doubling.

    ``max_tokens`` bounds rows x slots; asking for more is a :class:`UserError`, not an
    out-of-memory crash.
    """

    def __init__(self, shape: KVShape, *, max_tokens: int | None = None) -> None:
        super().__init__(layers=[])
        self.shape = shape
        self.max_tokens = max_tokens
        self.rows, self.slots = 0, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []
        self._free: list[int] = []
        self._write: _Write | None = None

    # --- rows -----------------------------------------------------------------------------

    def allocate(self) -> int:
        """A free row with nothing in it; the lowest, so that live rows stay neighbours."""
        if not self._free:
            self._resize(max(1, self.rows * 2), max(self.slots, 256))
        row = min(self._free)
        self._free.remove(row)
        self.lengths[row] = 0
        return row

    def release(self, row: int) -> None:
        """Give a row back."""
        if row not in self._free:
            # In this order: once it is free, another thread may write to it.
            self.lengths[row] = 0
            self._free.append(row)

    def copy_row(self, source: int, target: int) -> None:
        """Make ``target`` hold what ``source`` holds."""
        n = self.lengths[source]
        with torch.inference_mode():
            for store in (*self.keys, *self.values):
                store[target, :, :n] = store[source, :, :n]
        self.lengths[target] = n

    def truncate(self, row: int, length: int) -> None:
        """Forget everything of ``row`` from slot ``length`` on."""
        if not 0 <= length <= self.lengths[row]:
            raise UserError(
                "cannot truncate a session to a length it never had",
                got=length,
                expected=f"0 to {self.lengths[row]}",
            )
        self.lengths[row] = length

    def _resize(self, rows: int, slots: int) -> None:
        if self.max_tokens is not None and rows * slots > self.max_tokens:
            slots = self.max_tokens // rows
            needed = max([*self.lengths, 1])
            if slots < max(needed, self.slots):
                raise UserError(
                    "the KV cache budget is used up",
                    where="PooledCache",
                    got=f"{rows} rows x {max(needed, self.slots)} tokens",
                    expected=f"at most {self.max_tokens} tokens",
                    fix="raise max_cached_tokens, run fewer questions at once, or close sessions",
                )
        s = self.shape
        grown: list[list[Tensor]] = []
        for old in (self.keys, self.values):
            new = []
            for layer in range(s.layers):
                store = torch.zeros(
                    rows, s.heads, slots, s.head_dim, dtype=s.dtype, device=s.device
                )
                if old:
                    store[: self.rows, :, : self.slots] = old[layer]
                new.append(store)
            grown.append(new)
        self.keys, self.values = grown
        self._free += range(self.rows, rows)
        self.lengths += [0] * (rows - self.rows)
        self.rows, self.slots = rows, slots

    # --- one forward ----------------------------------------------------------------------

    def begin(self, rows: list[int], counts: list[int]) -> Tensor | None:
        """Prepare a forward that appends ``counts[b]`` tokens to pool row ``rows[b]``.

        Returns the boolean attention mask [B, 1, L, S] (True = may attend) where L is the largest
        count and S the longest row afterwards; or None where plain causal attention over equal,
        fresh rows, or one query a row over equal rows, is the same thing and cheaper.
        """
        starts = [self.lengths[r] for r in rows]
        width = max(w + n for w, n in zip(starts, counts, strict=True))
        if width > self.slots:
            grown = max(width, self.slots * 2)
            if self.max_tokens is not None:
                grown = max(width, min(grown, self.max_tokens // max(self.rows, 1)))
            self._grow_slots(grown)
        device = self.shape.device
        length = max(counts)
        same = len(set(starts)) == 1 and len(set(counts)) == 1
        where = _as_slice(rows, device)
        if same and isinstance(where, slice):
            self._write = _Write(where, width, (starts[0], length), None)
        else:
            self._write = _Write(where, width, None, _scatter(rows, starts, counts, device))
        if same and (length == 1 or starts[0] == 0):
            return None
        start = torch.tensor(starts, device=device)[:, None, None]  # [B, 1, 1]
        query = torch.arange(length, device=device)[None, :, None]  # [1, L, 1]
        slot = torch.arange(width, device=device)[None, None, :]  # [1, 1, S]
        # A padded query (behind its row's count) sees the row's real tokens: its result is thrown
        # away, but a row of the mask without any True would give NaN.
        last = torch.tensor([w + n - 1 for w, n in zip(starts, counts, strict=True)], device=device)
        return (slot <= torch.minimum(start + query, last[:, None, None]))[:, None]  # [B, 1, L, S]

    def _grow_slots(self, slots: int) -> None:
        rows = self.rows
        if self.max_tokens is not None and rows * slots > self.max_tokens:
            raise UserError(
                "the KV cache budget is used up",
                where="PooledCache",
                got=f"{rows} rows x {slots} tokens",
                expected=f"at most {self.max_tokens} tokens",
                fix="raise max_cached_tokens, run fewer questions at once, or close sessions",
            )
        self._resize(rows, slots)

    def commit(self, rows: list[int], counts: list[int]) -> None:
        """The forward went well: move the write indexes on."""
        for row, n in zip(rows, counts, strict=True):
            self.lengths[row] += n
        self._write = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by attention: store the new [B, heads, L, head_dim], give back [.., S, ..]."""
        w = self._write
        if w is None:
            raise InternalError("attention ran outside begin/commit", where="PooledCache.update")
        out = []
        for store, new in (
            (self.keys[layer_idx], key_states),
            (self.values[layer_idx], value_states),
        ):
            if w.uniform is not None:
                at, n = w.uniform
                store[w.rows, :, at : at + n] = new
            elif w.scatter is not None:
                batch, local, row, slot = w.scatter
                # [T, heads, head_dim] on both sides
                store[row, :, slot] = new.transpose(1, 2)[batch, local].to(store.dtype)
            out.append(store[w.rows, :, : w.width])
        return out[0], out[1]

    # --- what transformers may ask --------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Longest row. Positions and masks are always passed explicitly."""
        return max(self.lengths, default=0)

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Width of the keys that the forward in progress sees, and their offset."""
        return (self._write.width if self._write else self.slots), 0


def _as_slice(rows: list[int], device: torch.device) -> Tensor | slice:
    """Neighbouring rows as a slice: the attention then reads the pool without a copy."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return torch.tensor(rows, device=device)


def _scatter(
    rows: list[int], starts: list[int], counts: list[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch index, block index, pool row and slot of each real token of a ragged block."""
    tokens = [(b, i) for b, n in enumerate(counts) for i in range(n)]
    columns = [(b, i, rows[b], starts[b] + i) for b, i in tokens]
    batch, local, row, slot = torch.tensor(columns, device=device).unbind(1)
    return batch, local, row, slot
