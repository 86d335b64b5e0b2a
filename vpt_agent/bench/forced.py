"""An agent whose answer has a shape that is known beforehand: one call, then so many tokens.

Random weights end no turn of their own, and a measurement needs the same work in every run. So the
first turn is a call of one kind and its end; the second has exactly ``new_tokens`` tokens, chosen
greedily among those that neither stop nor call. All else is the agent as it is.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vpt_agent.agent import PerceptionAgent
from vpt_agent.agent.dialect import Heard
from vpt_agent.agent.dispatch import Dispatcher
from vpt_agent.agent.load import Parts, parts_of
from vpt_agent.agent.recorder import Recorder
from vpt_agent.agent.session_voice import OnToken, SessionVoice
from vpt_agent.agent.state import Conversation, Request
from vpt_agent.agent.token_surface import TokenDialect, TokenSurface
from vpt_agent.bench.split import TimedModel, TimedSampler
from vpt_agent.engine.ahead import Decoding
from vpt_agent.engine.core import Engine
from vpt_agent.engine.decode import TurnRules
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.voice import Allowed
from vpt_agent.prompt.vpt import VPTLayout
from vpt_agent.tokens.grammar import Event, GrammarState, ParsedCall, ParseError
from vpt_agent.tokens.table import PerceptionKind
from vpt_agent.tool import ToolRegistry
from vpt_agent.trace import Decoded
from vpt_agent.types import Answer


@dataclass(frozen=True)
class _Closed:
    """Behind the call: only the end of the turn may come."""

    kind: str | None = None


@dataclass(frozen=True)
class OneCall:
    """A grammar that ends the turn behind its first call; see
    :class:`vpt_agent.engine.decode.CallGrammar`."""

    inner: Any
    end: int

    @property
    def start(self) -> GrammarState:
        """The state before anything was read."""
        state: GrammarState = self.inner.start
        return state

    @property
    def identity(self) -> Hashable:
        """See :class:`vpt_agent.tokens.automaton.Listed`."""
        return type(self), self.inner.identity, self.end

    @property
    def marks(self) -> frozenset[int]:
        """Ids that mean something outside a call."""
        marks: frozenset[int] = self.inner.marks
        return marks

    def summary(self, state: Any) -> Hashable:
        """What of ``state`` decides what may come."""
        if isinstance(state, _Closed):
            return state
        summary: Hashable = self.inner.summary(state)
        return summary

    def step(self, state: Any, token_id: int) -> tuple[Any, Event | None]:
        """Read one id."""
        if isinstance(state, _Closed):
            return state, None
        after, event = self.inner.step(state, token_id)
        return (_Closed() if isinstance(event, ParsedCall) else after), event

    def allowed(self, state: Any) -> frozenset[int] | None:
        """The ids that may come next."""
        if isinstance(state, _Closed):
            return frozenset({self.end})
        found: frozenset[int] | None = self.inner.allowed(state)
        return found

    def forced(self, state: Any) -> int | None:
        """The one id that may come next."""
        if isinstance(state, _Closed):
            return self.end
        found: int | None = self.inner.forced(state)
        return found

    def finish(self, state: Any) -> ParseError | None:
        """What it means that the ids end here."""
        error: ParseError | None = None
        if not isinstance(state, _Closed):
            error = self.inner.finish(state)
        return error


class _ForcedSurface(TokenSurface):
    """See the module."""

    def __init__(self, request: Request, layout: VPTLayout, table: Any, new_tokens: int) -> None:
        super().__init__(request, layout, table)
        self.new_tokens = new_tokens
        self.turns = 0

    def rules(self, allowed: Allowed, on_token: OnToken | None, room: int) -> TurnRules:
        """A call and its end; then ``new_tokens`` words."""
        rules = super().rules(allowed, on_token, room)
        self.turns += 1
        if self.turns == 1 and rules.first:
            return replace(rules, grammar=OneCall(rules.grammar, self.end))
        silent = rules.banned | rules.stop | rules.starts
        return replace(rules, banned=silent, max_new_tokens=self.new_tokens)


@dataclass(frozen=True)
class ForcedDialect(TokenDialect):
    """See the module. A :class:`TimedModel` has the time of choosing tokens counted, too."""

    new_tokens: int = field(default=32, kw_only=True)
    model: Any = field(default=None, kw_only=True)

    def voice(
        self, request: Request, talk: Conversation, recorder: Recorder, heard: Heard
    ) -> SessionVoice:
        """Turns of the known shape."""
        surface = _ForcedSurface(request, self.layout, self.engine.table, self.new_tokens)
        voice = SessionVoice(
            request, talk, surface, self.dispatcher, recorder, on_token=heard.token
        )
        if isinstance(self.model, TimedModel):
            voice.sampler = TimedSampler(voice.sampler, self.model.clock)
        return voice


def forced_agent(
    model: VPTForConditionalGeneration | TimedModel,
    processor: VPTProcessor,
    *,
    new_tokens: int,
    decoding: Decoding = "auto",
) -> PerceptionAgent:
    """An agent of ``model`` whose second turn has ``new_tokens`` tokens."""
    plain = model.model if isinstance(model, TimedModel) else model
    parts: Parts = parts_of(plain, processor.tokenizer, "bench")
    layout = VPTLayout(parts.tokenizer, plain.table.table)

    def dialect(engine: Engine, dispatcher: Dispatcher) -> ForcedDialect:
        return ForcedDialect(
            layout, engine, dispatcher, parts.abilities, new_tokens=new_tokens, model=model
        )

    return PerceptionAgent(
        model,
        parts.tokenizer,
        policy=parts.policy,
        registry=ToolRegistry.from_entry_points(),
        abilities=parts.abilities,
        max_positions=parts.max_positions,
        decoding=decoding,
        dialect=dialect,
    )


def kind_of(model: VPTForConditionalGeneration, name: str) -> PerceptionKind:
    """The row of ``name``, which the model must have. Raises :class:`UserError`."""
    known = [row.name for row in model.table.rows]
    if name not in known:
        raise UserError(
            "this model has no such perception kind",
            where="--force",
            got=name,
            expected=", ".join(known) or "none at all",
        )
    return model.table[name].kind


def chosen_ahead(answers: Sequence[Answer]) -> float:
    """The share of the tokens of ``answers`` that was chosen on the device, before the host
    looked."""
    told = [e for a in answers for e in a.trace.events if isinstance(e, Decoded)]
    count = sum(len(e.removed_mass) for e in told)
    return sum(e.ahead for e in told) / count if count else 0.0


def call_length(kind: PerceptionKind, controls: int) -> int:
    """Tokens of the first turn: the call and the end of turn."""
    if kind.payload == "grid":
        return 7
    if kind.payload == "control":
        return controls + 3
    raise UserError(
        "only calls of a fixed length can be measured",
        where="--force",
        got=f"{kind.name}, whose payload is {kind.payload}",
        expected="a kind of a region or of a control token",
    )
