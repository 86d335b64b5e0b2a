"""A paged KV cache: one store of slots for all rows, given out in blocks.

transformers' attention calls :meth:`PooledCache.update`; the engine says beforehand, with
:meth:`PooledCache.begin`, which rows the coming forward writes and how many tokens each has.

Memory is taken by the block as rows grow, so it is bounded by what is really held. Rows that begin
alike hold the blocks of their beginning together: computed once and stored once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpt_agent.engine.blocks import ROOT, Beginning, Blocks, Prefixes
from vpt_agent.errors import InternalError, UserError
from vpt_agent.model.compiled import Slots
from vpt_agent.model.compiled_rows import RowSlots
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
class _Forward:
    """Where the tokens of the forward in progress go, and what its attention sees.

    ``real`` [T] are the flat indices of the real tokens in the padded block [B * L]; None: all
    are. ``slots`` [T] is where they are written, a slice where they are neighbours. ``seen``
    [B * S] are the slots that attention reads, a slice for one row in neighbouring blocks, or None
    where it sees the new tokens only.
    """

    real: Tensor | None
    slots: Tensor | slice
    seen: Tensor | slice | None
    width: int  # S
    ends: tuple[int, ...]  # length of each row afterwards


class PooledCache(ExplicitCache):
    """Keys and values [slots, heads * head_dim] a layer, in blocks of ``block`` slots.

    ``max_tokens`` bounds the slots: all of them are laid out at first use. None lets the store
    double as it must. Asking for more is a :class:`UserError`, not an out-of-memory crash.
    """

    def __init__(self, shape: KVShape, *, max_tokens: int | None = None, block: int = 16) -> None:
        super().__init__(layers=[])
        self.shape, self.block, self.max_tokens = shape, block, max_tokens
        if max_tokens is not None and max_tokens < block:
            raise UserError(
                "the KV cache budget is smaller than one block",
                where="max_cached_tokens",
                got=max_tokens,
                expected=f"at least {block} tokens",
            )
        self.blocks = Blocks(None if max_tokens is None else max_tokens // block)
        self.prefixes = Prefixes()
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []
        self.tables: list[list[int]] = []  # blocks of each row, in order
        self._places = np.zeros((0, 0), dtype=np.int64)  # the same as one array
        self._free: list[int] = []
        self._dead: deque[int] = deque()  # rows given back; another thread may do that any time
        self._now: _Forward | None = None

    # --- rows -----------------------------------------------------------------------------

    @property
    def used_rows(self) -> int:
        """Rows that were given out and not given back."""
        self._bury()
        return len(self.lengths) - len(self._free)

    @property
    def free(self) -> float:
        """Blocks that can still be taken."""
        self._bury()
        return self.blocks.free

    def allocate(self) -> int:
        """A free row with nothing in it: the lowest."""
        self._bury()
        if not self._free:
            self._free.append(len(self.lengths))
            self.lengths.append(0)
            self.tables.append([])
        row = min(self._free)
        self._free.remove(row)
        return row

    def release(self, row: int) -> None:
        """Give a row back. Only noted here: garbage collection calls this in the middle of
        anything."""
        self._dead.append(row)

    def _bury(self) -> None:
        while self._dead:
            row = self._dead.popleft()
            if row not in self._free:
                self.truncate(row, 0)
                self._free.append(row)

    def held(self, row: int) -> int:
        """Blocks that ``row`` holds, shared ones included."""
        return len(self.tables[row])

    def needed(self, row: int, count: int) -> int:
        """Blocks that must be taken before ``count`` tokens can be appended to ``row``."""
        more = self.count(self.lengths[row] + count) - len(self.tables[row])
        return more + int(count > 0 and self._written_over(row) is not None)

    def count(self, tokens: int) -> int:
        """Blocks of so many tokens."""
        return -(-tokens // self.block)

    def copy_row(self, source: int, target: int) -> None:
        """Make ``target`` hold what ``source`` holds: full blocks together, the last a copy."""
        self.truncate(target, 0)
        n = self.lengths[source]
        for block in self.tables[source][: n // self.block]:
            self.blocks.share(block)
            self._append(target, block)
        self.lengths[target] = n - n % self.block
        if n % self.block:
            self._take(target, 1)
            self._copy(self.tables[source][n // self.block], self.tables[target][-1])
            self.lengths[target] = n

    def truncate(self, row: int, length: int) -> None:
        """Forget everything of ``row`` from slot ``length`` on."""
        if not 0 <= length <= self.lengths[row]:
            raise UserError(
                "cannot truncate a session to a length it never had",
                got=length,
                expected=f"0 to {self.lengths[row]}",
            )
        table = self.tables[row]
        while len(table) > self.count(length):
            block = table.pop()
            if self.blocks.drop(block):
                self.prefixes.forget(block)
        if length % self.block and length < self.lengths[row] and self.blocks.users[table[-1]] == 1:
            self.prefixes.forget(table[-1])  # what comes behind will be written over
        self.lengths[row] = length

    # --- beginnings -----------------------------------------------------------------------

    def attach(self, row: int, beginning: Beginning, most: int) -> int:
        """Let the empty ``row`` begin with what others hold of ``beginning``, up to ``most``
        tokens; how many tokens that is. Full blocks are shared, a part of one is copied."""
        keys, parent = beginning.keys, ROOT
        done = 0
        while done < most:
            wanted = keys[done : min(done + self.block, most)]
            block, same = self.prefixes.find(parent, wanted)
            if same == self.block:
                self.blocks.share(block)
                self._append(row, block)
                parent = block
            elif same and self.blocks.free >= 1:
                self._take(row, 1)
                self._copy(block, self.tables[row][-1])
            else:
                break
            done += same
            if same < self.block:
                break
        self.lengths[row] = done
        return done

    def attachable(self, beginning: Beginning, most: int) -> int:
        """How many tokens :meth:`attach` would find in full blocks."""
        done, parent = 0, ROOT
        while done + self.block <= most:
            block, same = self.prefixes.find(parent, beginning.keys[done : done + self.block])
            if same < self.block:
                break
            done, parent = done + same, block
        return done

    def register(self, row: int, beginning: Beginning) -> None:
        """Let others begin with what ``row`` holds of ``beginning``."""
        parent, keys = ROOT, beginning.keys
        for i in range(self.count(min(len(keys), self.lengths[row]))):
            block = self.tables[row][i]
            own = keys[i * self.block : min((i + 1) * self.block, self.lengths[row])]
            found, same = self.prefixes.find(parent, own)
            if found != block or same < len(own):
                if self.blocks.users[block] > 1:
                    return
                self.prefixes.register(parent, block, Beginning(own, beginning.kept))
            parent = block

    # --- blocks ---------------------------------------------------------------------------

    def _written_over(self, row: int) -> int | None:
        """The index of a block that the next token of ``row`` writes to and that others hold."""
        index, inside = divmod(self.lengths[row], self.block)
        if inside and self.blocks.users[self.tables[row][index]] > 1:
            return index
        return None

    def reserve(self, row: int, count: int) -> None:
        """Take the blocks that ``count`` more tokens of ``row`` need."""
        index = self._written_over(row) if count else None
        if index is not None:  # its own copy of a block that others go on holding
            while len(self.tables[row]) > index + 1:  # taken for a forward that failed
                self.blocks.drop(self.tables[row].pop())
            old = self.tables[row].pop()
            self._take(row, 1)
            self._copy(old, self.tables[row][-1])
            self.blocks.drop(old)
        self._take(row, self.count(self.lengths[row] + count) - len(self.tables[row]))

    def _take(self, row: int, count: int) -> None:
        if count <= 0:
            return
        if self.blocks.free < count:
            raise UserError(
                "the KV cache budget is used up",
                where="PooledCache",
                got=f"{(self.blocks.used + count) * self.block} tokens in blocks of {self.block}",
                expected=f"at most {self.max_tokens} tokens",
                fix="raise max_cached_tokens, run fewer questions at once, or close sessions",
            )
        if self.blocks.at_hand < count:
            self._grow(count - self.blocks.at_hand)
        for _ in range(count):
            table = self.tables[row]
            self._append(row, self.blocks.take(table[-1] if table else None))

    def _append(self, row: int, block: int) -> None:
        table = self.tables[row]
        rows, width = self._places.shape
        if row >= rows or len(table) >= width:
            size = max(rows, 2 * row + 1), max(width, 2 * len(table) + 32)
            places = np.zeros(size, dtype=np.int64)
            places[:rows, :width] = self._places
            self._places = places
        self._places[row, len(table)] = block
        table.append(block)

    def _grow(self, more: int) -> None:
        """A larger store: of the whole budget if there is one, otherwise at least doubled."""
        limit, before = self.blocks.limit, len(self.blocks.users)
        count = limit if limit is not None else max(before + more, 2 * before, self.count(256))
        size = count * self.block, self.shape.heads * self.shape.head_dim
        # Ordinary tensors, which can be written in any mode.
        with torch.inference_mode(False), torch.no_grad():
            for stores in (self.keys, self.values):
                old = list(stores)
                stores.clear()
                for layer in range(self.shape.layers):
                    new = torch.zeros(size, dtype=self.shape.dtype, device=self.shape.device)
                    if old:
                        new[: before * self.block] = old[layer]
                    stores.append(new)
        self.blocks.grow(count)

    def _copy(self, source: int, target: int) -> None:
        a, b = source * self.block, target * self.block
        with torch.inference_mode():
            for store in (*self.keys, *self.values):
                store[b : b + self.block] = store[a : a + self.block]

    # --- one forward ----------------------------------------------------------------------

    def begin(self, rows: Sequence[int], counts: Sequence[int], width: int = 1) -> Tensor | None:
        """Prepare a forward that appends ``counts[b]`` tokens to row ``rows[b]``.

        Returns the boolean attention mask [B, 1, L, S] (True = may attend) where L is the largest
        count, or ``width`` if that is more, and S the longest row afterwards; or None where plain
        causal attention over equal, fresh rows, or one query a row over equal rows, is the same
        thing and cheaper.
        """
        self._bury()
        for row, n in zip(rows, counts, strict=True):
            self.reserve(row, n)
        starts = [self.lengths[r] for r in rows]
        ends = [w + n for w, n in zip(starts, counts, strict=True)]
        length, longest = max(width, *counts), max(ends)
        self._now = _Forward(
            self._real(counts, length),
            self._written(rows, starts, ends),
            None if not any(starts) else self._read(rows, ends, longest),
            longest,
            tuple(ends),
        )
        same = len(set(starts)) == 1 and len(set(counts)) == 1
        if same and (length == 1 or starts[0] == 0):
            return None
        device = self.shape.device
        # A padded query (behind its row's count) sees the row's real tokens: its result is thrown
        # away, but a row of the mask without any True would give NaN.
        last = np.minimum(
            np.array(starts)[:, None] + np.arange(length), np.array(ends)[:, None] - 1
        )
        slot = torch.arange(longest, device=device)
        return (slot <= torch.from_numpy(last).to(device)[..., None])[:, None]  # [B, 1, L, S]

    def begin_token(self, row: int) -> None:
        """As :meth:`begin`, for one token of one row."""
        self._bury()
        self.reserve(row, 1)
        start = self.lengths[row]
        at = self.tables[row][start // self.block] * self.block + start % self.block
        seen = self._read((row,), (start + 1,), start + 1) if start else None
        self._now = _Forward(None, slice(at, at + 1), seen, start + 1, (start + 1,))

    def _real(self, counts: Sequence[int], length: int) -> Tensor | None:
        if min(counts) == length:
            return None
        flat = np.arange(len(counts) * length).reshape(-1, length)
        kept = flat[np.arange(length) < np.array(counts)[:, None]]
        return torch.from_numpy(kept).to(self.shape.device)

    def _written(
        self, rows: Sequence[int], starts: Sequence[int], ends: Sequence[int]
    ) -> Tensor | slice:
        b = self.block
        if len(rows) == 1 and (ends[0] - starts[0] == 1 or self._neighbours(rows[0])):
            at = self.tables[rows[0]][starts[0] // b] * b + starts[0] % b
            return slice(at, at + ends[0] - starts[0])
        parts = []
        for row, start, end in zip(rows, starts, ends, strict=True):
            new = np.arange(start, end)
            parts.append(self._places[row, new // b] * b + new % b)
        return torch.from_numpy(np.concatenate(parts)).to(self.shape.device)

    def _read(self, rows: Sequence[int], ends: Sequence[int], width: int) -> Tensor | slice:
        b = self.block
        if len(rows) == 1 and self._neighbours(rows[0]):
            at = self.tables[rows[0]][0] * b
            return slice(at, at + width)
        first = self._places[rows, : self.count(width)] * b  # [B, S / b]
        slots = (first[..., None] + np.arange(b)).reshape(len(rows), -1)[:, :width]
        # Behind its end a row sees its own first slot: what lies there is finite, and masked.
        slots = np.where(np.arange(width) < np.array(ends)[:, None], slots, slots[:, :1])
        return torch.from_numpy(slots.reshape(-1)).to(self.shape.device)

    def _neighbours(self, row: int) -> bool:
        table = self.tables[row]
        return table[-1] - table[0] == len(table) - 1 and table == [*range(table[0], table[-1] + 1)]

    def single(self) -> Slots | None:
        """Where the one token of one row stands that the forward in progress computes; None if it
        computes anything else."""
        now = self._now
        if now is None or not isinstance(now.slots, slice) or now.slots.stop - now.slots.start != 1:
            return None
        at = now.slots.start
        if now.seen is None:
            return Slots(at, at, 1, None)
        if isinstance(now.seen, slice):
            return Slots(at, now.seen.start, now.width, None)
        return Slots(at, 0, now.width, now.seen) if len(now.seen) == now.width else None

    def several(self) -> RowSlots | None:
        """Where the tokens stand that the forward in progress computes, one of each of several
        rows; None if it computes anything else."""
        now = self._now
        if now is None or isinstance(now.slots, slice) or not isinstance(now.seen, Tensor):
            return None
        if len(now.slots) != len(now.ends):
            return None
        return RowSlots(now.slots, now.seen.view(len(now.ends), now.width), torch.tensor(now.ends))

    def commit(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """The forward went well: move the write indexes on."""
        for row, n in zip(rows, counts, strict=True):
            self.lengths[row] += n
        self._now = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by attention: store the new [B, heads, L, head_dim], give back [.., S, ..]."""
        now = self._now
        if now is None:
            raise InternalError("attention ran outside begin/commit", where="PooledCache.update")
        return (
            self._updated(self.keys[layer_idx], key_states, now),
            self._updated(self.values[layer_idx], value_states, now),
        )

    def _updated(self, store: Tensor, new: Tensor, now: _Forward) -> Tensor:
        batch, heads, _, head_dim = new.shape
        rows = new.transpose(1, 2).reshape(-1, store.shape[1])  # [B * L, heads * head_dim]
        if now.real is not None:
            rows = rows.index_select(0, now.real)
        if isinstance(now.slots, slice):
            store[now.slots] = rows
        else:
            store.index_copy_(0, now.slots, rows.to(store.dtype))
        if now.seen is None:
            return new.to(store.dtype)
        # [B * S, heads * head_dim]; a view for one row in neighbouring blocks
        seen = store[now.seen] if isinstance(now.seen, slice) else store.index_select(0, now.seen)
        return seen.view(batch, now.width, heads, head_dim).transpose(1, 2)

    # --- what transformers may ask --------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Longest row. Positions and masks are always passed explicitly."""
        return max(self.lengths, default=0)

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Width of the keys that the forward in progress sees, and their offset."""
        return (self._now.width if self._now else self.get_seq_length()), 0
