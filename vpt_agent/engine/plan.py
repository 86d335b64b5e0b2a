"""What one step computes: which rows, how many tokens of each, and what must make room for it.

Rows that decode always go on. Beside them, prompts are computed in chunks, the oldest run first. A
run begins when there is room for its prompt and for what it may still add; rows that grow beyond
that take blocks from idle sessions, then from the youngest runs, which compute them anew when there
is room again. Beginnings that other rows hold are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vpt_agent.engine.blocks import common
from vpt_agent.engine.parts import Block, Logits, cut
from vpt_agent.errors import UserError

if TYPE_CHECKING:
    from vpt_agent.engine.cache import PooledCache
    from vpt_agent.engine.live import Live
    from vpt_agent.engine.session import Session

FEW = 4
"""Tokens, at most, of a row that counts as decoding."""


@dataclass(frozen=True)
class Piece:
    """Tokens of one row to compute now; ``last``: those that end its feed are among them.

    ``outputs`` is the index in ``block`` from which on logits and hidden states are wanted: what
    stands before it was computed once already.
    """

    entry: Live
    session: Session
    block: Block
    last: bool
    logits: Logits
    outputs: int


@dataclass(frozen=True)
class Measures:
    """``chunk`` tokens of prompts, at most, go beside decoding rows; ``most`` where none decode.

    Where tools of several runs begin together, and of more than have something else to do, a step
    waits ``patience`` seconds for them at most, and no longer than a quarter of that for the next.
    """

    chunk: int = 512
    most: int = 8192
    patience: float = 0.2

    def __post_init__(self) -> None:
        whole("chunk", self.chunk, where="Measures")
        whole("most", self.most, where="Measures")
        if not isinstance(self.patience, int | float) or not 0 <= self.patience < float("inf"):
            raise UserError(
                "patience must be seconds, 0 or more", where="Measures", got=repr(self.patience)
            )


def whole(name: str, value: object, *, where: str) -> None:
    """Raise :class:`UserError` where ``value`` is no whole number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"{name} must be a whole number from 1 on",
            where=where,
            got=repr(value),
            expected=">= 1",
        )


