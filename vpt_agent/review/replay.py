"""Replay: run a trace again and compare, token by token (contract X5).

On the same device and dtype a trace replays to the same tokens; otherwise the first difference is
named, with what stood before it.
"""

from __future__ import annotations

from contextlib import closing, suppress
from dataclasses import dataclass

from vpt_agent.agent import PerceptionAgent, Talk
from vpt_agent.errors import TraceError, UserError
from vpt_agent.trace import (
    Decoded,
    PerceptionAppended,
    PromptRendered,
    RequestAnswered,
    RunFinished,
    RunStarted,
    Trace,
    record_from_trace,
)
from vpt_agent.types import Limits

SPOKEN = (PromptRendered, Decoded, PerceptionAppended)
"""The events that a record is made of."""


@dataclass(frozen=True)
class Difference:
    """Where the replay first says something else: ``position`` is the index in the run's record.

    ``recorded`` and ``replayed`` are token ids there, None where one of them had ended.
    """

    run: str
    position: int
    recorded: int | None
    replayed: int | None
    before: str

    def __str__(self) -> str:
        return (
            f"{self.run}: token {self.position} was {self.recorded}, is {self.replayed}, "
            f"after ...{self.before!r}"
        )


@dataclass(frozen=True)
class Replay:
    """The new trace, and the first difference of the first run that differs, if any."""

    trace: Trace
    difference: Difference | None

    @property
    def same(self) -> bool:
        """Whether every token is the same."""
        return self.difference is None


def replay(trace: Trace, agent: PerceptionAgent, *, into: Trace | None = None) -> Replay:
    """Ask everything that ``trace`` asked again, on ``agent``, and compare the records.

    Questions of one conversation go on in one session, as they did. A run that did not come to its
    end (it failed, was stopped or killed) is compared up to where it came. The clock cannot be
    repeated: a run that it ended decodes as many tokens as it did then. A sampled run without a
    seed cannot be replayed, nor one whose model was on another machine: :class:`TraceError`.
    """
    started = [e for e in trace.events if isinstance(e, RunStarted)]
    if not started:
        raise TraceError("there is no run to replay", where=trace.directory)
    asked = next((e for e in trace.events if isinstance(e, RequestAnswered)), None)
    if asked is not None:
        raise TraceError(
            "what a server's model said cannot be computed again here",
            where=asked.run,
            got=f"answers of {asked.model or 'a server'}",
            fix="ask it again: two runs compare by their texts",
        )
    ends = {e.run: e for e in trace.events if isinstance(e, RunFinished)}
    new = into or Trace(model=agent.abilities.to_dict())
    difference: Difference | None = None
    chats: dict[str, Talk] = {}
    try:
        for event in started:
            before = None if event.continues is None else chats.pop(event.continues, None)
            chat = chats[event.run] = before or agent.conversation(trace=new)
            end = ends.get(event.run)
            whole = end is not None and end.status != "failed"
            _ask_again(chat, trace, event, end)
            if difference is None:
                difference = _compare(trace, event.run, new, new.runs[-1], agent, whole=whole)
            if not whole and before is not None and event.continues is not None:
                # It was taken back: what it went on with can go on from there.
                chats[event.continues] = before
    finally:
        for chat in chats.values():
            chat.close()
    return Replay(new, difference)


def _ask_again(chat: Talk, trace: Trace, event: RunStarted, end: RunFinished | None) -> None:
    temperature = float(str(event.sampling.get("temperature", 0.0)))
    if temperature > 0 and event.seed is None:
        raise TraceError(
            "this run was sampled without a seed, so it cannot be repeated",
            where=event.run,
            fix="record runs with seed=",
        )
    images = [trace.picture(view.blob) for view in event.views]
    stream = chat.stream(
        event.question,
        images or None,
        tool_choice=event.tool_choice,
        limits=_limits(trace, event, end),
        seed=event.seed,
        temperature=temperature,
        top_k=int(str(event.sampling.get("top_k", 0))),
        top_p=float(str(event.sampling.get("top_p", 1.0))),
    )
    if end is not None and end.status != "failed":
        for _ in stream:
            pass
        return
    # As far as it came then; closing takes the question back, as its failure did.
    left = sum(e.run == event.run and isinstance(e, SPOKEN) for e in trace.events)
    with closing(stream), suppress(UserError):
        for item in stream if left else ():
            left -= isinstance(item, SPOKEN)
            if not left:
                break


def _limits(trace: Trace, event: RunStarted, end: RunFinished | None) -> Limits:
    values = {k: int(v or 0) for k, v in event.limits.items() if k != "seconds"}
    if end is not None and end.limit == "seconds":
        decoded = [e for e in trace.events if e.run == event.run and isinstance(e, Decoded)]
        values["new_tokens"] = sum(len(e.removed_mass) for e in decoded)
    return Limits(**values)


def _compare(
    old: Trace, old_run: str, new: Trace, new_run: str, agent: PerceptionAgent, *, whole: bool
) -> Difference | None:
    recorded = record_from_trace(old, old_run).ids
    replayed = record_from_trace(new, new_run).ids
    for i in range(max(len(recorded), len(replayed)) if whole else len(recorded)):
        was = recorded[i] if i < len(recorded) else None
        now = replayed[i] if i < len(replayed) else None
        if was != now:
            before = agent.dialect.raw_text(recorded[max(0, i - 8) : i])
            return Difference(old_run, i, was, now, before)
    return None
