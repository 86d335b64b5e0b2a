"""A run in progress, and how far what it asked for has come."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from vpt_agent.engine.blocks import Beginning, beginning_of
from vpt_agent.engine.parts import Block, Fed, Feed, Wait

if TYPE_CHECKING:
    from vpt_agent.engine.cache import PooledCache
    from vpt_agent.engine.session import Session

T = TypeVar("T")
Run = Generator[Any, Any, T]
"""A run yields a Feed, a list of Look, or a Wait; it receives a Fed, list[list[Looked]] or a
list of tool results."""


@dataclass(eq=False)
class Live:
    """A run: what it waits for, or what it returned.

    ``number`` is its age: the smaller, the older. ``at`` is how much of its session's sequence is
    in the cache, while it asks for tokens; ``states`` and ``logits`` are what was computed of the
    feed already. ``known`` is the beginning of a row that was computed from its first token on.
    """

    run: Run[Any]
    number: int
    want: Any = None
    result: Any = None
    error: BaseException | None = None
    finished: bool = False
    started: bool = False
    future: Future[Any] | None = None
    session: Session | None = None
    at: int = 0
    known: Beginning | None = None
    heard: bool = False
    states: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    calls: int = 0
    shared: int = 0
    _ready: bool = False
    _beginning: Beginning | None = None

    # --- what it waits for ----------------------------------------------------------------

    def wants(self, want: Any) -> None:
        """It says what it waits for now."""
        self.want, self._ready, self.heard, self._beginning = want, False, False, None
        if isinstance(want, Feed):
            self.session = want.session

    @property
    def feed(self) -> Feed:
        """The tokens that it asks for."""
        assert isinstance(self.want, Feed)
        return self.want

    @property
    def fresh(self) -> bool:
        """Whether nothing of what it asks for has been planned yet."""
        return not self._ready

    def feeds(self) -> bool:
        """Whether it asks for tokens."""
        return not self.finished and isinstance(self.want, Feed)

    def waits(self) -> bool:
        """Whether its tools run."""
        return not self.finished and isinstance(self.want, Wait)

    # --- its row --------------------------------------------------------------------------

    def row(self) -> int:
        """The row of its session; -1 if it has none, or none any more."""
        return -1 if self.session is None or self.session.closed else self.session.row

    def holds(self) -> bool:
        """Whether it has blocks of the cache."""
        row = self.row()
        return row >= 0 and self.session is not None and self.session.engine.cache.held(row) > 0

    def prepare(self, cache: PooledCache) -> None:
        """Find out how much of the sequence is in the cache; called before each step's plan."""
        feed = self.feed
        row, past = feed.session.row, len(feed.session)
        if not self._ready:
            self._ready, self.shared, self.tokens, self.calls = True, 0, 0, 0
            # What a feed that was given up left behind.
            cache.truncate(row, min(cache.lengths[row], past))
            self._restart(cache.lengths[row])
        elif cache.lengths[row] != self.at:  # it was taken away
            cache.truncate(row, min(cache.lengths[row], past))
            self._restart(cache.lengths[row])

    def _restart(self, at: int) -> None:
        self.at, self.known = at, None
        self.states, self.logits = [], []

    def left(self) -> int:
        """Tokens still to compute for what it asked."""
        return len(self.feed.session) + len(self.feed.block.ids) - self.at

    def blocks(self) -> Sequence[Block]:
        """The whole sequence, what is asked for included."""
        return [*self.feed.session.blocks, self.feed.block]

    def expected(self) -> int:
        """Length that the sequence may reach, as far as anybody said."""
        if self.session is None:
            return 0
        now = len(self.session) + (len(self.want.block.ids) if isinstance(self.want, Feed) else 0)
        return max(now, self.session.expected)

    # --- its beginning --------------------------------------------------------------------

    @property
    def beginning(self) -> Beginning:
        """What decides the sequence's keys and values."""
        if self._beginning is None:
            self._beginning = beginning_of(self.blocks())
        return self._beginning

    def shareable(self) -> int:
        """How many tokens need no computing if another row has them: nobody asks for what is
        behind them, and at least one is left to compute."""
        past = len(self.feed.session)
        return past if self.feed.logits == "all" else past + len(self.feed.block.ids) - 1

    def began(self, shared: int) -> None:
        """The row holds ``shared`` tokens that another run computed."""
        self.at, self.shared, self.known = shared, self.shared + shared, self.beginning

    # --- what is computed -----------------------------------------------------------------

    def computed(self, count: int, states: Tensor, logits: Tensor | None) -> None:
        """``count`` more tokens of the sequence are in the cache: ``states`` [n, D] are those of
        the feed's own tokens among them, ``logits`` [m, vocab] those that were asked for."""
        self.at += count
        self.tokens += count
        self.calls += 1
        if len(states):
            self.states.append(states)
        if logits is not None:
            self.logits.append(logits)

    def fed(self) -> Fed:
        """The whole answer; the session has moved on."""
        feed = self.feed
        hidden = self.states[0] if len(self.states) == 1 else torch.cat(self.states)
        logits = self.logits[0] if len(self.logits) == 1 else _joined(self.logits)
        feed.session.advance(feed.block, hidden, computed=self.tokens, calls=self.calls)
        feed.session.shared_tokens += self.shared
        self.states, self.logits, self.known = [], [], None
        return Fed(hidden, logits)


def _joined(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None
