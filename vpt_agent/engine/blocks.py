"""Blocks of the KV store: who holds which, and which hold beginnings that others may use.

A block is so many neighbouring slots of the store. A row's sequence lies in a list of blocks;
several rows may hold the same block, as long as nobody writes to it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from vpt_agent.errors import InternalError

if TYPE_CHECKING:
    from vpt_agent.engine.parts import Block


class TokenKey(NamedTuple):
    """What decides a token's keys and values, given all tokens before it: its id, its three
    positions, and the features that stand for it (0: none) with its place among them."""

    token: int
    t: int
    h: int
    w: int
    features: int
    place: int


@dataclass(frozen=True)
class Beginning:
    """The keys of a sequence's first tokens.

    Features are known by the object that they are, so ``kept`` keeps those objects alive: as long
    as a beginning is known, no other features can take their name.
    """

    keys: Sequence[TokenKey]
    kept: tuple[Tensor, ...] = ()


def beginning_of(blocks: Iterable[Block]) -> Beginning:
    """What decides the keys and values of the sequence that ``blocks`` are together."""
    keys: list[TokenKey] = []
    kept: list[Tensor] = []
    for block in blocks:
        first = len(keys)
        t, h, w = block.positions.tolist()
        for token, a, b, c in zip(block.ids, t, h, w, strict=True):
            keys.append(TokenKey(token, a, b, c, 0, 0))
        for offset, tokens in block.visual:
            kept.append(tokens)
            for i in range(tokens.shape[0]):
                at = first + offset + i
                keys[at] = keys[at]._replace(features=id(tokens), place=i)
    return Beginning(keys, tuple(kept))


class Blocks:
    """Which blocks are free, and how many rows hold each of the others.

    ``limit`` is the largest number of blocks there may ever be; None for no end.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.users: list[int] = []
        self.used = 0
        self._free: list[int] = []  # a heap; may name blocks that were taken since

    @property
    def free(self) -> float:
        """How many can still be taken, the store's growth included."""
        return float("inf") if self.limit is None else self.limit - self.used

    @property
    def at_hand(self) -> int:
        """How many can be taken before the store must grow."""
        return len(self.users) - self.used

    def grow(self, count: int) -> None:
        """There are ``count`` blocks now."""
        for block in range(len(self.users), count):
            heapq.heappush(self._free, block)
        self.users += [0] * (count - len(self.users))

    def take(self, after: int | None) -> int:
        """A free block: the neighbour of ``after`` if it is free, since neighbours can be read
        without a copy; otherwise the first."""
        if after is not None and after + 1 < len(self.users) and not self.users[after + 1]:
            block = after + 1
        else:
            while self._free and self.users[self._free[0]]:
                heapq.heappop(self._free)
            if not self._free:
                raise InternalError("no block is free; the store should have grown", where="Blocks")
            block = heapq.heappop(self._free)
        self.users[block] = 1
        self.used += 1
        return block

    def share(self, block: int) -> None:
        """One more row holds ``block``."""
        self.users[block] += 1

    def drop(self, block: int) -> bool:
        """One row less holds ``block``; whether it is free now."""
        self.users[block] -= 1
        if self.users[block]:
            return False
        self.used -= 1
        heapq.heappush(self._free, block)
        return True


@dataclass
class _Known:
    parent: int
    keys: tuple[TokenKey, ...]
    kept: tuple[Tensor, ...]


ROOT = -1
"""Stands before the first block of every sequence."""


@dataclass
class Prefixes:
    """Blocks that hold the beginnings of sequences, as a tree by their tokens."""

    _known: dict[int, _Known] = field(default_factory=dict)
    _children: dict[int, list[int]] = field(default_factory=dict)

    def register(self, parent: int, block: int, beginning: Beginning) -> None:
        """``block`` holds ``beginning`` behind ``parent``, from its first slot on."""
        self.forget(block)
        self._known[block] = _Known(parent, tuple(beginning.keys), beginning.kept)
        self._children.setdefault(parent, []).append(block)

    def forget(self, block: int) -> None:
        """``block`` will hold something else. What stands behind it cannot be reached any more."""
        waiting = [block]
        while waiting:
            gone = waiting.pop()
            waiting += self._children.get(gone, ())
            known = self._known.pop(gone, None)
            if known is not None:
                siblings = self._children[known.parent]
                siblings.remove(gone)
                if not siblings:
                    del self._children[known.parent]

    def find(self, parent: int, keys: Sequence[TokenKey]) -> tuple[int, int]:
        """The block behind ``parent`` that has most of the beginning of ``keys``, and how many
        tokens; (ROOT, 0) if none has any."""
        best = (ROOT, 0)
        for block in self._children.get(parent, ()):
            same = common(self._known[block].keys, keys)
            if same > best[1]:
                best = (block, same)
        return best


def common(one: Sequence[TokenKey], other: Sequence[TokenKey]) -> int:
    """How many tokens two sequences have in common from their beginning on."""
    count = min(len(one), len(other))
    return next((i for i in range(count) if one[i] != other[i]), count)
