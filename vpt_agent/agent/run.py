"""The orchestrator: one question, from the prompt to the answer, as a generator for the loop.

It is a state machine that asks the engine for what it needs and never runs the model itself, so
that many runs go together. What it does is what `docs/way-of-one-question.md` tells, step by step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vpt_agent.agent.dispatch import Dispatcher, Scope
from vpt_agent.agent.recorder import Recorder
from vpt_agent.agent.state import Conversation, Progress, Request
from vpt_agent.engine.decode import Turn, TurnCall, TurnRules, decode_turn
from vpt_agent.engine.parts import Looked, Part, Tokens, Visual
from vpt_agent.engine.sampling import Sampler
from vpt_agent.engine.session import spans_of
from vpt_agent.errors import UserError
from vpt_agent.prompt.vpt import FeatureSlot, Ids, Outcome, PictureSlot, PromptPart, VPTLayout
from vpt_agent.tokens.grammar import Grammar, ParseError
from vpt_agent.trace import ToolCalled
from vpt_agent.types import (
    Answer,
    CallError,
    TokenSource,
    ToolCall,
    ToolResult,
    View,
)

Steps = Generator[Any, Any, Answer]

FRAME = 8
"""Tokens, at most, that the layout puts around one part of a result."""
RESERVE = 64
"""Tokens that results leave free, for the words around them and the answer."""


def _shows(result: ToolResult, view_id: str) -> bool:
    return any(view.id == view_id for view in result.views)


class Run:
    """Answers one request on a conversation's session."""

    def __init__(
        self,
        request: Request,
        talk: Conversation,
        layout: VPTLayout,
        dispatcher: Dispatcher,
        recorder: Recorder,
        *,
        on_token: Callable[[int, TokenSource], None] | None = None,
    ) -> None:
        self.request, self.talk, self.layout = request, talk, layout
        self.dispatcher, self.recorder, self.on_token = dispatcher, recorder, on_token
        self.session = talk.session
        self.engine = talk.session.engine
        self.sampler = Sampler(request.sampling)
        self.progress = Progress()
        self.grammar = Grammar(self.engine.table, kinds=request.kinds)

    def steps(self) -> Steps:
        """The whole run. An error, or a caller who stops it, ends it with its event in the trace;
        the conversation is then as it was before."""
        if self.talk.busy:
            raise UserError(
                "a question of this conversation is still being answered",
                fix="take its stream to the end, or close it, before the next question",
            )
        self.talk.busy = True
        restore = self.talk.save()
        try:
            self._start()
            logits = yield from self._open()
            return (yield from self._turns(logits))
        except BaseException as error:
            restore()
            stopped = isinstance(error, GeneratorExit)
            why = "stopped by the caller" if stopped else str(error) or type(error).__name__
            if self.recorder.open:
                self.recorder.finished("failed", "", error=why)
            raise
        finally:
            self.talk.busy = False

    # --- the opening ----------------------------------------------------------------------

    def _start(self) -> None:
        r = self.request
        self.recorder.started(
            r.question,
            r.views,
            tool_choice=r.tool_choice,
            seed=r.sampling.seed,
            limits=r.limits,
            tools=r.tools,
            model=r.model,
            sampling=vars(r.sampling),
            continues=self.talk.runs[-1] if self.talk.runs else None,
            sources=r.sources,
        )
        self.talk.runs = (*self.talk.runs, self.recorder.run)
        for message in r.warnings:
            self.recorder.warn(message)
        if self.session.intervention is not None:
            self.recorder.warn(f"an experiment changes this run: {self.session.intervention.name}")
        for view in r.views:
            self.talk.views[view.id] = view
        self.talk.originals = (*self.talk.originals, *r.views)

    def _open(self) -> Generator[Any, Any, Tensor]:
        """Encode the pictures, prefill the prompt; the logits of the first token."""
        r = self.request
        looked = yield from self._look(r.views)
        names = [v.id for v in r.views]
        first = not len(self.session) and not self.talk.tail
        pieces = (self.layout.opening if first else self.layout.follow_up)(names, r.question)
        parts = self._parts(self._closing(pieces), looked, {})
        counts = {name: found.tokens.shape[0] for name, found in looked.items()}
        self.recorder.prompt(self.layout.readable(pieces, counts), spans_of(parts))
        start, began = len(self.session), time.perf_counter()
        logits = yield from self._feed(parts)
        self.recorder.prefilled(self.session, start, time.perf_counter() - began)
        return logits

    def _closing(self, pieces: Sequence[PromptPart]) -> list[PromptPart]:
        """``pieces`` behind the end of the assistant's turn, where that is missing."""
        missing, self.talk.unclosed = self.talk.unclosed, False
        return [Ids((self.layout.end,)), *pieces] if missing else list(pieces)

    def _room(self) -> int:
        """Tokens that the conversation can still take before the model's longest sequence."""
        return self.engine.max_positions - len(self.session) - len(self.talk.tail)

    def _look(self, views: Sequence[View]) -> Generator[Any, Any, dict[str, Looked]]:
        if not views:
            return {}
        (found,) = yield [self.dispatcher.look("base", tuple(views))]
        self.recorder.looked(found)
        return {item.view.id: item for item in found}

    def _feed(self, parts: list[Part]) -> Generator[Any, Any, Tensor]:
        tail: list[Part] = [Tokens(tuple(self.talk.tail))] if self.talk.tail else []
        before = self.session.forward_tokens, self.session.forward_calls
        fed = yield from self.session.feed([*tail, *parts])
        self.talk.tail = []
        self._count(before)
        logits = fed[-1].logits
        assert logits is not None
        return logits[-1]

    def _count(self, before: tuple[int, int]) -> None:
        self.recorder.usage.forward_tokens += self.session.forward_tokens - before[0]
        self.recorder.usage.forward_calls += self.session.forward_calls - before[1]

    def _parts(
        self,
        pieces: Sequence[PromptPart],
        looked: Mapping[str, Looked],
        outcome: Mapping[str, tuple[ToolCall, ToolResult]],
    ) -> list[Part]:
        parts: list[Part] = []
        for piece in pieces:
            if isinstance(piece, Ids):
                parts.append(Tokens(piece.ids))
            elif isinstance(piece, PictureSlot):
                found = looked[piece.view]
                pad = self.layout.image_pad
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

    # --- the turns ------------------------------------------------------------------------

    def _turns(self, logits: Tensor) -> Steps:
        done = self.progress
        waiting: list[tuple[ToolCall, ToolResult]] = []
        first = self.request.first
        while True:
            self.recorder.turn = done.rounds + 1
            turn = yield from self._decode(logits, first)
            first = ()
            done.text += turn.text
            if turn.stop in ("new_tokens", "deadline"):
                return self._stopped(turn)
            outcome = yield from self._perform(turn.items)
            if turn.stop == "inline":
                waiting += outcome[:-1]
                appended = yield from self._append(outcome[-1:], after=turn)
            else:
                waiting += outcome
                if turn.stop == "special":
                    self._warn_special(turn)
                    self.talk.unclosed = True
                if not waiting and not any(isinstance(i, ParseError) for i in turn.items):
                    return self._answered()
                done.rounds += 1
                done.text = []
                appended = yield from self._append(waiting, errors=turn.items)
                waiting = []
            if appended is None:
                return self._out_of_room()
            logits = appended

    def _decode(self, logits: Tensor, first: Sequence[str]) -> Generator[Any, Any, Turn]:
        began = time.perf_counter()
        before = self.session.forward_tokens, self.session.forward_calls
        turn: Turn = yield from decode_turn(
            self.session, logits, self.sampler, self._rules(tuple(first))
        )
        self._count(before)
        self.talk.tail = turn.pending
        self.progress.tokens += turn.count
        self.recorder.decoded(turn, time.perf_counter() - began)
        return turn

    def _rules(self, first: tuple[str, ...]) -> TurnRules:
        limits, done = self.request.limits, self.progress
        table = self.engine.table
        left = limits.calls - len(done.calls)
        for name, value, allowed in (
            ("calls", len(done.calls), limits.calls),
            ("rounds", done.rounds, limits.rounds),
            ("retries", done.failures, limits.retries + 1),
        ):
            if value >= allowed and self.request.kinds:
                left = 0
                if name not in done.said:
                    done.said.add(name)
                    self.recorder.limit(name, value, allowed)
        return TurnRules(
            grammar=self.grammar,
            end=self.layout.end,
            stop=self.layout.stop_ids,
            starts=frozenset(row.start for row in table.rows),
            banned=self.grammar.barred | self._given_up(),
            first=frozenset(table[k].start for k in first) if first and left else None,
            max_new_tokens=max(0, min(limits.new_tokens - done.tokens, self._room())),
            max_calls=left,
            inline=frozenset(r.name for r in table.rows if r.kind.result == "inline"),
            expired=self._expired,
            on_token=self.on_token,
        )

    def _given_up(self) -> frozenset[int]:
        """Start ids of kinds whose tool failed more often than it lets the model try again."""
        ids = set()
        for row in self.engine.table.rows:
            tool = self.dispatcher.registry.find(row.kind.tool)
            failed = self.progress.failed[row.kind.tool]
            if tool is None or failed <= tool.max_retries:
                continue
            ids.add(row.start)
            name = f"retries of {row.kind.tool}"
            if name not in self.progress.said:
                self.progress.said.add(name)
                self.recorder.limit(name, failed, tool.max_retries + 1)
        return frozenset(ids)

    def _expired(self) -> bool:
        allowed = self.request.limits.seconds
        return allowed is not None and self.recorder.seconds() >= allowed

    # --- calls ----------------------------------------------------------------------------

    def _perform(
        self, items: Sequence[TurnCall | ParseError]
    ) -> Generator[Any, Any, list[tuple[ToolCall, ToolResult]]]:
        calls = []
        for item in items:
            if isinstance(item, ParseError):
                self._failure(self.engine.kind_of(item.call).kind.tool)
                self.recorder.rejected(item)
                continue
            calls.append(self._call(item))
            self.recorder.called(calls[-1])
        if not calls:
            return []
        scope = Scope(
            dict(self.talk.views),
            self.talk.originals,
            self.request.sampling.seed,
            self._deadline(),
            self.session.condition,
        )
        results = yield from self.dispatcher.answers(
            calls, scope, self.progress.made, self.recorder.looked
        )
        checked = []
        room = self._room() - RESERVE
        for call, result in zip(calls, results, strict=True):
            if self.session.intervention is not None:
                result = self.session.intervention.result(call, result, self.talk.views)
            result, room = self._within_budget(result, room)
            named = tuple(self.talk.name(v, self.recorder.trace) for v in result.views)
            result = replace(result, views=named)
            self.recorder.finished_call(result)
            if not result.ok:
                self._failure(call.name)
            elif "repeats" not in result.metadata and (same := self.dispatcher.same(call)):
                self.progress.made[same] = result
            self.progress.calls.append(call)
            self.progress.results.append(result)
            self.progress.views += result.views
            checked.append((call, result))
        return checked

    def _failure(self, tool: str) -> None:
        self.progress.failures += 1
        self.progress.failed[tool] += 1

    def _call(self, item: TurnCall) -> ToolCall:
        taken = {e.call_id for e in self.recorder.trace.events if isinstance(e, ToolCalled)}
        self.talk.calls += 1
        while f"call_{self.talk.calls}" in taken:  # by another conversation, in the same trace
            self.talk.calls += 1
        kind = self.engine.kind_of(item.parsed.kind).kind
        return ToolCall(
            id=f"call_{self.talk.calls}",
            name=kind.tool,
            arguments=dict(item.parsed.arguments),
            origin="forced" if item.forced_start else "sampled",
            kind=kind.name,
            tokens=item.parsed.tokens,
            control=item.control,
        )

    def _deadline(self) -> float | None:
        allowed = self.request.limits.seconds
        return None if allowed is None else time.monotonic() + allowed - self.recorder.seconds()

    def _within_budget(self, result: ToolResult, room: int) -> tuple[ToolResult, int]:
        """A result that would break a limit is left out, and the model is told.

        ``room`` is what the conversation can take of the results of this turn; given back less
        what this one takes.
        """
        limits, done = self.request.limits, self.progress
        pixels = sum(v.size[0] * v.size[1] for v in result.views)
        tokens = sum(self.dispatcher.visual_tokens(v) for v in result.views)
        if result.features is not None:
            tokens += result.features.tokens.shape[0]
        length = len(self.layout.encode_text(result.text)) if result.text else 0
        length += tokens + FRAME * (len(result.views) + 1)
        for name, spent, more, allowed in (
            ("pixels", done.pixels, pixels, limits.pixels),
            ("visual_tokens", done.visual_tokens, tokens, limits.visual_tokens),
            ("context", 0, length if result.ok else 0, max(0, room)),
        ):
            if more and spent + more > allowed:
                self.recorder.limit(name, spent + more, allowed)
                error = CallError(
                    "limit", f"the limit of {name} is reached: answer with what you have"
                )
                return replace(result, views=(), features=None, text=None, error=error), room
        done.pixels += pixels
        done.visual_tokens += tokens
        return result, room - length

    def _append(
        self,
        outcome: Sequence[tuple[ToolCall, ToolResult]],
        *,
        errors: Sequence[TurnCall | ParseError] = (),
        after: Turn | None = None,
    ) -> Generator[Any, Any, Tensor | None]:
        """Results become the next user turn, or stand inline ``after`` an unfinished turn.

        Gives the logits behind them, or None if the conversation has no room for them.
        """
        views = [v for _, result in outcome for v in result.views]
        looked = yield from self._look(views)
        told = [
            Outcome(
                call.id,
                call.kind if result.features is None else result.features.kind,
                tuple(v.id for v in result.views),
                result.features is not None,
                result.text,
                None if result.error is None else f"Error: {result.error.message}",
            )
            for call, result in outcome
        ]
        told += [
            Outcome("", item.call, error=f"Error: {item.message}")
            for item in errors
            if isinstance(item, ParseError)
        ]
        pieces = (
            self._closing(self.layout.results(told))
            if after is None
            else (self.layout.inline(told[0]))
        )
        parts = self._parts(pieces, looked, {call.id: (call, r) for call, r in outcome})
        parts = self.session.changed(parts)
        spans = spans_of(parts)
        if sum(len(s.ids) for s in spans) > self._room():
            return None
        if after is not None and not parts and after.logits is not None:
            return after.logits  # an inline call that gave nothing: the turn just goes on
        start = len(self.session) + len(self.talk.tail)
        began = time.perf_counter()
        logits = yield from self._feed(parts)
        self.recorder.appended(
            self.session,
            [call.id for call, _ in outcome],
            spans,
            start,
            time.perf_counter() - began,
        )
        return logits

    # --- endings --------------------------------------------------------------------------

    def _warn_special(self, turn: Turn) -> None:
        name = self.layout.tokenizer.decode([turn.stop_id or 0], skip_special_tokens=False)
        self.recorder.warn(f"the model ended its turn with {name} instead of the end of turn")

    def _answered(self) -> Answer:
        text = self.layout.answer(self.progress.text)
        self.recorder.finished("answered", text)
        return self._answer(text, None)

    def _stopped(self, turn: Turn) -> Answer:
        limits, used = self.request.limits, self.progress.tokens
        if turn.stop == "deadline":
            name, value, allowed = "seconds", self.recorder.seconds(), limits.seconds or 0.0
        elif used >= limits.new_tokens:
            name, value, allowed = "new_tokens", used, limits.new_tokens
        else:
            return self._out_of_room(turn.items)
        return self._limited(name, value, allowed, turn.items)

    def _out_of_room(self, items: Sequence[TurnCall | ParseError] = ()) -> Answer:
        """The conversation has reached the model's longest sequence."""
        longest = self.engine.max_positions
        return self._limited("context", longest + 1, longest, items)

    def _limited(
        self, limit: str, value: float, allowed: float, items: Sequence[TurnCall | ParseError]
    ) -> Answer:
        self._leave_out(items, limit)
        text = self.layout.answer(self.progress.text)
        self.recorder.limit(limit, value, allowed)
        self.talk.unclosed = True
        self.recorder.finished("limit", text, limit=limit)
        return self._answer(text, limit)

    def _leave_out(self, items: Sequence[TurnCall | ParseError], limit: str) -> None:
        """Calls that no token is left for: recorded with the reason, not run."""
        for item in items:
            if isinstance(item, ParseError):
                self.recorder.rejected(item)
                continue
            call = self._call(item)
            error = CallError("limit", f"not run: the limit of {limit} was reached")
            result = ToolResult(call.id, call.name, error=error)
            self.recorder.called(call)
            self.recorder.finished_call(result)
            self.progress.calls.append(call)
            self.progress.results.append(result)

    def _answer(self, text: str, limit: str | None) -> Answer:
        done = self.progress
        return Answer(
            text=text,
            calls=tuple(done.calls),
            results=tuple(done.results),
            views=(*self.request.views, *done.views),
            usage=self.recorder.usage,
            warnings=tuple(self.recorder.warnings),
            trace=self.recorder.trace,
            status="answered" if limit is None else "limit",
            limit=limit,
        )
