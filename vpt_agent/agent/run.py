"""The orchestrator: one question, from the prompt to the answer, as a generator for the loop.

It is a state machine that asks the engine for what it needs and never runs the model itself, so
that many runs go together. What it does is what `docs/way-of-one-question.md` tells, step by step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from vpt_agent.agent.dispatch import Dispatcher, Scope
from vpt_agent.agent.recorder import Recorder
from vpt_agent.engine.decode import Turn, TurnCall, TurnRules, decode_turn
from vpt_agent.engine.parts import Looked, Part, Tokens, Visual, Wait
from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.engine.session import Session, spans_of
from vpt_agent.errors import UserError
from vpt_agent.prompt.vpt import FeatureSlot, Ids, Outcome, PictureSlot, PromptPart, VPTLayout
from vpt_agent.tokens.grammar import Grammar, ParseError
from vpt_agent.types import (
    Answer,
    CallError,
    Limits,
    TokenSource,
    ToolCall,
    ToolResult,
    View,
)


@dataclass(frozen=True)
class Request:
    """One question, checked: what a run is made of.

    ``kinds`` are the perception kinds the model may call, ``first`` those of which the first turn
    must call one (empty: free). ``question`` has its trigger phrase already.
    """

    question: str
    views: tuple[View, ...]
    kinds: tuple[str, ...]
    first: tuple[str, ...]
    tool_choice: str
    limits: Limits
    sampling: Sampling
    tools: Mapping[str, str]
    model: Mapping[str, Any]
    sources: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass
class Conversation:
    """What stays between the questions of one conversation."""

    session: Session
    views: dict[str, View] = field(default_factory=dict)
    tail: list[int] = field(default_factory=list)  # chosen, not computed yet
    runs: list[str] = field(default_factory=list)
    calls: int = 0


@dataclass
class _Progress:
    calls: list[ToolCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    tokens: int = 0
    rounds: int = 0
    failures: int = 0
    pixels: int = 0  # that calls added, as visual_tokens
    visual_tokens: int = 0
    said: set[str] = field(default_factory=set)  # limits already told


Steps = Generator[Any, Any, Answer]


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
        self.progress = _Progress()
        self.grammar = Grammar(self.engine.table, kinds=request.kinds)

    def steps(self) -> Steps:
        """The whole run. A user error ends it with its event in the trace, and is raised."""
        self._start()
        try:
            logits = yield from self._open()
            return (yield from self._turns(logits))
        except UserError as error:
            self.recorder.finished("failed", "", error=str(error))
            raise
        except GeneratorExit:
            # The caller stopped the stream: what was done stays in the trace.
            self.recorder.finished("failed", "", error="stopped by the caller")
            raise

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
        self.talk.runs.append(self.recorder.run)
        for message in r.warnings:
            self.recorder.warn(message)
        for view in r.views:
            self.talk.views[view.id] = view

    def _open(self) -> Generator[Any, Any, Tensor]:
        """Encode the pictures, prefill the prompt; the logits of the first token."""
        r = self.request
        looked = yield from self._look(r.views)
        names = [v.id for v in r.views]
        first = not len(self.session) and not self.talk.tail
        pieces = (self.layout.opening if first else self.layout.follow_up)(names, r.question)
        parts = self._parts(pieces, looked, {})
        counts = {name: found.tokens.shape[0] for name, found in looked.items()}
        self.recorder.prompt(self.layout.readable(pieces, counts), spans_of(parts))
        start, began = len(self.session), time.perf_counter()
        logits = yield from self._feed(parts)
        self.recorder.prefilled(self.session, start, time.perf_counter() - began)
        return logits

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
        results: Mapping[str, ToolResult],
    ) -> list[Part]:
        parts: list[Part] = []
        for piece in pieces:
            if isinstance(piece, Ids):
                parts.append(Tokens(piece.ids))
            elif isinstance(piece, PictureSlot):
                found = looked[piece.view]
                pad = self.layout.image_pad
                call = next((c for c, r in results.items() if found.view in r.views), None)
                kind = None if call is None else "region"
                parts.append(Visual(pad, found.tokens, found.grid, piece.view, kind, call))
            else:
                parts.append(self._features(piece, results[piece.call_id]))
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
                logits = yield from self._append(outcome[-1:], inline=True)
                continue
            waiting += outcome
            if turn.stop == "special":
                # Only the end of turn belongs in the layout; the token was never computed.
                self._warn_special(turn)
                self.talk.tail = [*self.talk.tail[:-1], self.layout.end]
            if not waiting and not any(isinstance(i, ParseError) for i in turn.items):
                return self._answered()
            done.rounds += 1
            done.text = []
            logits = yield from self._append(waiting, errors=turn.items)
            waiting = []

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
        starts = frozenset(row.start for row in table.rows)
        return TurnRules(
            grammar=self.grammar,
            end=self.layout.end,
            stop=self.layout.stop_ids,
            starts=starts,
            banned=self.grammar.barred,
            first=frozenset(table[k].start for k in first) if first and left else None,
            max_new_tokens=limits.new_tokens - done.tokens,
            max_calls=left,
            inline=frozenset(r.name for r in table.rows if r.kind.result == "inline"),
            expired=self._expired,
            on_token=self.on_token,
        )

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
                self.progress.failures += 1
                self.recorder.rejected(item)
                continue
            self.talk.calls += 1
            calls.append(self._call(item, f"call_{self.talk.calls}"))
        if not calls:
            return []
        for call in calls:
            self.recorder.called(call)
        scope = Scope(
            dict(self.talk.views),
            self.request.views or tuple(self.talk.views.values()),
            self.request.sampling.seed,
            self._deadline(),
        )
        looks = self.dispatcher.needed(calls, scope)
        if looks:  # encoder work of all runs in one batch; the tools find it done
            found = yield looks
            for look, items_found in zip(looks, found, strict=True):
                self.recorder.looked(items_found, kind=look.encoder)
        results = yield Wait(self.dispatcher.submit(calls, scope))
        checked = [self._within_budget(r) for r in results]
        for call, result in zip(calls, checked, strict=True):
            self.recorder.finished_call(result)
            self.progress.failures += not result.ok
            self.progress.calls.append(call)
            self.progress.results.append(result)
            for view in result.views:
                self.talk.views[view.id] = view
                self.progress.views.append(view)
        return list(zip(calls, checked, strict=True))

    def _call(self, item: TurnCall, call_id: str) -> ToolCall:
        kind = self.engine.kind_of(item.parsed.kind).kind
        return ToolCall(
            id=call_id,
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

    def _within_budget(self, result: ToolResult) -> ToolResult:
        """A result that would break a limit is left out, and the model is told."""
        limits, done = self.request.limits, self.progress
        pixels = sum(v.size[0] * v.size[1] for v in result.views)
        tokens = sum(self.dispatcher.visual_tokens(v) for v in result.views)
        if result.features is not None:
            tokens += result.features.tokens.shape[0]
        for name, spent, more, allowed in (
            ("pixels", done.pixels, pixels, limits.pixels),
            ("visual_tokens", done.visual_tokens, tokens, limits.visual_tokens),
        ):
            if more and spent + more > allowed:
                self.recorder.limit(name, spent + more, allowed)
                error = CallError(
                    "limit", f"the limit of {name} is reached: answer with what you have"
                )
                return replace(result, views=(), features=None, text=None, error=error)
        done.pixels += pixels
        done.visual_tokens += tokens
        return result

    def _append(
        self,
        outcome: Sequence[tuple[ToolCall, ToolResult]],
        *,
        errors: Sequence[TurnCall | ParseError] = (),
        inline: bool = False,
    ) -> Generator[Any, Any, Tensor]:
        """Results become the next user turn (or stand inline); the logits behind them."""
        views = [v for _, result in outcome for v in result.views]
        looked = yield from self._look(views)
        told = [
            Outcome(
                call.id,
                call.kind,
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
        pieces = self.layout.inline(told[0]) if inline else self.layout.results(told)
        parts = self._parts(pieces, looked, {call.id: result for call, result in outcome})
        start = len(self.session) + len(self.talk.tail)
        began = time.perf_counter()
        logits = yield from self._feed(parts)
        self.recorder.appended(
            self.session,
            [call.id for call, _ in outcome],
            spans_of(parts),
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
        limit = "new_tokens" if turn.stop == "new_tokens" else "seconds"
        self._leave_out(turn.items, limit)
        text = self.layout.answer(self.progress.text)
        limits = self.request.limits
        if limit == "new_tokens":
            self.recorder.limit(limit, self.progress.tokens, limits.new_tokens)
        else:
            self.recorder.limit(limit, self.recorder.seconds(), limits.seconds or 0.0)
        # A follow-up needs the turn closed.
        self.talk.tail.append(self.layout.end)
        self.recorder.finished("limit", text, limit=limit)
        return self._answer(text, limit)

    def _leave_out(self, items: Sequence[TurnCall | ParseError], limit: str) -> None:
        """Calls that no token is left for: recorded with the reason, not run."""
        for item in items:
            if isinstance(item, ParseError):
                self.recorder.rejected(item)
                continue
            self.talk.calls += 1
            call = self._call(item, f"call_{self.talk.calls}")
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
