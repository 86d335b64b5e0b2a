"""From a run's trace to what the learner needs: the conversation, its choices, their constraint.

A choice is a token that the model sampled. Under the constraint it had a log probability, which
the trace tells (``Decoded.drawn``), and the trace tells enough to build the constraint again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from vpt_agent.engine import TurnRules
from vpt_agent.errors import TraceError
from vpt_agent.tokens.grammar import Grammar
from vpt_agent.tokens.table import ResolvedTable
from vpt_agent.trace import (
    Decoded,
    PerceptionAppended,
    PromptRendered,
    RunStarted,
    ToolCalled,
    Trace,
)
from vpt_agent.types import Record, Span, View


@dataclass(frozen=True)
class Choice:
    """The token ``id`` at ``position`` of the conversation, drawn with log probability
    ``logprob``; ``allowed`` ids could stand there (None: all), but none of ``banned``."""

    position: int
    id: int
    logprob: float
    allowed: frozenset[int] | None
    banned: frozenset[int]


@dataclass(frozen=True)
class Episode:
    """A run: its conversation, the choices that carry gradient, and the pictures it saw by id."""

    record: Record
    choices: tuple[Choice, ...]
    views: Mapping[str, View]
    temperature: float


def episode_of(
    trace: Trace, table: ResolvedTable, *, image_pad: int, run: str | None = None
) -> Episode:
    """The episode of ``run`` (default: the last one) of ``trace``.

    No choices are: forced tokens; tokens without an alternative; the tokens of a call that the
    caller's tool_choice forced; a special token that ended a turn and has no place in the
    conversation. A run that goes on from another one, was greedy, or was cut by top-k or top-p, and
    a trace without what the constraint needs, are a :class:`TraceError`.
    """
    start = _start(trace, run)
    calls = {e.call_id: e for e in trace.events if isinstance(e, ToolCalled) and e.run == start.run}
    spans: list[Span] = []
    choices: list[Choice] = []
    offset = 0
    for event in trace.events:
        if event.run != start.run:
            continue
        if isinstance(event, Decoded):
            choices += _choices(event, offset, table)
        if isinstance(event, PromptRendered | Decoded | PerceptionAppended):
            shown = [
                _looked_at(_plain(info.to_span(), image_pad), calls, start) for info in event.spans
            ]
            spans += shown
            offset += sum(len(span.ids) for span in shown)
    seen = dict.fromkeys(s.view for s in spans if s.source == "visual" and s.view is not None)
    views = {name: trace.view(name) for name in seen}
    record = Record(tuple(s for s in spans if s.ids), tuple(seen))
    return Episode(record, tuple(choices), views, float(str(start.sampling["temperature"])))


def _start(trace: Trace, run: str | None) -> RunStarted:
    starts = {e.run: e for e in trace.events if isinstance(e, RunStarted)}
    start = starts.get(run or next(reversed(starts), ""))
    if start is None:
        raise TraceError("this trace has no such run", got=run, expected=", ".join(starts) or "any")
    if start.continues is not None:
        raise TraceError(
            "a rollout is the first question of its conversation",
            where=start.run,
            got=f"it goes on from {start.continues}",
        )
    sampling = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, **start.sampling}
    whole = float(str(sampling["top_p"])) == 1 and not int(str(sampling["top_k"]))
    if not whole or float(str(sampling["temperature"])) <= 0:
        raise TraceError(
            "this run's probabilities cannot be computed again",
            where=start.run,
            got={k: sampling[k] for k in ("temperature", "top_k", "top_p")},
            expected="temperature above 0, top_k 0, top_p 1",
            fix="sample rollouts with a temperature only",
        )
    return start


def _plain(span: Span, image_pad: int) -> Span:
    """A picture through the base tower has no kind, as in data rows, whichever call showed it."""
    if span.source == "visual" and span.kind is not None and span.ids and span.ids[0] == image_pad:
        return replace(span, kind=None)
    return span


def _looked_at(span: Span, calls: Mapping[str, ToolCalled], start: RunStarted) -> Span:
    """Features of a re-encoded picture: the view that their call names, or the latest original."""
    if span.source != "visual" or span.view is not None:
        return span
    call = calls.get(span.call_id or "")
    source = None if call is None else call.arguments.get("source")
    return replace(span, view=start.views[-1].id if source is None else str(source))


def _choices(event: Decoded, offset: int, table: ResolvedTable) -> Iterator[Choice]:
    tokens = [(i, info.source) for info in event.spans for i in info.ids]
    if event.max_calls is None or len(event.drawn) < len(tokens):
        raise TraceError(
            "this trace does not tell with which probability its tokens were drawn",
            where=event.run,
            fix="record rollouts with this version of the library",
        )
    rules = _rules(event, table)
    state, started, forced_call = rules.grammar.start, 0, False
    for number, (token, source) in enumerate(tokens):
        opening = number == 0
        allowed, banned = rules.constraint(state, opening=opening, started=started)
        assert allowed is None or isinstance(allowed, frozenset)  # of perception tokens: ids
        before = state
        state, _ = rules.grammar.step(state, token)
        if before.kind is None and state.kind is not None:
            started += 1
            forced_call = opening and rules.first is not None
        if source == "sampled" and not forced_call and _open(allowed, banned):
            drawn = event.drawn[number]
            yield Choice(offset + number, token, drawn, allowed, banned)
        forced_call = forced_call and state.kind is not None


def _rules(event: Decoded, table: ResolvedTable) -> TurnRules:
    """The rules of the turn, as far as they decide which tokens may come."""
    starts = frozenset(row.start for row in table.rows)
    return TurnRules(
        grammar=Grammar(table),
        end=-1,
        stop=frozenset(),
        starts=starts,
        max_new_tokens=0,
        max_calls=event.max_calls or 0,
        banned=frozenset(event.banned),
        first=frozenset(event.first) or None,
    )


def _open(allowed: frozenset[int] | None, banned: frozenset[int]) -> bool:
    """Whether there was more than one token to choose from."""
    return allowed is None or len(allowed - banned) > 1


def unlike_training(episode: Episode, table: ResolvedTable) -> str | None:
    """Why the whole-sequence forward would not see ``episode`` as the run did; None if it would.

    The forward gives the j-th re-encoded picture of a kind to the j-th call of that kind. In a run
    a call may fail and leave no picture, and a sampled token may look like a placeholder or a call.
    """
    placeholders = {row.placeholder for row in table.rows}
    for span in episode.record.spans:
        if span.source != "visual" and placeholders & set(span.ids):
            return "a placeholder among the words"
    for row in table.rows:
        if row.control is None:
            continue
        calls = pictures = 0
        fits = True
        for span in episode.record.spans:
            if span.source == "visual" and span.kind == row.name:
                pictures += 1
                fits = calls == pictures * table.controls or not _last(episode, span)
            else:
                calls += span.ids.count(row.control)
        if calls % table.controls or not fits:
            return "calls without their pictures"
    return None


def _last(episode: Episode, span: Span) -> bool:
    """Whether ``span`` is the last picture of its turn's results of this kind."""
    later = iter(episode.record.spans)
    for other in later:
        if other is span:
            break
    for other in later:
        if other.source == "visual" and other.kind == span.kind:
            return False
        if other.source in ("sampled", "forced"):
            return True
    return True
