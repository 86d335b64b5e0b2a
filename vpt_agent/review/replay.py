"""Replay: run a trace again and compare, token by token (contract X5).

On the same device and dtype a trace replays to the same tokens; otherwise the first difference is
named, with what stood before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from vpt_agent.agent import PerceptionAgent
from vpt_agent.errors import TraceError
from vpt_agent.trace import RunStarted, Trace, record_from_trace
from vpt_agent.types import Limits


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

    Questions of one conversation go on in one session, as they did. A sampled run without a seed
    cannot be replayed: :class:`TraceError`.
    """
    started = [e for e in trace.events if isinstance(e, RunStarted)]
    if not started:
        raise TraceError("there is no run to replay", where=trace.directory)
    new = into or Trace(model=agent.abilities.to_dict())
    difference: Difference | None = None
    chat = None
    for event in started:
        temperature = float(str(event.sampling.get("temperature", 0.0)))
        if temperature > 0 and event.seed is None:
            raise TraceError(
                "this run was sampled without a seed, so it cannot be repeated",
                where=event.run,
                fix="record runs with seed=",
            )
        if chat is None or event.continues is None:
            if chat is not None:
                chat.close()
            chat = agent.conversation(trace=new)
        images = [trace.picture(view.blob) for view in event.views]
        chat.ask(
            event.question,
            images or None,
            tool_choice=event.tool_choice,
            limits=_limits(event),
            seed=event.seed,
            temperature=temperature,
            top_k=int(str(event.sampling.get("top_k", 0))),
            top_p=float(str(event.sampling.get("top_p", 1.0))),
        )
        if difference is None:
            difference = _compare(trace, event.run, new, new.runs[-1], agent)
    if chat is not None:
        chat.close()
    return Replay(new, difference)


def _limits(event: RunStarted) -> Limits:
    values = {k: v if k == "seconds" else int(v or 0) for k, v in event.limits.items()}
    # The clock is not repeatable: a run that was cut by it is compared up to there.
    values["seconds"] = None
    return Limits(**values)  # type: ignore[arg-type]


def _compare(
    old: Trace, old_run: str, new: Trace, new_run: str, agent: PerceptionAgent
) -> Difference | None:
    recorded = record_from_trace(old, old_run).ids
    replayed = record_from_trace(new, new_run).ids
    for i in range(max(len(recorded), len(replayed))):
        was = recorded[i] if i < len(recorded) else None
        now = replayed[i] if i < len(replayed) else None
        if was != now:
            before = agent.layout.raw_text(recorded[max(0, i - 8) : i])
            return Difference(old_run, i, was, now, before)
    return None
