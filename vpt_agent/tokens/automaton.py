"""A grammar as a table: what may come next, and where that leads, for every state it can be in.

A :class:`~vpt_agent.tokens.grammar.Grammar` answers by looking at the tokens that were read. For a
device that chooses tokens without asking the host, its states are numbered here: two states with
the same :meth:`Listed.summary` go on in the same way, so there are few of them (some eighty for a
grid of 8), whatever was read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

OTHER = -1
"""Stands for every id that means nothing to a grammar."""


class Listed(Protocol):
    """A grammar whose states can be listed."""

    @property
    def start(self) -> Any:
        """The state before anything was read."""

    @property
    def identity(self) -> Hashable:
        """Grammars with the same identity are the same, as long as one of them is kept."""

    @property
    def marks(self) -> frozenset[int]:
        """Ids that mean something outside a call; all others lead to the same state."""

    def summary(self, state: Any) -> Hashable:
        """States with the same summary allow the same ids, now and after any that may follow."""

    def step(self, state: Any, token_id: int) -> tuple[Any, Any]:
        """Read one id: the next state, and what is complete with it."""

    def allowed(self, state: Any) -> Any:
        """The ids that may come next, a frozenset; None: any."""


@dataclass(frozen=True)
class Place:
    """One state. ``kind`` is None outside a call; ``allowed`` are the ids that may come next (None:
    any); ``moves`` lead to other states, by id; ids that are in neither lead to ``other``."""

    kind: str | None
    allowed: frozenset[int] | None
    moves: Mapping[int, int]
    other: int


@dataclass(frozen=True)
class Automaton:
    """All states of a grammar under its own constraint; the first is its start."""

    places: tuple[Place, ...]
    numbers: Mapping[Hashable, int]
    grammar: Any

    def number(self, state: Any) -> int | None:
        """Which place a state of the grammar is; None if generation does not come there."""
        return self.numbers.get(self.grammar.summary(state))


def automaton_of(grammar: Any, *, most: int = 4096) -> Automaton | None:
    """The states of ``grammar``; None if it cannot list them (it has no ``summary``), or has more
    than ``most``."""
    if not callable(getattr(grammar, "summary", None)):
        return None
    listed: Listed = grammar
    numbers: dict[Hashable, int] = {listed.summary(listed.start): 0}
    waiting = deque([listed.start])
    places: list[Place] = []

    def number(state: Any) -> int:
        key = listed.summary(state)
        if key not in numbers:
            numbers[key] = len(numbers)
            waiting.append(state)
        return numbers[key]

    while waiting:
        state = waiting.popleft()
        allowed = listed.allowed(state)
        ids = sorted(listed.marks if allowed is None else allowed)
        moves = {token: number(listed.step(state, token)[0]) for token in ids}
        other = number(listed.step(state, OTHER)[0]) if allowed is None else 0
        places.append(Place(state.kind, allowed, moves, other))
        if len(numbers) > most:
            return None
    return Automaton(tuple(places), numbers, grammar)
