"""The grammar of perception calls: ids in, one at a time; a call, nothing yet, or an error out.

It is one machine for two uses. *Reading* takes whatever stands there: coordinates in any order and
number, as the published reader does, and turns what is no call into one :class:`ParseError`, never
into an exception. *Generating* asks :meth:`Grammar.allowed` which ids may come next, and is then
always a well-formed call: region start, x_min, y_min, x_max, y_max, end, with min <= max; or start,
the control token(s), end; or start, a text of the row's pattern, end. What stands between start and
end is read by one reader for each payload (`payloads`).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from vpt_agent.errors import CallErrorKind, UserError
from vpt_agent.tokens.grid import check_cells
from vpt_agent.tokens.payloads import Arguments, PayloadReader, reader_of
from vpt_agent.tokens.table import SPACE, PerceptionTable, ResolvedKind, ResolvedTable


@dataclass(frozen=True, slots=True)
class GrammarState:
    """Where the reader stands: outside a call, or in one with these ``tokens`` read (hashable)."""

    kind: str | None = None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class ParsedCall:
    """A complete call. ``arguments``: grid kinds ``{"region": [x_min, y_min, x_max, y_max]}``,
    text kinds ``{argument: text}``, others ``{}``. ``tokens`` are the ids from start to end."""

    kind: str
    arguments: Arguments
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class ParseError:
    """Ids that began a call and are none. ``call`` names the perception kind that was begun;
    ``tokens`` are the ids read, the offending one included if it belongs to the call."""

    kind: CallErrorKind
    message: str
    tokens: tuple[int, ...]
    call: str


Event = ParsedCall | ParseError
OUTSIDE = GrammarState()


@dataclass(frozen=True)
class Grammar:
    """A streaming recogniser of the calls in ``table``.

    ``kinds`` names those that may be called, None all. The object holds no progress: a
    :class:`GrammarState` does, so that one grammar serves many rows and a state can be kept,
    compared and gone back to.
    """

    table: ResolvedTable
    kinds: Iterable[str] | None = field(default=None, kw_only=True)
    _rows: Mapping[str, PayloadReader] = field(init=False, repr=False, compare=False)
    _starts: Mapping[int, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = None if self.kinds is None else frozenset(self.kinds)
        for name in sorted(names or ()):
            self.table[name]  # a UserError that lists the kinds, if it is not there
        rows = {row.name: reader_of(row, self.table.controls) for row in self.table.rows}
        for attribute, value in (
            ("kinds", names),
            ("_rows", rows),
            ("_starts", {row.start: row.name for row in self.table.rows}),
        ):
            object.__setattr__(self, attribute, value)

    @property
    def start(self) -> GrammarState:
        """The state before anything was read."""
        return OUTSIDE

    @property
    def barred(self) -> frozenset[int]:
        """Start ids of kinds that may not be called: not to be generated outside a call."""
        return frozenset(id_ for id_, name in self._starts.items() if not self._offers(name))

    @property
    def strays(self) -> frozenset[int]:
        """Ids that mean something inside a call only: coordinates, controls and ends."""
        inner = {id_ for row in self.table.rows for id_ in row.token_ids}
        return frozenset(inner - set(self._starts))

    @property
    def identity(self) -> Hashable:
        """Grammars with the same identity are the same, as long as one of them is kept."""
        return type(self), id(self.table), self.kinds

    @property
    def marks(self) -> frozenset[int]:
        """Ids that mean something outside a call: the starts."""
        return frozenset(self._starts)

    def summary(self, state: GrammarState) -> Hashable:
        """What of ``state`` decides which ids may come, now and later, as long as only those come
        that are :meth:`allowed`: states with the same summary go on in the same way."""
        if state.kind is None:
            return None
        return state.kind, self._rows[state.kind].summary(state.tokens[1:])

    def _offers(self, name: str) -> bool:
        return self.kinds is None or name in self.kinds

    def step(self, state: GrammarState, token_id: int) -> tuple[GrammarState, Event | None]:
        """Read one id. Any id in any state is fine.

        Outside a call only start ids act; stray coordinate, control and end ids are plain tokens,
        as the published reader has it. Inside, an id that cannot be there ends the call with one
        error; if that id starts a call, the new call has begun. A kind that is not offered gives
        its error at its start id.
        """
        name = self._starts.get(token_id)
        if state.kind is None:
            return (OUTSIDE, None) if name is None else self._begin(name, token_id)
        here = self.table[state.kind]
        tokens = (*state.tokens, token_id)
        if token_id == here.end:
            return OUTSIDE, self._close(here, tokens)
        if self._rows[state.kind].may_hold(state.tokens[1:], token_id):
            return GrammarState(state.kind, tokens), None
        if name is None:
            return OUTSIDE, self._error(here, tokens, "it holds a token that has no place there")
        after, _ = self._begin(name, token_id)
        return after, self._error(here, state.tokens, f"a {name} call began before its end")

    def _begin(self, name: str, token_id: int) -> tuple[GrammarState, Event | None]:
        if self._offers(name):
            return GrammarState(name, (token_id,)), None
        offered = ", ".join(sorted(self.kinds or ())) or "none"
        message = f"{name} is not offered here; offered: {offered}"
        return OUTSIDE, ParseError("unknown_tool", message, (token_id,), name)

    def _error(self, here: ResolvedKind, tokens: tuple[int, ...], why: str) -> ParseError:
        name, wanted = here.name, self._rows[here.name].wanted
        message = f"the {name} call is not well formed: {why}; expected: start, {wanted}, end"
        return ParseError("invalid_arguments", message, tokens, name)

    def _close(self, here: ResolvedKind, tokens: tuple[int, ...]) -> Event:
        found = self._rows[here.name].close(tokens[1:-1])
        if isinstance(found, str):
            return self._error(here, tokens, found)
        return ParsedCall(here.name, found, tokens)

    def finish(self, state: GrammarState) -> ParseError | None:
        """What it means that the ids end here: an error inside a call, nothing outside."""
        if state.kind is None:
            return None
        return self._error(self.table[state.kind], state.tokens, "it has no end")

    def read(self, ids: Iterable[int]) -> tuple[Event, ...]:
        """All calls and errors in ``ids``, in order."""
        state, events = OUTSIDE, []
        for token_id in ids:
            state, event = self.step(state, token_id)
            if event is not None:
                events.append(event)
        last = self.finish(state)
        return (*events, last) if last is not None else tuple(events)

    def allowed(self, state: GrammarState) -> frozenset[int] | None:
        """Ids that may be generated next, never empty; None outside a call: no constraint.

        Ids read by :meth:`step` that are a call in another order are completed with what is
        missing, so generation from any state ends in a valid call.
        """
        if state.kind is None:
            return None
        return self._rows[state.kind].allowed(state.tokens[1:])

    def forced(self, state: GrammarState) -> int | None:
        """The one id that may come next, if there is only one."""
        ids = self.allowed(state)
        return next(iter(ids)) if ids is not None and len(ids) == 1 else None


def call_tokens(
    table: ResolvedTable,
    kind: str,
    region: Sequence[int] | None = None,
    *,
    text: str | None = None,
) -> tuple[int, ...]:
    """The ids that spell a call, in the order in which models generate it.

    ``region`` is [x_min, y_min, x_max, y_max] for grid kinds, ``text`` the argument of text kinds;
    both are None for the others.
    """
    row = table[kind]
    for name, value, payload in (("region", region, "grid"), ("text", text, "text")):
        if (value is not None) != (row.kind.payload == payload):
            raise UserError(
                f"this kind takes no {name}" if value is not None else f"this kind needs a {name}",
                where=kind,
                got=value,
            )
    if region is not None:
        cells = check_cells(region, row.kind.grid)
        middle = (row.x[cells.x_min], row.y[cells.y_min], row.x[cells.x_max], row.y[cells.y_max])
        return (row.start, *middle, row.end)
    if text is not None:
        row.kind.check_text(text)
        ids = dict(zip(row.kind.characters, row.characters, strict=True))
        return (row.start, *(ids[c] for c in text), row.end)
    controls = () if row.control is None else (row.control,) * table.controls
    return (row.start, *controls, row.end)


def read_text(
    text: str, table: PerceptionTable, *, complete_controls: bool = True
) -> tuple[Event, ...]:
    """The calls and errors in decoded ``text``; ids in the events are private to this reading.

    As the published evaluation reads answers: regions in any order, and with ``complete_controls``
    the start token of a control kind alone counts as its call. What that evaluation drops, or takes
    for an answer, comes back as a :class:`ParseError`.
    """
    ids: dict[str, int] = {}
    spelled = {SPACE: " "}  # a space is spelled otherwise in a vocabulary than in text
    resolved = table.resolve(lambda t: ids.setdefault(spelled.get(t, t), len(ids)))
    longest_first = sorted(ids, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if ids else []
    events = Grammar(resolved).read(ids.get(piece, -1) for piece in pieces if piece)
    if not complete_controls:
        return events
    return tuple(
        ParsedCall(e.call, {}, e.tokens)
        if isinstance(e, ParseError) and resolved[e.call].control is not None
        else e
        for e in events
    )
