"""The voice of a model on this machine: turns as tokens of an engine session.

What is said to it is rendered by a *surface*, which also knows how it writes its calls: perception
tokens (:mod:`vpt_agent.agent.token_surface`) or JSON by a chat template
(:mod:`vpt_agent.agent.written_surface`). Nothing is computed twice: only what is new is fed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor

from vpt_agent.agent.dispatch import Dispatcher
from vpt_agent.agent.recorder import Recorder
from vpt_agent.agent.state import Conversation, Request
from vpt_agent.engine.decode import Turn, TurnRules, decode_turn
from vpt_agent.engine.intervention import Condition, Intervention
from vpt_agent.engine.parts import Looked, Part, Tokens, Visual
from vpt_agent.engine.sampling import Sampler
from vpt_agent.engine.session import spans_of
from vpt_agent.model import compiled
from vpt_agent.model.voice import Allowed, Cost, Outcome, Reply, ReplyStop, SaidCall, Steps
from vpt_agent.prompt.vpt import FeatureSlot, Ids, PictureSlot, PromptPart
from vpt_agent.prompt.vpt import Outcome as Told
from vpt_agent.tokens.grammar import ParseError
from vpt_agent.types import TokenSource, ToolCall, ToolResult, View

FRAME = 8
"""Tokens, at most, that a layout puts around one part of a result."""

OnToken = Callable[[int, TokenSource], None]


class Surface(Protocol):
    """How one kind of model is talked to, and how it writes its calls, for one question."""

    @property
    def tools(self) -> Sequence[str]:
        """Names of the tools that may be called."""

    @property
    def end(self) -> int:
        """The id that ends a turn."""

    @property
    def image_pad(self) -> int:
        """The id that stands for the visual tokens of pictures."""

    def opening(self, views: Sequence[View], question: str) -> list[PromptPart]:
        """The beginning of a conversation, up to the assistant's words."""

    def follow_up(self, views: Sequence[View], question: str) -> list[PromptPart]:
        """A later question, behind the assistant's end of turn."""

    def results(self, told: Sequence[Told], views: Mapping[str, View]) -> list[PromptPart]:
        """The turn that brings results, behind the assistant's end of turn."""

    def inline(self, told: Told) -> list[PromptPart]:
        """A result right behind its call."""

    def rules(self, allowed: Allowed, on_token: OnToken | None, room: int) -> TurnRules:
        """What the coming turn may do."""

    def words(self, turn: Turn) -> list[int]:
        """Ids of a turn that :meth:`answer` is given."""

    def items(self, turn: Turn) -> list[SaidCall | ParseError]:
        """The calls of a turn, and what is none."""

    def tool_of(self, error: ParseError) -> str:
        """The tool whose call was begun."""

    def text_tokens(self, text: str) -> int:
        """How many tokens a text has."""

    def answer(self, ids: Sequence[int]) -> str:
        """The answer in a turn's words."""

    def name_of(self, token: int) -> str:
        """How a token is spelled."""

    def readable(self, parts: Sequence[PromptPart], counts: Mapping[str, int]) -> str:
        """A prompt as one text."""


