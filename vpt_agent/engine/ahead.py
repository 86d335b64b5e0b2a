"""Decoding that runs ahead: the device chooses several tokens before the host looks at them.

A turn's decoder (:mod:`vpt_agent.engine.decode`) may send an :class:`Ask` with the token it feeds.
The rows that ask go through :class:`~vpt_agent.engine.device_step.Stepper` together, some steps at
once, under the same rules and with the same random numbers; each run then reads the tokens in its
:class:`Record` as if it had chosen them itself. One code decides what a turn means. What cannot be
said in tables goes the ordinary way, and :class:`AheadCounters` say how often and why. See
docs/gpu-decode.md.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from vpt_agent.engine.device_step import Mode, Row, Said, Stepper
from vpt_agent.engine.device_tables import Program, Tables, key_of
from vpt_agent.engine.parts import Fed
from vpt_agent.engine.sampling import Sampler, Sampling, filtered
from vpt_agent.errors import UserError
from vpt_agent.model.onestep import forget_if_moved, pack_for_steps
from vpt_agent.tokens.automaton import Automaton, automaton_of

if TYPE_CHECKING:
    from vpt_agent.engine.core import Engine
    from vpt_agent.engine.decode import TurnRules
    from vpt_agent.engine.live import Live
    from vpt_agent.engine.plan import Piece
    from vpt_agent.engine.session import Session

Decoding = Literal["auto", "device", "compiled-device", "host"]
"""Who chooses tokens: ``auto`` is the device on CUDA, the host elsewhere. ``compiled-device`` has
torch compile the step first (a minute for each size of batch)."""

ROWS = (1, 2, 4, 8, 16, 32)
"""Sizes of batches that are recorded; a missing row costs little."""
FIRST, MOST, WINDOW = 4, 16, 4
"""Tokens that a turn asks for at first and at most; steps after which the host looks for ends."""
_SLOTS = 128
_STEPPERS = 24
"""Recorded steps that are kept."""


@dataclass
class AheadCounters:
    """What ran where. ``turns`` were decoded by the device, ``fallbacks`` by the host, by reason.
    ``tokens`` were chosen on the device in ``batches`` of ``steps`` steps in all, and read in
    ``reads`` waits for the device; ``dropped`` of them were not used. ``recorded`` CUDA graphs."""

    turns: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    batches: int = 0
    steps: int = 0
    tokens: int = 0
    dropped: int = 0
    reads: int = 0
    recorded: int = 0


@dataclass(frozen=True)
class Ask:
    """What a turn lets the device do behind the token that it feeds: ``steps`` tokens at most,
    ``room`` that the turn may still have, ``calls`` that may still begin. ``state`` is the
    program's; ``sampler`` has the random numbers."""

    program: Program
    state: int
    steps: int
    room: int
    calls: int
    sampler: Sampler


@dataclass
class Record:
    """Tokens that the device chose behind the one that was fed, in order, as
    :class:`~vpt_agent.engine.sampling.Choice` has them. All but the last are computed: ``hidden``
    [n, D] are the states at the token that was fed and at those. ``used`` have been read."""

    tokens: list[int]
    forced: list[bool]
    logprobs: list[float]
    removed: list[float]
    drawn: list[float]
    hidden: Tensor
    used: int = 0

    @property
    def left(self) -> int:
        """Tokens that were not read yet."""
        return len(self.tokens) - self.used


def check_decoding(name: str) -> Decoding:
    """``name`` as a :data:`Decoding`. Raises :class:`UserError`."""
    known: dict[str, Decoding] = {d: d for d in get_args(Decoding)}
    if name not in known:
        raise UserError(
            "unknown way of decoding", where="decoding", got=str(name), expected=", ".join(known)
        )
    return known[name]


