"""From a trace to a :class:`vpt_agent.types.Record`: the sequence that stood in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vpt_agent.errors import TraceError
from vpt_agent.trace.events import Decoded, PerceptionAppended, PromptRendered, RunStarted
from vpt_agent.types import Record, Span

if TYPE_CHECKING:
    from vpt_agent.trace.store import Trace


def chain_of_runs(trace: Trace, run: str | None = None) -> list[str]:
    """The runs of one session up to ``run`` (default: the last one), oldest first."""
    starts = {e.run: e for e in trace.events if isinstance(e, RunStarted)}
    if run is None:
        run = next(reversed(starts), None)
    if run is None or run not in starts:
        raise TraceError(
            "this trace has no such run", got=run, expected=", ".join(starts) or "at least one run"
        )
    chain: list[str] = []
    current: str | None = run
    while current is not None:
        if current in chain or current not in starts:
            raise TraceError(
                "a run continues one that this trace does not hold", where=chain[-1], got=current
            )
        chain.append(current)
        current = starts[current].continues
    return chain[::-1]


def record_from_trace(trace: Trace, run: str | None = None) -> Record:
    """The conversation of ``run`` (default: the last one) and of the runs it continues.

    Spans stand in the order of the cache: prompt, decoded, appended. Neighbours that differ in
    nothing but their ids are joined. ``views`` are the pictures that visual spans show, in order.
    """
    runs = set(chain_of_runs(trace, run))
    spans: list[Span] = []
    for event in trace.events:
        if event.run in runs and isinstance(event, PromptRendered | Decoded | PerceptionAppended):
            for info in event.spans:
                span = info.to_span()
                if spans and _joinable(spans[-1], span):
                    spans[-1] = _join(spans[-1], span)
                elif span.ids:
                    spans.append(span)
    views = dict.fromkeys(s.view for s in spans if s.source == "visual" and s.view is not None)
    return Record(tuple(spans), tuple(views))


def _joinable(a: Span, b: Span) -> bool:
    # Two visual spans are two pictures, even where the same view is shown twice.
    same = (a.source, a.view, a.kind, a.call_id) == (b.source, b.view, b.kind, b.call_id)
    return same and a.source != "visual" and bool(a.logprobs) == bool(b.logprobs)


def _join(a: Span, b: Span) -> Span:
    return Span(a.source, a.ids + b.ids, a.view, a.kind, a.call_id, a.logprobs + b.logprobs)