class SessionVoice:
    """See :class:`vpt_agent.model.voice.Voice`."""

    def __init__(
        self,
        request: Request,
        talk: Conversation,
        surface: Surface,
        dispatcher: Dispatcher,
        recorder: Recorder,
        *,
        on_token: OnToken | None = None,
    ) -> None:
        self.request, self.talk, self.surface = request, talk, surface
        self.dispatcher, self.recorder, self.on_token = dispatcher, recorder, on_token
        self.session = talk.require_session()
        self.engine = self.session.engine
        self.sampler = Sampler(request.sampling)
        self._logits: Tensor | None = None  # [vocab] of the next token
        self._said: list[int] = []  # ids of the turn's words
        self._turn: Turn | None = None

    @property
    def tools(self) -> Sequence[str]:
        """Names of the tools that it may call in this question."""
        return self.surface.tools

    @property
    def intervention(self) -> Intervention | None:
        """An experiment's change of this run."""
        return self.session.intervention

    @property
    def condition(self) -> Condition | None:
        """The session's: the model's own, or as an experiment says."""
        return self.session.condition

    # --- what is said to the model --------------------------------------------------------

    def ask(self) -> Steps[None]:
        """Encode the pictures, prefill the prompt."""
        r = self.request
        if len(r.first) == 1:  # the first turn must call it
            self._foresee(r.first[0])
        looked = yield from self._look(r.views)
        first = not len(self.session) and not self.talk.tail
        pieces = (self.surface.opening if first else self.surface.follow_up)(r.views, r.question)
        parts = self._parts(self._closing(pieces), looked, {})
        counts = {name: found.tokens.shape[0] for name, found in looked.items()}
        self.recorder.prompt(self.surface.readable(pieces, counts), spans_of(parts))
        start, began = len(self.session), time.perf_counter()
        yield from self._feed(parts)
        self.recorder.prefilled(self.session, start, time.perf_counter() - began)

    def results(self, outcome: Sequence[Outcome], errors: Sequence[ParseError]) -> Steps[bool]:
        """The results become the next user turn."""
        self._said = []
        views = {v.id: v for _, result in outcome for v in result.views}
        looked = yield from self._look(list(views.values()))
        told = [_told(call, result) for call, result in outcome]
        told += [Told("", e.call, error=f"Error: {e.message}") for e in errors]
        pieces = self._closing(self.surface.results(told, views))
        return (yield from self._append(outcome, pieces, looked))

    def inline(self, outcome: Outcome) -> Steps[bool]:
        """The result stands right behind its call, in the same turn."""
        call, result = outcome
        looked = yield from self._look(result.views)
        pieces = self.surface.inline(_told(call, result))
        after = None if self._turn is None else self._turn.logits
        return (yield from self._append([outcome], pieces, looked, after=after))

    def _append(
        self,
        outcome: Sequence[Outcome],
        pieces: list[PromptPart],
        looked: Mapping[str, Looked],
        *,
        after: Tensor | None = None,
    ) -> Steps[bool]:
        """``after`` are the logits behind an unfinished turn, which goes on if nothing is new."""
        parts = self._parts(pieces, looked, {call.id: (call, r) for call, r in outcome})
        parts = self.session.changed(parts)
        if not parts and after is not None:
            self._logits = after
            return True
        spans = spans_of(parts)
        if sum(len(s.ids) for s in spans) > self.room():
            return False
        start = len(self.session) + len(self.talk.tail)
        began = time.perf_counter()
        yield from self._feed(parts)
        self.recorder.appended(
            self.session,
            [call.id for call, _ in outcome],
            spans,
            start,
            time.perf_counter() - began,
        )
        return True

    def _closing(self, pieces: Sequence[PromptPart]) -> list[PromptPart]:
        """``pieces`` behind the end of the assistant's turn, where that is missing."""
        missing, self.talk.unclosed = self.talk.unclosed, False
        return [Ids((self.surface.end,)), *pieces] if missing else list(pieces)

    def _foresee(self, kind: object) -> None:
        """A call of ``kind`` has begun: what needs only the picture can begin, too."""
        self.dispatcher.foresee(str(kind), self.talk.originals[-1] if self.talk.originals else None)

    def _look(self, views: Sequence[View]) -> Generator[Any, Any, dict[str, Looked]]:
        if not views:
            return {}
        (found,) = yield [self.dispatcher.look("base", tuple(views))]
        self.recorder.looked(found)
        return {item.view.id: item for item in found}

    def _feed(self, parts: list[Part]) -> Generator[Any, Any, None]:
        tail: list[Part] = [Tokens(tuple(self.talk.tail))] if self.talk.tail else []
        before = self._spent()
        # Said beforehand, so that the engine can leave room for it.
        length = len(self.session) + sum(len(s.ids) for s in spans_of([*tail, *parts]))
        self.session.expected = min(length + self.request.limits.new_tokens, self.longest())
        fed = yield from self.session.feed([*tail, *parts])
        self.talk.tail = []
        self._count(before)
        logits = fed[-1].logits
        assert logits is not None
        self._logits = logits[-1]

    def _spent(self) -> tuple[int, int, int]:
        session = self.session
        return session.forward_tokens, session.forward_calls, session.shared_tokens

    def _count(self, before: tuple[int, int, int]) -> None:
        tokens, calls, shared = self._spent()
        self.recorder.usage.forward_tokens += tokens - before[0]
        self.recorder.usage.forward_calls += calls - before[1]
        self.recorder.usage.cached_tokens += shared - before[2]

    def _parts(
        self,
        pieces: Sequence[PromptPart],
        looked: Mapping[str, Looked],
        outcome: Mapping[str, Outcome],
    ) -> list[Part]:
        parts: list[Part] = []
        for piece in pieces:
            if isinstance(piece, Ids):
                parts.append(Tokens(piece.ids))
            elif isinstance(piece, PictureSlot):
                found = looked[piece.view]
                pad = self.surface.image_pad
                call = next((c for c, r in outcome.values() if _shows(r, piece.view)), None)
                kind, call_id = (None, None) if call is None else (call.kind, call.id)
                parts.append(Visual(pad, found.tokens, found.grid, piece.view, kind, call_id))
            else:
                parts.append(self._features(piece, outcome[piece.call_id][1]))
        return parts

    def _features(self, slot: FeatureSlot, result: ToolResult) -> Visual:
        assert result.features is not None
        row = self.engine.kind_of(slot.kind)
        return Visual(row.placeholder, result.features.tokens, None, None, slot.kind, slot.call_id)

    # --- what the model says --------------------------------------------------------------

    def reply(self, allowed: Allowed) -> Steps[Reply]:
        """Decode a turn, or its part up to an inline call."""
        began, computed = time.perf_counter(), compiled.counts.tokens
        before = self._spent()
        assert self._logits is not None
        rules = self.surface.rules(allowed, self.on_token, self.room())
        rules = replace(rules, on_start=self._foresee)
        turn = yield from decode_turn(self.session, self._logits, self.sampler, rules)
        self._count(before)
        self._turn, self.talk.tail = turn, turn.pending
        kernels = (compiled.KERNEL,) if compiled.counts.tokens > computed else ()
        self.recorder.decoded(turn, time.perf_counter() - began, kernels)
        self._said += self.surface.words(turn)
        stop: ReplyStop = "end" if turn.stop == "special" else turn.stop
        if turn.stop == "special":
            name = self.surface.name_of(turn.stop_id or 0)
            self.recorder.warn(f"the model ended its turn with {name} instead of the end of turn")
            self.talk.unclosed = True
        return Reply(self.surface.items(turn), stop, turn.count)

    def cut(self) -> None:
        """The end of turn comes with what is appended next."""
        self.talk.unclosed = True

    def text(self) -> str:
        """What the model answered in its last turn."""
        return self.surface.answer(self._said)

    def tool_of(self, error: ParseError) -> str:
        """The tool whose call was begun."""
        return self.surface.tool_of(error)

    # --- how much fits --------------------------------------------------------------------

    def room(self) -> int:
        """Tokens that the conversation can still take before the model's longest sequence."""
        return self.engine.max_positions - len(self.session) - len(self.talk.tail)

    def longest(self) -> int:
        """The model's longest sequence."""
        return self.engine.max_positions

    def cost(self, result: ToolResult) -> Cost:
        """Visual tokens of what a result shows, and all tokens that it takes."""
        visual = sum(self.dispatcher.visual_tokens(v) for v in result.views)
        if result.features is not None:
            visual += result.features.tokens.shape[0]
        words = self.surface.text_tokens(result.text) if result.text else 0
        return Cost(visual, words + visual + FRAME * (len(result.views) + 1))


def _told(call: ToolCall, result: ToolResult) -> Told:
    return Told(
        call.id,
        call.kind if result.features is None else result.features.kind,
        tuple(v.id for v in result.views),
        result.features is not None,
        result.text,
        None if result.error is None else f"Error: {result.error.message}",
    )


def _shows(result: ToolResult, view_id: str) -> bool:
    return any(view.id == view_id for view in result.views)