class Ahead:
    """Runs rows ahead for one engine. ``program_of`` is asked by a turn, ``together`` by the
    engine's step, under its lock."""

    def __init__(
        self, engine: Engine, *, first: int = FIRST, most: int = MOST, compiled: bool = False
    ) -> None:
        self.engine, self.compiled = engine, compiled
        self.first, self.most, self.window = first, most, WINDOW
        self.counters = AheadCounters()
        self._automata: dict[Hashable, Automaton | None] = {}
        self._programs: dict[Hashable, Program] = {}
        self._tables: Tables | None = None
        self._steppers: OrderedDict[Hashable, tuple[Hashable, Stepper]] = OrderedDict()
        self._pool: Any = None
        self._weights: Hashable = None  # what recorded steps rely on

    # --- what a turn asks -----------------------------------------------------------------

    def program_of(self, rules: TurnRules, session: Session) -> Program | None:
        """The tables of a turn's rules; None if the host must choose, which is counted."""
        found = self._program(rules, session)
        if isinstance(found, str):
            self.counters.fallbacks[found] += 1
            return None
        self.counters.turns += 1
        return found

    def _program(self, rules: TurnRules, session: Session) -> Program | str:
        """The program, or why there is none."""
        if not rules.constrained:
            return "unconstrained"
        if rules.decides_as_it_goes:
            return "bans that depend on the text"
        if session.intervention is not None:
            return "an experiment"
        if not getattr(self.engine.model, "steps_on_device", False):
            return "the model's kind"
        with self.engine.lock:
            automaton = self._automaton(rules.grammar)
            if automaton is None:
                return "the grammar"
            if self.engine.device.type != "cuda":
                forget_if_moved(self.engine.model)
            else:
                found = weights_of(self.engine.model)
                if found is None:
                    return "hooks in the model"
                if found != self._weights:  # at first, or somebody moved or replaced them
                    pack_for_steps(self.engine.model)
                    self._weights = weights_of(self.engine.model)
            key = id(automaton), key_of(rules)
            if key not in self._programs:
                if len(self._programs) > 1024:
                    self._programs.clear()
                self._programs[key] = Program.of(rules, automaton)
            return self._programs[key]

    def _automaton(self, grammar: Any) -> Automaton | None:
        identity = getattr(grammar, "identity", None)
        if identity is None:
            return None
        if identity not in self._automata:
            self._automata[identity] = automaton_of(grammar)
        return self._automata[identity]

    # --- what a step computes -------------------------------------------------------------

    def together(self, pieces: Sequence[Piece]) -> tuple[list[tuple[Live, Fed]], list[Piece]]:
        """Run the rows ahead that ask for it; their answers, and the pieces that are left."""
        asking = [p for p in pieces if _asks(p)]
        left = [p for p in pieces if not _asks(p)]
        # Prompts beside them should not wait long.
        most = self.window if left else self.most
        done: list[tuple[Live, Fed]] = []
        for at in range(0, len(asking), ROWS[-1]):
            group = asking[at : at + ROWS[-1]]
            try:
                found, undone = self._batch(group, most)
            except torch.OutOfMemoryError:
                found, undone = [], group
                self.counters.fallbacks["memory"] += len(group)
            done += found
            left += undone
        return done, left

    def _batch(
        self, pieces: Sequence[Piece], most: int
    ) -> tuple[list[tuple[Live, Fed]], list[Piece]]:
        rows: list[tuple[Piece, int]] = []
        undone: list[Piece] = []
        garbage = -1
        for piece in pieces:
            steps = self._reserved(piece, most, spare=int(garbage < 0))
            if steps < 1:
                undone.append(piece)
                self.counters.fallbacks["room"] += 1
                continue
            rows.append((piece, steps))
            if garbage < 0:
                garbage = self._slot(piece.session.row, len(piece.session) + steps)
        if not rows:
            return [], undone
        said = self._said(rows, garbage)
        # Copies before any run is told: where memory ends, none of them has moved on.
        states = [said.hidden[:, r].clone() for r in range(len(rows))]
        done = []
        for r, (piece, _) in enumerate(rows):
            fed = self._answer(piece, said.choices[:, r].tolist(), states[r])
            if fed is None:
                undone.append(piece)
                self.counters.fallbacks["no numbers"] += 1
            else:
                done.append((piece.entry, fed))
        self._count(said, len(rows))
        return done, undone

    def _reserved(self, piece: Piece, most: int, *, spare: int) -> int:
        """Steps for which the row of ``piece`` has blocks now, and ``spare`` slots more."""
        cache, session = self.engine.cache, piece.session
        ask = _ask(piece)
        longest = self.engine.max_positions - len(session)
        steps = min(ask.steps, ask.room, most, longest)
        while steps > 0 and cache.needed(session.row, steps + spare) > cache.free:
            steps -= 1
        if steps > 0:
            cache.reserve(session.row, steps + spare)
        return steps

    def _slot(self, row: int, place: int) -> int:
        cache = self.engine.cache
        return cache.tables[row][place // cache.block] * cache.block + place % cache.block

    def _said(self, rows: Sequence[tuple[Piece, int]], garbage: int) -> Said:
        tables = self._loaded_tables()
        bases = tables.bases([_ask(p).program for p, _ in rows])
        mode: Mode = "greedy"
        for piece, _ in rows:
            sampling = _ask(piece).sampler.sampling
            if sampling.temperature > 0 and mode != "filtered":
                mode = "filtered" if filtered(sampling) else "sampled"
        reach = max(len(p.session) + n for p, n in rows) + 1
        stepper = self._stepper(len(rows), reach, mode, garbage)
        stepper.load([self._row(p, n, b) for (p, n), b in zip(rows, bases, strict=True)], garbage)
        return stepper.run(max(n for _, n in rows), self.window)

    def _row(self, piece: Piece, steps: int, base: int) -> Row:
        ask, session = _ask(piece), piece.session
        s: Sampling = ask.sampler.sampling
        return Row(
            token=piece.block.ids[0],
            position=int(piece.block.positions[0, 0]),
            length=len(session),
            steps=steps,
            room=ask.room,
            state=base + ask.state,
            calls=ask.calls,
            blocks=self.engine.cache.tables[session.row],
            hidden=session.hidden,
            temperature=s.temperature,
            top_k=s.kept,
            top_p=s.top_p,
            chances=ask.sampler.ahead(steps) if s.temperature > 0 else (),
        )

    def _answer(self, piece: Piece, choices: list[list[float]], states: Tensor) -> Fed | None:
        """What the run of ``piece`` is told; None if nothing could be chosen."""
        kept = [c for c in choices if c[0] >= 0]
        if not kept:
            return None
        entry, row = piece.entry, piece.session.row
        hidden = states[: len(kept)]
        self.engine.cache.commit([row], [len(kept)])
        entry.computed(1, hidden[:1], None)
        if entry.known is not None:
            self.engine.cache.register(row, entry.known)
        piece.session.touched = self.engine.counters.forwards
        self.engine.counters.shared_tokens += entry.shared
        fed = entry.fed()
        self.counters.tokens += len(kept)
        self.engine.counters.tokens += len(kept)
        return replace(
            fed,
            ahead=Record(
                tokens=[int(c[0]) for c in kept],
                forced=[bool(c[1]) for c in kept],
                logprobs=[c[2] for c in kept],
                removed=[c[3] for c in kept],
                drawn=[c[4] for c in kept],
                hidden=hidden,
            ),
        )

    def _count(self, said: Said, rows: int) -> None:
        own, all_ = self.counters, self.engine.counters
        own.batches += 1
        own.steps += said.steps
        own.reads += said.reads
        all_.host_reads += said.reads
        all_.forwards += said.steps
        all_.padded_tokens += said.steps * _bucket(rows)
        all_.rows_per_forward += [rows] * said.steps

    def drop(self, session: Session, record: Record) -> None:
        """What is left of ``record`` is not wanted: the row goes back to what its session has."""
        self.counters.dropped += record.left
        cache = self.engine.cache
        with self.engine.lock:
            if not session.closed:
                cache.truncate(session.row, min(len(session), cache.lengths[session.row]))

    # --- recorded steps -------------------------------------------------------------------

    @property
    def latest(self) -> Stepper | None:
        """The step that was used last: for measurements."""
        return next((stepper for _, stepper in reversed(self._steppers.values())), None)

    def _loaded_tables(self) -> Tables:
        if self._tables is None:
            engine = self.engine
            width = engine.model.config.get_text_config().hidden_size
            probe = torch.zeros(1, width, dtype=engine.model.dtype, device=engine.device)
            vocab = engine.model.compute_logits(probe).shape[-1]
            self._tables = Tables(vocab, frozenset(engine.control_ids), engine.device)
        return self._tables

    def _stepper(self, rows: int, reach: int, mode: Mode, garbage: int) -> Stepper:
        """A step for so many rows that reach so far; recorded anew if anything moved."""
        tables = self._loaded_tables()
        rows, slots = _bucket(rows), _slots(reach)
        # What a recorded step reads must still lie where it lay.
        places = tuple(store.data_ptr() for store in self.engine.cache.keys)
        relies = places, tables.version, self._weights
        key = rows, slots, mode
        known = self._steppers.get(key)
        if known is None or known[0] != relies:
            stepper = Stepper(
                self.engine.model,
                self.engine.cache,
                tables,
                rows=rows,
                slots=slots,
                steps=self.most,
                mode=mode,
                compiled=self.compiled,
            )
            if self.engine.device.type == "cuda":
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                stepper.load([], garbage)
                stepper.record(self._pool)
                self.counters.recorded += 1
            self._steppers[key] = relies, stepper
            while len(self._steppers) > _STEPPERS:
                self._steppers.popitem(last=False)
        self._steppers.move_to_end(key)
        return self._steppers[key][1]


def _ask(piece: Piece) -> Ask:
    found: Ask | None = piece.entry.feed.ahead
    assert found is not None
    return found


def _asks(piece: Piece) -> bool:
    """Whether a piece is one token of a turn that lets the device choose what comes next."""
    alone = len(piece.block.ids) == 1 and piece.last and piece.outputs == 0
    return alone and piece.entry.feed.ahead is not None


def _bucket(rows: int) -> int:
    return next(size for size in ROWS if size >= rows)


def _slots(reach: int) -> int:
    """A round number of slots, at most a half more than asked for."""
    size = _SLOTS
    while size < reach:
        size *= 2
    return size * 3 // 4 if size > _SLOTS and size * 3 // 4 >= reach else size


def weights_of(model: Any) -> Hashable:
    """What a recorded step of ``model`` relies on: the modules of its language model and output
    head, and where their weights lie. None if one has a hook or a ``forward`` of its own (as
    libraries that move weights put there): a recorded step would not call it.

    Asked for every turn, so without ``modules()`` and ``parameters()``, which take five times as
    long.
    """
    waiting = [model.model, model.lm_head]
    plain = torch.nn.Parameter
    found: list[int] = []
    while waiting:
        module = waiting.pop()
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return None
        found.append(id(module))
        for weight in module._parameters.values():
            if weight is not None:
                found.append(weight.data_ptr() if type(weight) is plain else id(weight))
        waiting += [child for child in module._modules.values() if child is not None]
    return tuple(found)


def make_ahead(engine: Engine, decoding: Decoding) -> Ahead | None:
    """What ``decoding`` means for ``engine``: None lets the host choose every token. Raises
    :class:`UserError` for a device that cannot."""
    check_decoding(decoding)
    if decoding in ("device", "compiled-device") and engine.device.type not in ("cpu", "cuda"):
        raise UserError(
            "this kind of device cannot choose tokens by itself",
            where=f"decoding={decoding!r}",
            got=engine.device.type,
            expected="cuda, or cpu",
            fix="leave decoding out, or use decoding='host'",
        )
    if decoding == "host" or (decoding == "auto" and engine.device.type != "cuda"):
        return None
    return Ahead(engine, compiled=decoding == "compiled-device")