class Planner:
    """Plans a step over ``cache``. ``idle`` gives the sessions that no run is using, the one that
    was used longest ago first. ``refused`` are the runs that cannot go on, and why."""

    def __init__(
        self,
        cache: PooledCache,
        measures: Measures,
        *,
        idle: Callable[[], list[Session]],
        longest: int,
    ) -> None:
        self.cache, self.measures, self.longest, self.idle = cache, measures, longest, idle
        self.refused: list[tuple[Live, UserError]] = []
        self._budget = 0
        self._safe: set[int] = set()  # rows that this step computes

    def waves(
        self, feeding: Sequence[Live], everyone: Sequence[Live]
    ) -> Generator[list[Piece], None, None]:
        """What this step computes of ``feeding`` (runs that ask for tokens, the oldest first);
        ``everyone`` are all live runs. One wave must be computed before the next one is asked for:
        it holds beginnings that the next one shares."""
        asking = [e for e in feeding if self._checked(e)]
        decoding = any(e.left() <= FEW for e in asking)
        self._budget = self.measures.chunk if decoding else self.measures.most
        while asking:
            pieces, asking = self._wave(asking, everyone)
            if pieces:
                yield pieces

    def _wave(
        self, asking: Sequence[Live], everyone: Sequence[Live]
    ) -> tuple[list[Piece], list[Live]]:
        """What is computed now, and the runs that wait for a beginning among that."""
        chosen: list[Piece] = []
        later: list[Live] = []
        full = False  # a run that waits for room lets no younger one pass
        for entry in asking:
            entry.prepare(self.cache)  # again: an older run may have taken its blocks meanwhile
            long = entry.left() > FEW
            if long and self._budget <= 0:
                continue
            if long and self._will_be_shared(entry, chosen):
                later.append(entry)
                continue
            if not entry.holds():
                full = full or not self._admitted(entry, everyone)
                if full:
                    continue
                self._begin_shared(entry)
            count = min(entry.left(), self._budget) if long else entry.left()
            if not self._make_room(entry, count, everyone):
                continue
            self._budget -= count if long else 0
            self._safe.add(entry.row())
            chosen.append(self._piece(entry, count))
        return chosen, later

    def _checked(self, entry: Live) -> bool:
        """Whether the feed of ``entry`` can be computed at all; a new one is made ready."""
        feed = entry.feed
        session = feed.session
        try:
            session.check_open()
            total = len(session) + len(feed.block.ids)
            if total > self.longest:
                raise UserError(
                    "the conversation is longer than the model can hold",
                    got=f"{total} tokens",
                    expected=f"at most {self.longest}",
                    fix="ask a shorter question, give fewer or smaller pictures, "
                    "or start a new conversation",
                )
            limit = self.cache.blocks.limit
            if limit is not None and self.cache.count(total) > limit:
                raise UserError(
                    "the KV cache budget is used up: this conversation alone does not fit",
                    where="max_cached_tokens",
                    got=f"{total} tokens",
                    expected=f"at most {limit * self.cache.block}",
                    fix="raise max_cached_tokens, ask a shorter question, or give fewer or "
                    "smaller pictures",
                )
        except UserError as error:
            self.refused.append((entry, error))
            return False
        entry.prepare(self.cache)
        return True

    def _piece(self, entry: Live, count: int) -> Piece:
        feed = entry.feed
        session, start = feed.session, entry.at
        own = len(session)
        if start == own and count == len(feed.block.ids):
            block = feed.block
        else:
            block = cut(entry.blocks(), start, start + count)
        last = start + count == own + len(feed.block.ids)
        logits: Logits = feed.logits if feed.logits == "all" or last else "none"
        return Piece(entry, session, block, last, logits, max(0, own - start))

    # --- beginnings -----------------------------------------------------------------------

    def _will_be_shared(self, entry: Live, chosen: Sequence[Piece]) -> bool:
        """Whether a run that is computed in this step computes what ``entry`` begins with, so that
        it is better to wait for it."""
        if entry.holds():
            return False
        own = entry.beginning.keys
        most = entry.shareable()
        have = 0
        for piece in chosen:
            other = piece.entry.known
            if other is not None:
                have = max(have, min(common(own, other.keys), most))
        if have < self.cache.block:
            return False
        return have - self.cache.attachable(entry.beginning, most) >= self.cache.block

    def _begin_shared(self, entry: Live) -> None:
        """Begin the row with what others hold of it."""
        row = entry.feed.session.row
        shared = self.cache.attach(row, entry.beginning, entry.shareable())
        entry.began(shared)

    # --- room -----------------------------------------------------------------------------

    def _admitted(self, entry: Live, everyone: Sequence[Live]) -> bool:
        """Whether there is room for ``entry``, that holds nothing yet, and all it may still add,
        without what the others may still add."""
        if self.cache.blocks.limit is None:
            return True
        others = [e for e in everyone if e is not entry and e.holds()]
        if not any(e.feeds() for e in others):  # the rest may be waiting for this very run
            return True
        cache = self.cache
        promised = sum(max(0, cache.count(e.expected()) - cache.held(e.row())) for e in others)
        idle = sum(cache.held(s.row) for s in self.idle())
        shared = cache.attachable(entry.beginning, entry.shareable()) // cache.block
        wanted = cache.count(entry.expected()) - shared
        return cache.free + idle - promised >= wanted

    def _make_room(self, entry: Live, count: int, everyone: Sequence[Live]) -> bool:
        """Whether ``count`` tokens of ``entry`` fit now; takes blocks from others if they must."""
        cache, row = self.cache, entry.feed.session.row
        if cache.needed(row, count) <= cache.free:
            cache.reserve(row, count)
            return True
        safe = self._safe | {row}
        younger = [e for e in everyone if e.number > entry.number]
        resting = [e for e in everyone if e.number < entry.number and not e.feeds()]
        for victim in (
            *(s.row for s in self.idle()),
            *(e.row() for e in sorted(younger, key=lambda e: -e.number)),
            *(e.row() for e in resting),
        ):
            if victim < 0 or victim in safe or not cache.held(victim):
                continue
            cache.truncate(victim, 0)
            if cache.needed(row, count) <= cache.free:
                cache.reserve(row, count)
                return True
        return False
