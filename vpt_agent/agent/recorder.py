"""Writes what a run does into its trace, and counts what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vpt_agent.engine.decode import Turn
from vpt_agent.engine.parts import Looked
from vpt_agent.kernels import kernel_name
from vpt_agent.tokens.grammar import ParseError
from vpt_agent.trace import (
    Decoded,
    ErrorInfo,
    ImageEncoded,
    LimitReached,
    PerceptionAppended,
    Prefilled,
    PromptRendered,
    RequestAnswered,
    RequestFailed,
    RunFinished,
    RunStarted,
    SpanInfo,
    ToolCalled,
    ToolFinished,
    ToolRejected,
    Trace,
    ViewInfo,
    WarningGiven,
)
from vpt_agent.types import (
    CallError,
    Limits,
    RunStatus,
    Span,
    ToolCall,
    ToolResult,
    Usage,
    View,
)

if TYPE_CHECKING:
    from vpt_agent.engine.session import Session
    from vpt_agent.model.remote.client import Done, Trouble


class Recorder:
    """One run's view of a trace: fills in the run's id and turn, keeps usage and warnings."""

    def __init__(self, trace: Trace, run: str, text: Callable[[Sequence[int]], str]) -> None:
        self.trace, self.run, self.text = trace, run, text
        self.turn = 0
        self.open = False  # between its first and its last event
        self.usage = Usage()
        self.warnings: list[str] = []
        self.began = time.perf_counter()
        self._sources: dict[str, bytes] = {}

    def seconds(self) -> float:
        """Wall clock of the run so far."""
        return time.perf_counter() - self.began

    def _ids(self) -> dict[str, Any]:
        return {"run": self.run, "turn": self.turn}

    def _view(self, view: View) -> ViewInfo:
        blob = self.trace.add_picture(view, source=self._sources.get(view.id))
        return ViewInfo.of(view, blob)

    def _spans(self, spans: Iterable[Span]) -> tuple[SpanInfo, ...]:
        return tuple(
            SpanInfo.of(s, "" if s.source == "visual" else self.text(s.ids)) for s in spans
        )

    def started(
        self,
        question: str,
        views: Sequence[View],
        *,
        tool_choice: str,
        seed: int | None,
        limits: Limits,
        tools: Mapping[str, str],
        model: Mapping[str, Any],
        sampling: Mapping[str, Any],
        continues: str | None,
        sources: Mapping[str, bytes],
    ) -> None:
        """The question, its pictures and the settings."""
        self._sources = dict(sources)
        self.open = True
        self.trace.emit(
            RunStarted(
                **self._ids(),
                question=question,
                views=tuple(self._view(v) for v in views),
                tool_choice=tool_choice,
                seed=seed,
                limits=vars(limits),
                tools=dict(tools),
                model=dict(model),
                sampling=dict(sampling),
                continues=continues,
            )
        )

    def warn(self, message: str) -> None:
        """Say it once, in the answer and in the trace."""
        if message not in self.warnings:
            self.warnings.append(message)
            self.trace.emit(WarningGiven(**self._ids(), message=message))

    def looked(self, found: Iterable[Looked], kind: str | None = None) -> None:
        """Pictures became visual tokens, or were found to have been already."""
        for item in found:
            if item.reused:
                self.usage.reused_features += 1
            else:
                self.usage.encoder_calls += 1
                self.usage.pixels += item.view.size[0] * item.view.size[1]
            self.trace.emit(
                ImageEncoded(
                    **self._ids(),
                    view=item.view.id,
                    encoder=item.encoder,
                    kind=kind,
                    visual_tokens=item.tokens.shape[0],
                    grid=item.grid or (),
                    key=item.key,
                    reused=item.reused,
                    kernels=item.kernels,
                    seconds=item.seconds,
                    early=item.early,
                    hidden=item.hidden,
                )
            )

    def prompt(self, text: str, spans: Sequence[Span]) -> None:
        """What the model is given, before it is computed."""
        self.usage.prompt_tokens += sum(len(s.ids) for s in spans)
        self.usage.visual_tokens += sum(len(s.ids) for s in spans if s.source == "visual")
        self.trace.emit(PromptRendered(**self._ids(), text=text, spans=self._spans(spans)))

    def prefilled(self, session: Session, start: int, seconds: float) -> None:
        """The prompt is in the cache; ``start`` is the first row that was new."""
        self.trace.emit(
            Prefilled(
                **self._ids(),
                tokens=len(session) - start,
                start=start,
                next_position=session.next_position,
                seconds=seconds,
            )
        )

    def decoded(self, turn: Turn, seconds: float, kernels: Sequence[str] = ()) -> None:
        """A stretch of decoding, with its sources, what the constraint took, and what computed."""
        rules = turn.rules
        for span in turn.spans:
            if span.source == "sampled":
                self.usage.sampled_tokens += len(span.ids)
            else:
                self.usage.forced_tokens += len(span.ids)
        self.trace.emit(
            Decoded(
                **self._ids(),
                spans=self._spans(turn.spans),
                removed_mass=tuple(turn.removed),
                drawn=tuple(turn.drawn),
                first=tuple(sorted(rules.first or ())) if rules else (),
                banned=tuple(sorted(rules.banned)) if rules else (),
                max_calls=rules.max_calls if rules else None,
                stop=turn.stop,
                seconds=seconds,
                ahead=turn.ahead,
                kernels=tuple(kernels),
            )
        )

    def called(self, call: ToolCall) -> None:
        """A complete call."""
        self.usage.tool_calls += 1
        control = None if call.control is None else self.trace.add_tensor(call.control)
        self.trace.emit(
            ToolCalled(
                **self._ids(),
                call_id=call.id,
                name=call.name,
                arguments=dict(call.arguments),
                kind=call.kind,
                origin=call.origin,
                tokens=call.tokens,
                control=control,
            )
        )

    def rejected(self, error: ParseError) -> None:
        """Ids that began a call and are none."""
        self.trace.emit(
            ToolRejected(
                **self._ids(),
                name=error.call,
                error=ErrorInfo.of(CallError(error.kind, error.message)),
                tokens=error.tokens,
            )
        )

    def finished_call(self, result: ToolResult) -> None:
        """The result of a call, or its error."""
        self.trace.emit(
            ToolFinished(
                **self._ids(),
                call_id=result.call_id,
                name=result.name,
                ok=result.ok,
                views=tuple(self._view(v) for v in result.views),
                text=result.text,
                structured=result.structured,
                error=None if result.error is None else ErrorInfo.of(result.error),
                visual_tokens=0 if result.features is None else result.features.tokens.shape[0],
                kernels=result.kernels,
                seconds=result.seconds,
                metadata=dict(result.metadata),
            )
        )

    def appended(
        self,
        session: Session,
        call_ids: Sequence[str],
        spans: Sequence[Span],
        start: int,
        seconds: float,
    ) -> None:
        """Results are in the cache."""
        visual = sum(len(s.ids) for s in spans if s.source == "visual")
        hidden = [] if session.hidden is None else [session.hidden]
        self.usage.visual_tokens += visual
        self.usage.prompt_tokens += sum(len(s.ids) for s in spans)
        self.trace.emit(
            PerceptionAppended(
                **self._ids(),
                call_ids=tuple(call_ids),
                spans=self._spans(spans),
                visual_tokens=visual,
                start=start,
                next_position=session.next_position,
                kernels=(kernel_name("splice", *hidden),) if visual else (),
                seconds=seconds,
            )
        )

    # --- models behind servers: text, and what the server counted ------------------------

    def remote_prompt(self, text: str) -> None:
        """What is said to a server's model; the earlier messages go with it."""
        span = SpanInfo(source="given", ids=(), text=text)
        self.trace.emit(PromptRendered(**self._ids(), text=text, spans=(span,)))

    def remote_results(self, call_ids: Sequence[str], text: str) -> None:
        """Results that go with the next request."""
        self.trace.emit(
            PerceptionAppended(
                **self._ids(),
                call_ids=tuple(call_ids),
                spans=(SpanInfo(source="given", ids=(), text=text),),
                visual_tokens=0,
                start=0,
                next_position=0,
            )
        )

    def remote_said(self, text: str, finish: str, seconds: float) -> None:
        """The words of an answer."""
        span = SpanInfo(source="sampled", ids=(), text=text)
        self.trace.emit(Decoded(**self._ids(), spans=(span,), stop=finish, seconds=seconds))

    def request_failed(self, trouble: Trouble) -> None:
        """An attempt that came to nothing."""
        self.usage.requests += 1
        self.trace.emit(
            RequestFailed(
                **self._ids(),
                attempt=trouble.attempt,
                error=trouble.error,
                status=trouble.status,
                message=trouble.message,
                wait=trouble.wait,
                left_out=trouble.left_out,
            )
        )

    def request_answered(self, done: Done, cost: float | None) -> None:
        """An answer, and what it took."""
        said, counted = done.completion, done.completion.tokens
        self.usage.requests += 1
        self.usage.prompt_tokens += counted.prompt or 0
        self.usage.sampled_tokens += counted.completion or 0
        self.usage.cached_tokens += counted.cached or 0
        self.usage.cost += cost or 0.0
        self.trace.emit(
            RequestAnswered(
                **self._ids(),
                model=said.model,
                response_id=said.id,
                finish=said.finish,
                attempts=done.attempts,
                prompt_tokens=counted.prompt,
                cached_tokens=counted.cached,
                completion_tokens=counted.completion,
                reasoning_tokens=counted.reasoning,
                cost=cost,
                reasoning=said.reasoning,
                refusal=said.refusal,
                seconds=done.seconds,
            )
        )

    def limit(self, limit: str, value: float, allowed: float) -> None:
        """A limit was met: ``value`` was needed, ``allowed`` was there."""
        self.trace.emit(
            LimitReached(**self._ids(), limit=limit, value=float(value), allowed=float(allowed))
        )

    def finished(
        self,
        status: RunStatus,
        text: str,
        *,
        limit: str | None = None,
        error: str | None = None,
    ) -> None:
        """The outcome; the last event of a run."""
        self.open = False
        self.usage.seconds = self.seconds()
        usage = {
            k: float(v) if isinstance(v, float) else int(v) for k, v in self.usage.to_dict().items()
        }
        self.trace.emit(
            RunFinished(
                **self._ids(),
                status=status,
                text=text,
                usage=usage,
                warnings=tuple(self.warnings),
                limit=limit,
                error=error,
            )
        )
