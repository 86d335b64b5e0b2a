"""Decoding one assistant turn: free outside a call, constrained by the grammar inside one."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vpt_agent.engine.ahead import Ask, Record
from vpt_agent.engine.parts import Fed, Feed, Tokens
from vpt_agent.engine.sampling import Choice, Sampler
from vpt_agent.engine.session import Session
from vpt_agent.tokens.grammar import Event, ParsedCall, ParseError
from vpt_agent.types import Span, TokenSource

Stop = Literal["end", "special", "new_tokens", "deadline", "inline"]


class CallGrammar(Protocol):
    """What reads and constrains the calls of a turn: :class:`vpt_agent.tokens.Grammar` for
    perception tokens, :class:`vpt_agent.engine.written.WrittenGrammar` for JSON. A state has a
    ``kind``, which is not None inside a call."""

    @property
    def start(self) -> Any:
        """The state before anything was read."""

    def step(self, state: Any, token_id: int) -> tuple[Any, Event | None]:
        """Read one id: the next state, and a call or an error that is complete with it."""

    def allowed(self, state: Any) -> frozenset[int] | Tensor | None:
        """The ids that may come next (a bool tensor [n]: those where it is true); None: any."""

    def forced(self, state: Any) -> int | None:
        """The one id that may come next, if there is only one."""

    def finish(self, state: Any) -> ParseError | None:
        """What it means that the ids end here."""


def _nothing_banned(state: Any, full: bool) -> frozenset[int]:
    return frozenset()


@dataclass(frozen=True)
class TurnRules:
    """What a turn may do.

    ``stop`` are ids that end it (the end of turn first among them: ``end``). ``banned`` ids are
    never chosen. ``first`` restricts the first token of the turn (tool choice). ``max_calls``
    more calls may be started; ``max_new_tokens`` more tokens chosen. ``constrained`` False leaves
    the model free inside calls too: for measuring what the constraint does. ``inline`` kinds end
    decoding at their call's end, for their result to be appended at once. ``ban`` gives ids that
    are banned in a state of the grammar besides; ``full`` says that no call may begin any more.
    ``on_start`` hears the grammar's kind of a call that has begun.
    """

    grammar: CallGrammar
    end: int
    stop: frozenset[int]
    starts: frozenset[int]
    max_new_tokens: int
    max_calls: int
    banned: frozenset[int] = frozenset()
    first: frozenset[int] | None = None
    constrained: bool = True
    inline: frozenset[str] = frozenset()
    expired: Callable[[], bool] = lambda: False
    on_token: Callable[[int, TokenSource], None] | None = None
    on_start: Callable[[Any], None] | None = None
    ban: Callable[[Any, bool], frozenset[int]] = _nothing_banned

    def constraint(
        self, state: Any, *, opening: bool, started: int
    ) -> tuple[frozenset[int] | Tensor | None, frozenset[int]]:
        """The ids allowed next (None: any) and those banned, in grammar state ``state``.

        ``opening``: this is the turn's first token; ``started`` calls were begun in the turn.
        """
        allowed = self.grammar.allowed(state) if self.constrained else None
        if opening and self.first is not None:
            allowed = self.first
        full = started >= self.max_calls
        banned = self._banned_full if full else self.banned
        more = self.ban(state, full)
        return allowed, banned | more if more else banned

    @property
    def decides_as_it_goes(self) -> bool:
        """Whether :attr:`ban` may ban more as the turn goes on."""
        return self.ban is not _nothing_banned

    @cached_property
    def _banned_full(self) -> frozenset[int]:
        return self.banned | self.starts


@dataclass(frozen=True)
class TurnCall:
    """A call as the grammar read it, with its control states [k, D] if its kind has any."""

    parsed: ParsedCall
    control: Tensor | None
    forced_start: bool


@dataclass
class Turn:
    """What was decoded. ``pending`` ids were chosen but not computed yet: feed them first.

    A special token that ended the turn (``stop`` is special) is ``stop_id``, and stands in neither
    ``spans`` nor ``pending``; ``removed`` counts it.

    ``removed`` is the probability mass that the constraint took away at each token; -1 where it is
    not known, since decoding ended before a forced token's logits were needed. ``drawn`` is the log
    probability with which each token was drawn (:class:`Choice`), 0 for forced ones. ``rules`` are
    those of the turn; ``ahead`` of its tokens were chosen on the device.
    """

    spans: list[Span] = field(default_factory=list)
    items: list[TurnCall | ParseError] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    removed: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    rules: TurnRules | None = None
    pending: list[int] = field(default_factory=list)
    stop: Stop = "end"
    stop_id: int | None = None
    logits: Tensor | None = None  # [vocab] of the next token, if nothing is pending and it is known
    ahead: int = 0

    @property
    def calls(self) -> list[TurnCall]:
        """The complete calls among the items."""
        return [i for i in self.items if isinstance(i, TurnCall)]

    @property
    def count(self) -> int:
        """Tokens chosen in this turn."""
        return len(self.removed)


@dataclass
class _Chosen:
    token: int
    source: TokenSource
    logprob: float
    removed: float
    drawn: float = 0.0


def decode_turn(
    session: Session, logits: Tensor, sampler: Sampler, rules: TurnRules
) -> Generator[Feed, Fed, Turn]:
    """Decode until the turn ends, a limit is met, or an inline call is complete.

    ``logits`` [vocab] are those that predict the turn's first token.
    """
    return (yield from _Decoder(session, logits, sampler, rules).run())


class _Decoder:
    def __init__(self, session: Session, logits: Tensor, sampler: Sampler, rules: TurnRules):
        self.session, self.sampler, self.rules = session, sampler, rules
        self.logits: Tensor | None = logits
        self.state: Any = rules.grammar.start
        self.turn = Turn()
        self.chosen: list[_Chosen] = []
        self.started = int(self.state.kind is not None)  # a turn may have to begin with a call
        self.forced_start = False
        ahead = session.engine.ahead
        # Where the device may choose, as long as it can say what the rules are.
        self.ahead = ahead
        self.program = None if ahead is None else ahead.program_of(rules, session)
        self.stride = 0 if ahead is None else ahead.first
        self.record: Record | None = None

    def run(self) -> Generator[Feed, Fed, Turn]:
        while True:
            if len(self.chosen) >= self.rules.max_new_tokens:
                return self._finish("new_tokens")
            if self.rules.expired():
                return self._finish("deadline")
            picked = yield from self._pick()
            self._record(picked)
            token = picked.token
            if token in self.rules.stop:
                if token == self.rules.end:
                    return self._finish("end", token)
                self.turn.pending.pop()
                return self._finish("special", token)
            inside_before = self.state.kind is not None
            self.state, event = self.rules.grammar.step(self.state, token)
            if not inside_before and self.state.kind is not None:
                self.started += 1
                self.forced_start = picked.source == "forced"
                if self.rules.on_start is not None:
                    self.rules.on_start(self.state.kind)
            elif not inside_before:
                self.turn.text.append(token)
            if isinstance(event, ParsedCall):
                control = yield from self._control(event)
                self.turn.items.append(TurnCall(event, control, self.forced_start))
                if event.kind in self.rules.inline:
                    return self._finish("inline")
            elif isinstance(event, ParseError):
                self.turn.items.append(event)

    def _pick(self) -> Generator[Feed, Fed, _Chosen]:
        rules = self.rules
        if self.program is not None and self.logits is None and self.turn.pending:
            yield from self._flush()
        if self.logits is None and self.record is not None and self.record.left:
            return self._recorded(self.record)
        if rules.constrained:
            forced = rules.grammar.forced(self.state)
            if forced is not None:
                if self.logits is None:
                    return _Chosen(forced, "forced", 0.0, -1.0)  # priced when it is fed
                p = self._probability(self.logits, forced)
                return _Chosen(forced, "forced", 0.0, 1.0 - p)
        if self.logits is None:
            yield from self._flush()
        assert self.logits is not None
        allowed, banned = rules.constraint(
            self.state, opening=not self.chosen, started=self.started
        )
        only = _only(allowed)
        if only is not None:
            p = self._probability(self.logits, only)
            return _Chosen(only, "forced", 0.0, 1.0 - p)
        self.session.engine.counters.host_reads += 1
        choice: Choice = self.sampler.choose(self.logits, allowed=allowed, banned=banned)
        return _Chosen(choice.token, "sampled", choice.logprob, choice.removed, choice.drawn)

    def _probability(self, logits: Tensor, token: int) -> float:
        self.session.engine.counters.host_reads += 1
        return self.sampler.probability_of(logits, token)

    def _recorded(self, record: Record) -> _Chosen:
        """The next token that the device chose."""
        i = record.used
        record.used += 1
        self.turn.ahead += 1
        token, drawn = record.tokens[i], record.drawn[i]
        if record.forced[i]:
            return _Chosen(token, "forced", 0.0, record.removed[i])
        if self.sampler.sampling.temperature > 0:
            self.sampler.take()  # the device had it
        return _Chosen(token, "sampled", record.logprobs[i], record.removed[i], drawn)

    def _record(self, picked: _Chosen) -> None:
        self.chosen.append(picked)
        self.turn.pending.append(picked.token)
        self.logits = None
        if self.rules.on_token is not None:
            self.rules.on_token(picked.token, picked.source)

    def _flush(self, *, goes_on: bool = True) -> Generator[Feed, Fed, None]:
        """Compute the pending tokens; price the forced ones among them. ``goes_on``: decoding goes
        on behind them, so that the device may run ahead."""
        pending = self.turn.pending
        if self.record is not None:
            if self.record.left:  # computed on the device already
                self.session.follow(pending[0], self.record.hidden[self.record.used :][:1])
                self.turn.pending = []
                return
            self.record = None
        first = len(self.chosen) - len(pending)
        unpriced = [i for i in range(1, len(pending)) if self.chosen[first + i].removed < 0]
        fed = yield from self.session.feed(
            [Tokens(tuple(pending))],
            logits="all" if unpriced else "last",
            ahead=self._ask() if goes_on else None,
        )
        if fed[-1].ahead is not None:
            self.record, self.turn.pending = fed[-1].ahead, []
            return
        logits = torch.cat([f.logits for f in fed if f.logits is not None])
        for i in unpriced:
            p = self._probability(logits[i - 1], pending[i])
            self.chosen[first + i].removed = 1.0 - p
        self.turn.pending = []
        self.logits = logits[-1]

    def _ask(self) -> Ask | None:
        """What the device may choose behind the one pending token; more each time."""
        room = self.rules.max_new_tokens - len(self.chosen)
        if self.ahead is None or self.program is None or len(self.turn.pending) != 1 or room < 1:
            return None
        state = self.program.automaton.number(self.state)
        if state is None:
            return None
        steps, self.stride = self.stride, min(2 * self.stride, self.ahead.most)
        calls = self.rules.max_calls - self.started
        return Ask(self.program, state, steps, room, calls, self.sampler)

    def _control(self, call: ParsedCall) -> Generator[Feed, Fed, Tensor | None]:
        row = self.session.engine.kind_of(call.kind)
        if row.control is None:
            return None
        yield from self._flush(goes_on=call.kind not in self.rules.inline)
        return self.session.take_controls(row.control)

    def _finish(self, stop: Stop, token: int | None = None) -> Turn:
        turn = self.turn
        if self.ahead is not None and self.record is not None and self.record.left:
            self.ahead.drop(self.session, self.record)
        turn.stop, turn.stop_id, turn.logits = stop, token, self.logits
        if stop != "inline" and (cut := self.rules.grammar.finish(self.state)) is not None:
            turn.items.append(cut)
        turn.removed = [c.removed for c in self.chosen]
        turn.drawn, turn.rules = [c.drawn for c in self.chosen], self.rules
        # A special token ends the turn but has no place in the conversation.
        turn.spans = _spans(self.chosen[:-1] if stop == "special" else self.chosen)
        return turn


def _only(allowed: frozenset[int] | Tensor | None) -> int | None:
    """The one id that is allowed, if there is only one."""
    if isinstance(allowed, Tensor):
        ids = allowed.nonzero()
        return int(ids[0]) if len(ids) == 1 else None
    return next(iter(allowed)) if allowed is not None and len(allowed) == 1 else None


def _spans(chosen: list[_Chosen]) -> list[Span]:
    """Neighbouring tokens of one source together."""
    spans: list[Span] = []
    run: list[_Chosen] = []
    for item in [*chosen, None]:
        if run and (item is None or item.source != run[0].source):
            logprobs = tuple(c.logprob for c in run) if run[0].source == "sampled" else ()
            spans.append(Span(run[0].source, tuple(c.token for c in run), logprobs=logprobs))
            run = []
        if item is not None:
            run.append(item)
    return spans
