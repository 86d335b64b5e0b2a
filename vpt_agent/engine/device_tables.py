"""What a turn may do, as tables: for a device that chooses tokens without asking the host.

A :class:`Program` is a turn's rules with its grammar's states numbered. :class:`Tables` hold the
programs of all rows in tensors whose addresses stay, so that one recorded step serves them all.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vpt_agent.tokens.automaton import Automaton

if TYPE_CHECKING:
    from vpt_agent.engine.decode import TurnRules

DEAD = 0
"""The state behind which a row goes no further."""
_ROOM = 256
"""Programs, at most, that are held at once."""

_Ids = tuple[frozenset[int] | None, frozenset[int]]
"""Ids that are allowed (None: any), and those that are banned."""


@dataclass(frozen=True)
class ProgramState:
    """One state: the sets (numbers in ``Program.sets``) of what may come while calls are left and
    when none is, whether it is inside a call, and where ids lead. None is :data:`DEAD`."""

    free: int
    full: int
    inside: bool
    moves: Mapping[int, int | None]
    other: int | None


@dataclass(frozen=True, eq=False)
class Program:
    """The rules of a turn behind its first token."""

    automaton: Automaton
    sets: tuple[_Ids, ...]
    states: tuple[ProgramState, ...]

    @classmethod
    def of(cls, rules: TurnRules, automaton: Automaton) -> Program:
        """``rules`` under ``automaton``, the states of their grammar."""
        numbers: dict[_Ids, int] = {}

        def number(allowed: frozenset[int] | None, banned: frozenset[int]) -> int:
            alone = allowed is not None and len(allowed) == 1  # forced, whatever is banned
            return numbers.setdefault((allowed, frozenset() if alone else banned), len(numbers))

        states = []
        for place in automaton.places:
            ends = place.kind in rules.inline
            moves: dict[int, int | None] = {
                token: None if ends and automaton.places[to].kind is None else to
                for token, to in place.moves.items()
            }
            states.append(
                ProgramState(
                    number(place.allowed, rules.banned),
                    number(place.allowed, rules.banned | rules.starts),
                    place.kind is not None,
                    moves | dict.fromkeys(rules.stop),
                    place.other,
                )
            )
        return cls(automaton, tuple(numbers), tuple(states))


def key_of(rules: TurnRules) -> Hashable:
    """Rules with the same key have the same program, given the same automaton."""
    return rules.banned, rules.stop, rules.starts, rules.inline


class Tables:
    """Programs on a device, for logits of ``vocab`` ids.

    ``column`` [vocab] numbers the ids that lead anywhere (0: all others); ``follow`` [states,
    columns] is the next state; ``sets`` [states, 2] what may come, with calls left and without;
    ``inside`` [states] bool; ``masks`` [sets, vocab] bool; ``only`` [sets] the one id of a set or
    -1; ``plain`` [sets] where a set is all ids; ``control`` [vocab] bool.

    ``version`` changes when tensors were made anew, at other addresses.
    """

    def __init__(self, vocab: int, control: frozenset[int], device: torch.device) -> None:
        self.vocab, self.device = vocab, device
        self.version = 0
        with torch.inference_mode(False):
            self.control = self._flags(control)
        self._programs: list[Program] = []
        self._bases: dict[int, int] = {}  # by the program's place in memory, which it keeps
        self._size = (0, 0, 0)  # states, columns, sets that there is room for
        self._columns: dict[int, int] = {}
        self._filled = (1, 1)  # states and sets
        with torch.inference_mode(False):  # ordinary tensors, which can be written in any mode
            self._reset()

    def _reset(self) -> None:
        self._programs, self._bases, self._columns = [], {}, {}
        self._filled = (1, 1)
        self.column = torch.zeros(self.vocab, dtype=torch.int64, device=self.device)
        self._allocate((64, 64, 16))

    def _flags(self, ids: frozenset[int]) -> Tensor:
        flags = torch.zeros(self.vocab, dtype=torch.bool)
        flags[sorted(ids)] = True
        return flags.to(self.device)

    def _allocate(self, size: tuple[int, int, int]) -> None:
        """Room for so many states, columns and sets, empty."""
        states, columns, sets = self._size = size
        self.version += 1
        self.follow = torch.zeros(states, columns, dtype=torch.int64, device=self.device)
        self.sets = torch.zeros(states, 2, dtype=torch.int64, device=self.device)
        self.inside = torch.zeros(states, dtype=torch.bool, device=self.device)
        self.masks = torch.ones(sets, self.vocab, dtype=torch.bool, device=self.device)
        self.only = torch.full((sets,), -1, dtype=torch.int64, device=self.device)
        self.plain = torch.ones(sets, dtype=torch.bool, device=self.device)

    def bases(self, programs: list[Program]) -> list[int]:
        """The number of each one's first state, all of them loaded."""
        new = {id(p): p for p in programs if id(p) not in self._bases}
        with torch.inference_mode(False), torch.no_grad():
            if len(self._programs) + len(new) > _ROOM:
                self._reset()
                new = {id(p): p for p in programs}
            for program in new.values():
                self._load(program)
        return [self._bases[id(p)] for p in programs]

    def _load(self, program: Program) -> None:
        for state in program.states:
            for token in state.moves:
                self._columns.setdefault(token, len(self._columns) + 1)
        states = self._filled[0] + len(program.states)
        sets = self._filled[1] + len(program.sets)
        wanted = (states, len(self._columns) + 1, sets)
        self._programs.append(program)
        if any(n > room for n, room in zip(wanted, self._size, strict=True)):
            more = [max(2 * n, room) for n, room in zip(wanted, self._size, strict=True)]
            self._allocate((more[0], more[1], more[2]))
            self._filled = (1, 1)
            for held in self._programs:
                self._write(held)
        else:
            self._write(program)
        # Ids that other programs did not know lead from their states where unknown ids lead.
        ids = torch.tensor(list(self._columns), dtype=torch.int64)
        self.column[ids.to(self.device)] = torch.tensor(
            list(self._columns.values()), device=self.device
        )
        for held in self._programs:
            self._write_moves(held)

    def _write(self, program: Program) -> None:
        """The sets of ``program`` and what its states are."""
        base, first = self._filled
        self._bases[id(program)] = base
        for i, (allowed, banned) in enumerate(program.sets):
            keep = torch.ones(self.vocab, dtype=torch.bool)
            if allowed is not None:
                keep = torch.zeros(self.vocab, dtype=torch.bool)
                keep[sorted(allowed)] = True
            keep[sorted(banned)] = False
            self.masks[first + i] = keep.to(self.device)
            alone = allowed is not None and len(allowed) == 1
            self.only[first + i] = next(iter(allowed or ())) if alone else -1
            self.plain[first + i] = allowed is None and not banned
        end = base + len(program.states)
        pairs = [[s.free + first, s.full + first] for s in program.states]
        self.sets[base:end] = torch.tensor(pairs, device=self.device)
        inside = [s.inside for s in program.states]
        self.inside[base:end] = torch.tensor(inside, device=self.device)
        self._filled = (end, first + len(program.sets))

    def _write_moves(self, program: Program) -> None:
        base = self._bases[id(program)]
        rows = []
        for state in program.states:
            other = DEAD if state.other is None else base + state.other
            row = [other] * self._size[1]
            for token, to in state.moves.items():
                row[self._columns[token]] = DEAD if to is None else base + to
            rows.append(row)
        end = base + len(program.states)
        self.follow[base:end] = torch.tensor(rows, device=self.device)
