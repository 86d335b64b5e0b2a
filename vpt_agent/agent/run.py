"""The orchestrator: one question, from the prompt to the answer, as a generator for the loop.

It is a state machine that lets a model's :class:`~vpt_agent.model.voice.Voice` speak, runs the
calls of what it said and tells it their results. It never runs the model itself, so that many runs
go together. What it does is what `docs/way-of-one-question.md` tells, step by step.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from vpt_agent.agent.dispatch import Dispatcher, Scope
from vpt_agent.agent.recorder import Recorder
from vpt_agent.agent.state import Conversation, Progress, Request
from vpt_agent.errors import UserError
from vpt_agent.model.voice import Allowed, Outcome, Reply, SaidCall, Voice
from vpt_agent.tokens.grammar import ParseError
from vpt_agent.trace import ToolCalled
from vpt_agent.types import Answer, CallError, RunStatus, ToolCall, ToolResult

Steps = Generator[Any, Any, Answer]

RESERVE = 64
"""Tokens that results leave free, for the words around them and the answer."""


class Run:
    """Answers one request on a conversation, by ``voice``."""

    def __init__(
        self,
        request: Request,
        talk: Conversation,
        voice: Voice,
        dispatcher: Dispatcher,
        recorder: Recorder,
    ) -> None:
        self.request, self.talk, self.voice = request, talk, voice
        self.dispatcher, self.recorder = dispatcher, recorder
        self.progress = Progress()

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
            yield from self.voice.ask()
            return (yield from self._turns())
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
        if self.voice.intervention is not None:
            self.recorder.warn(f"an experiment changes this run: {self.voice.intervention.name}")
        for view in r.views:
            self.talk.views[view.id] = view
        self.talk.originals = (*self.talk.originals, *r.views)

    # --- the turns ------------------------------------------------------------------------

    def _turns(self) -> Steps:
        done = self.progress
        waiting: list[Outcome] = []
        opening = True
        while True:
            self.recorder.turn = done.rounds + 1
            reply = yield from self.voice.reply(self._allowed(opening))
            opening = False
            done.tokens += reply.tokens
            if reply.stop in ("new_tokens", "deadline"):
                return self._stopped(reply)
            outcome = yield from self._perform(reply.items)
            if reply.stop == "inline":
                waiting += outcome[:-1]
                told = yield from self.voice.inline(outcome[-1])
            else:
                waiting += outcome
                if not waiting and not reply.broken:
                    return self._answered(reply)
                done.rounds += 1
                errors = [item for item in reply.items if isinstance(item, ParseError)]
                told = yield from self.voice.results(waiting, errors)
                waiting = []
            if not told:
                return self._out_of_room()

    def _allowed(self, opening: bool) -> Allowed:
        limits, done = self.request.limits, self.progress
        left = limits.calls - len(done.calls)
        for name, value, allowed in (
            ("calls", len(done.calls), limits.calls),
            ("rounds", done.rounds, limits.rounds),
            ("retries", done.failures, limits.retries + 1),
        ):
            if value >= allowed and self.voice.tools:
                left = 0
                if name not in done.said:
                    done.said.add(name)
                    self.recorder.limit(name, value, allowed)
        return Allowed(
            calls=left,
            new_tokens=max(0, limits.new_tokens - done.tokens),
            opening=opening,
            without=self._given_up(),
            expired=self._expired,
            left=self._left,
        )

    def _given_up(self) -> frozenset[str]:
        """Tools that failed more often than they let the model try again."""
        names = set()
        for name in self.voice.tools:
            tool = self.dispatcher.registry.find(name)
            failed = self.progress.failed[name]
            if tool is None or failed <= tool.max_retries:
                continue
            names.add(name)
            limit = f"retries of {name}"
            if limit not in self.progress.said:
                self.progress.said.add(limit)
                self.recorder.limit(limit, failed, tool.max_retries + 1)
        return frozenset(names)

    def _left(self) -> float | None:
        """Seconds that the run has left; None for no end."""
        allowed = self.request.limits.seconds
        return None if allowed is None else max(0.0, allowed - self.recorder.seconds())

    def _expired(self) -> bool:
        return self._left() == 0.0

    # --- calls ----------------------------------------------------------------------------

    def _perform(
        self, items: Sequence[SaidCall | ParseError]
    ) -> Generator[Any, Any, list[Outcome]]:
        calls = []
        for item in items:
            if isinstance(item, ParseError):
                self._failure(self.voice.tool_of(item))
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
            self.voice.condition,
        )
        results = yield from self.dispatcher.answers(
            calls, scope, self.progress.made, self.recorder.looked
        )
        checked = []
        room = self.voice.room() - RESERVE
        for call, result in zip(calls, results, strict=True):
            if self.voice.intervention is not None:
                result = self.voice.intervention.result(call, result, self.talk.views)
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

    def _call(self, item: SaidCall) -> ToolCall:
        taken = {e.call_id for e in self.recorder.trace.events if isinstance(e, ToolCalled)}
        self.talk.calls += 1
        while f"call_{self.talk.calls}" in taken:  # by another conversation, in the same trace
            self.talk.calls += 1
        return ToolCall(
            id=f"call_{self.talk.calls}",
            name=item.name,
            arguments=dict(item.arguments),
            origin=item.origin,
            kind=item.kind,
            tokens=item.tokens,
            control=item.control,
            repairs=item.repairs,
        )

    def _deadline(self) -> float | None:
        left = self._left()
        return None if left is None else time.monotonic() + left

    def _within_budget(self, result: ToolResult, room: int) -> tuple[ToolResult, int]:
        """A result that would break a limit is left out, and the model is told.

        ``room`` is what the conversation can take of the results of this turn; given back less
        what this one takes.
        """
        limits, done = self.request.limits, self.progress
        pixels = sum(v.size[0] * v.size[1] for v in result.views)
        cost = self.voice.cost(result)
        tokens, length = cost.visual_tokens, cost.tokens
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

    # --- endings --------------------------------------------------------------------------

    def _answered(self, reply: Reply) -> Answer:
        status: RunStatus = "refused" if reply.stop == "refused" else "answered"
        text = self.voice.text()
        self.recorder.finished(status, text)
        return self._answer(text, status, None)

    def _stopped(self, reply: Reply) -> Answer:
        limits, used = self.request.limits, self.progress.tokens
        if reply.stop == "deadline":
            name, value, allowed = "seconds", self.recorder.seconds(), limits.seconds or 0.0
        elif used >= limits.new_tokens:
            name, value, allowed = "new_tokens", used, limits.new_tokens
        else:
            return self._out_of_room(reply.items)
        return self._limited(name, value, allowed, reply.items)

    def _out_of_room(self, items: Sequence[SaidCall | ParseError] = ()) -> Answer:
        """The conversation has reached the longest that it can be."""
        longest = self.voice.longest()
        return self._limited("context", longest + 1, longest, items)

    def _limited(
        self, limit: str, value: float, allowed: float, items: Sequence[SaidCall | ParseError]
    ) -> Answer:
        self._leave_out(items, limit)
        text = self.voice.text()
        self.recorder.limit(limit, value, allowed)
        self.voice.cut()
        self.recorder.finished("limit", text, limit=limit)
        return self._answer(text, "limit", limit)

    def _leave_out(self, items: Sequence[SaidCall | ParseError], limit: str) -> None:
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

    def _answer(self, text: str, status: RunStatus, limit: str | None) -> Answer:
        done = self.progress
        return Answer(
            text=text,
            calls=tuple(done.calls),
            results=tuple(done.results),
            views=(*self.request.views, *done.views),
            usage=self.recorder.usage,
            warnings=tuple(self.recorder.warnings),
            trace=self.recorder.trace,
            status=status,
            limit=limit,
        )
