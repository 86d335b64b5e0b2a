"""Perception tokens: the published conversation layout, and calls that the grammar reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vpt_agent.agent.dialect import Asked, Heard
from vpt_agent.agent.dispatch import Dispatcher
from vpt_agent.agent.plan import Abilities, plan_request
from vpt_agent.agent.recorder import Recorder
from vpt_agent.agent.session_voice import OnToken, SessionVoice
from vpt_agent.agent.state import Conversation, Request
from vpt_agent.engine.core import Engine
from vpt_agent.engine.decode import Turn, TurnRules
from vpt_agent.model.voice import Allowed, SaidCall
from vpt_agent.prompt.vpt import Outcome, PromptPart, VPTLayout
from vpt_agent.tokens.grammar import Grammar, ParseError
from vpt_agent.tokens.table import ResolvedTable
from vpt_agent.types import View


@dataclass(frozen=True)
class TokenDialect:
    """See :class:`vpt_agent.agent.dialect.Dialect`: VPT checkpoints, and the scripted model."""

    layout: VPTLayout
    engine: Engine
    dispatcher: Dispatcher
    abilities: Abilities

    def plan(self, asked: Asked) -> Request:
        """Kinds that are offered and required, trigger phrase, warnings."""
        return plan_request(
            asked.question,
            asked.views,
            tool_choice=asked.tool_choice,
            limits=asked.limits,
            sampling=asked.sampling,
            table=self.engine.table,
            registry=self.dispatcher.registry,
            abilities=self.abilities,
            layout=self.layout,
            sources=asked.sources,
            notes=asked.notes,
        )

    def conversation(self) -> Conversation:
        """With a session of its own."""
        return Conversation(self.engine.session())

    def voice(
        self, request: Request, talk: Conversation, recorder: Recorder, heard: Heard
    ) -> SessionVoice:
        """Turns as tokens of the session."""
        surface = TokenSurface(request, self.layout, self.engine.table)
        return SessionVoice(request, talk, surface, self.dispatcher, recorder, on_token=heard.token)

    def text(self, ids: Sequence[int]) -> str:
        """What ids say."""
        return self.layout.text(ids)

    def raw_text(self, ids: Sequence[int]) -> str:
        """What ids spell."""
        return self.layout.raw_text(ids)


class TokenSurface:
    """See :class:`vpt_agent.agent.session_voice.Surface`."""

    def __init__(self, request: Request, layout: VPTLayout, table: ResolvedTable) -> None:
        self.request, self.layout, self.table = request, layout, table
        self.grammar = Grammar(table, kinds=request.kinds)
        self.end, self.image_pad = layout.end, layout.image_pad

    @property
    def tools(self) -> Sequence[str]:
        """The tools of the kinds that are offered."""
        return [self.table[kind].kind.tool for kind in self.request.kinds]

    def opening(self, views: Sequence[View], question: str) -> list[PromptPart]:
        """System turn, the first user turn, and the opening of the assistant's."""
        return self.layout.opening([v.id for v in views], question)

    def follow_up(self, views: Sequence[View], question: str) -> list[PromptPart]:
        """A later user turn."""
        return self.layout.follow_up([v.id for v in views], question)

    def results(self, told: Sequence[Outcome], views: Mapping[str, View]) -> list[PromptPart]:
        """The user turn that brings results."""
        return self.layout.results(told)

    def inline(self, told: Outcome) -> list[PromptPart]:
        """A result right behind its call."""
        return self.layout.inline(told)

    def rules(self, allowed: Allowed, on_token: OnToken | None, room: int) -> TurnRules:
        """Free outside a call, the grammar inside; start tokens of what is not allowed banned."""
        table, request = self.table, self.request
        given_up = {r.start for r in table.rows if r.kind.tool in allowed.without}
        first = frozenset(table[k].start for k in request.first)
        return TurnRules(
            grammar=self.grammar,
            end=self.end,
            stop=self.layout.stop_ids,
            starts=frozenset(row.start for row in table.rows),
            banned=self.grammar.barred | given_up,
            first=first if first and allowed.opening and allowed.calls else None,
            max_new_tokens=max(0, min(allowed.new_tokens, room)),
            max_calls=allowed.calls,
            inline=frozenset(r.name for r in table.rows if r.kind.result == "inline"),
            expired=allowed.expired,
            on_token=on_token,
        )

    def words(self, turn: Turn) -> list[int]:
        """Ids of the turn's words, its calls left out."""
        return turn.text

    def items(self, turn: Turn) -> list[SaidCall | ParseError]:
        """What the grammar read while the turn was decoded."""
        items: list[SaidCall | ParseError] = []
        for item in turn.items:
            if isinstance(item, ParseError):
                items.append(item)
                continue
            kind = self.table[item.parsed.kind].kind
            items.append(
                SaidCall(
                    kind.tool,
                    dict(item.parsed.arguments),
                    "forced" if item.forced_start else "sampled",
                    kind.name,
                    item.parsed.tokens,
                    item.control,
                )
            )
        return items

    def tool_of(self, error: ParseError) -> str:
        """The tool of the kind that was begun."""
        return self.table[error.call].kind.tool

    def text_tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.layout.encode_text(text))

    def answer(self, ids: Sequence[int]) -> str:
        """The words, without the published prefix of region answers."""
        return self.layout.answer(ids)

    def name_of(self, token: int) -> str:
        """How a token is spelled."""
        return self.layout.raw_text([token])

    def readable(self, parts: Sequence[PromptPart], counts: Mapping[str, int]) -> str:
        """A prompt as one text."""
        return self.layout.readable(parts, counts)
