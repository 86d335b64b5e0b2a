"""Asks every item under every setting, together where the agent can, and goes on after a kill."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vpt_agent.agent import PerceptionAgent, Question
from vpt_agent.errors import UserError
from vpt_agent.evaluation.items import Item
from vpt_agent.evaluation.store import (
    Called,
    Outcome,
    ResultStore,
    State,
    machine,
    read_states,
    weights_hash,
)
from vpt_agent.evaluation.switches import Counterfactual, Setting
from vpt_agent.trace import ToolRejected
from vpt_agent.types import Answer, Limits

if TYPE_CHECKING:
    from torch import Tensor

Score = Callable[[str, Item], float]
"""What an answer is worth, 0 to 1."""

Items = Iterable[Item] | Mapping[str, Callable[[], Item]]
"""Items, or how to make each by its id: those already answered are then never made."""

Wanted = Callable[[str, Setting], bool]
"""Whether an item, by its id, is to be asked under a setting."""


class Asks(Protocol):
    """An agent. With ``run_batch`` (see :class:`PerceptionAgent`) items are asked together;
    without, one by one, and :func:`evaluate`'s ``limits`` go to ``run`` if there are any."""

    def run(self, question: str, image: Any = None, *, tool_choice: str = "auto") -> Answer:
        """Answer one question."""


def exact_match(text: str, item: Item) -> float:
    """1 if the answer is the expected one to the letter (surrounding space aside), else 0."""
    return float(text.strip() == item.answer.strip())


def evaluate(
    agent: Asks | Mapping[str, Asks],
    items: Items,
    settings: Sequence[Setting],
    out: Path | str,
    *,
    batch: int = 25,
    chunk: int = 50,
    seed: int = 0,
    score: Score = exact_match,
    limits: Limits | None = None,
    progress: Callable[[str], None] | None = None,
    wanted: Wanted | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ResultStore:
    """Ask all ``items`` under all ``settings``; one JSON line each in the folder ``out``.

    ``agent`` is one for all settings, or one by setting name (others of "" then). Items are taken
    ``chunk`` at a time, whose pictures are made once; a swap takes its donor from the same chunk.
    ``batch`` run together. What ``out`` holds already is not asked again; a folder of another
    evaluation (other weights, settings, seed, chunk) is a :class:`UserError`. Greedy decoding.
    ``wanted`` leaves pairs of item and setting out, unrecorded: a later call may want them.
    ``stop`` is asked before every batch; once true, the rest is left for the next call.
    """
    named = _named(items)
    agents = _agents(agent, settings)
    _check(settings, batch, chunk)
    store = ResultStore(out, _manifest(agents, settings, seed=seed, chunk=chunk, count=len(named)))
    ids = list(named)
    known = {(s.item, s.setting, s.kind): s for s in read_states(store.folder)}
    chunks = [ids[start : start + chunk] for start in range(0, len(ids), chunk)]
    plan = [_asked(part, n * chunk, settings, wanted) for n, part in enumerate(chunks)]
    pairs = [(i, setting.name) for asked in plan for setting, found in asked for i in found]
    total, open_ = len(pairs), sum(pair not in store.done for pair in pairs)
    told = _Told(progress, total, total - open_)
    for part, asked in zip(chunks, plan, strict=True):
        if all((i, s.name) in store.done for s, found in asked for i in found):
            continue
        if stop():
            break
        job = _Chunk([named[i]() for i in part], known, seed, score, limits, store, told)
        for setting, found in asked:
            if not stop():
                job.ask(agents[setting.name], setting, found, batch=batch, stop=stop)
    return store


def _asked(
    ids: Sequence[str], start: int, settings: Sequence[Setting], wanted: Wanted | None
) -> list[tuple[Setting, frozenset[str]]]:
    """The items of a chunk, of which ``start`` come before it, that each setting asks."""
    return [
        (s, frozenset(i for i in ids if wanted is None or wanted(i, s)))
        for s in settings
        if s.most is None or start < s.most
    ]


def _named(items: Items) -> dict[str, Callable[[], Item]]:
    if isinstance(items, Mapping):
        return dict(items)
    found: dict[str, Callable[[], Item]] = {}
    for item in items:
        if item.id in found:
            raise UserError("two items have the same id", where="evaluate", got=item.id)
        found[item.id] = partial(_same, item)
    return found


def _same(item: Item) -> Item:
    return item


def _agents(agent: Asks | Mapping[str, Asks], settings: Sequence[Setting]) -> dict[str, Asks]:
    if not isinstance(agent, Mapping):
        return {s.name: agent for s in settings}
    lacking = [s.name for s in settings if s.name not in agent and "" not in agent]
    if lacking:
        raise UserError("a setting has no agent", where="evaluate", got=", ".join(lacking))
    return {s.name: agent[s.name] if s.name in agent else agent[""] for s in settings}


def _check(settings: Sequence[Setting], batch: int, chunk: int) -> None:
    if batch < 1 or chunk < 1:
        raise UserError("batch and chunk must be 1 or more", got=f"{batch} and {chunk}")
    seen: dict[str, Setting] = {}
    for setting in settings:
        if setting.name in seen:
            raise UserError("two settings have the same name", got=setting.name)
        if setting.donors and not (setting.donors in seen and seen[setting.donors].states):
            raise UserError(
                "a swap takes the states of a setting that keeps them and comes before it",
                where=setting.name,
                got=setting.donors,
                expected=", ".join(n for n, s in seen.items() if s.states) or "none keeps any",
            )
        seen[setting.name] = setting


def _manifest(
    agents: Mapping[str, Asks], settings: Sequence[Setting], **values: object
) -> dict[str, Any]:
    models: dict[str, Any] = {}
    hashes: dict[int, str | None] = {}
    for name, agent in agents.items():
        model, abilities = getattr(agent, "model", None), getattr(agent, "abilities", None)
        if id(model) not in hashes:
            hashes[id(model)] = None if model is None else weights_hash(model)
        models[name] = {
            "agent": type(agent).__name__,
            "name": getattr(abilities, "name", ""),
            "untrained": list(getattr(abilities, "untrained", ())),
            "weights_sha256": hashes[id(model)],
        }
    return {
        "models": models,
        "settings": [s.to_dict() for s in settings],
        "machine": machine(),
        **values,
    }


@dataclass
class _Told:
    """Says how far it is."""

    say: Callable[[str], None] | None
    total: int
    done: int

    def __post_init__(self) -> None:
        self.began, self.before = time.monotonic(), self.done

    def add(self, count: int, setting: str) -> None:
        self.done += count
        if self.say is None:
            return
        asked, spent = self.done - self.before, time.monotonic() - self.began
        left = f", {(self.total - self.done) / asked * spent / 60:.0f} min left" if asked else ""
        self.say(f"{self.done} of {self.total} asked{left} ({setting})")


class _Chunk:
    """Some items, whose pictures are made once, under one setting after another."""

    def __init__(
        self,
        items: Sequence[Item],
        known: dict[tuple[str, str, str], State],
        seed: int,
        score: Score,
        limits: Limits | None,
        store: ResultStore,
        told: _Told,
    ) -> None:
        self.items, self.known, self.seed, self.score = items, known, seed, score
        self.limits, self.store, self.told = limits, store, told
        self.pictures = {item.id: item.picture() for item in items}
        self.changes: dict[str, Counterfactual] = {}  # of the batch under way

    def ask(
        self,
        agent: Asks,
        setting: Setting,
        ids: frozenset[str],
        *,
        batch: int,
        stop: Callable[[], bool],
    ) -> None:
        """Every item of ``ids`` that was not asked under ``setting`` yet, until ``stop``."""
        done = self.store.done
        open_ = [i for i in self.items if i.id in ids and (i.id, setting.name) not in done]
        skipped = [(i, why) for i in open_ if (why := self._cannot(i, setting))]
        self.store.add(self._skipped(item, setting, why) for item, why in skipped)
        self.told.add(len(skipped), setting.name)
        without = {item.id for item, _ in skipped}
        open_ = [i for i in open_ if i.id not in without]
        for start in range(0, len(open_), batch):
            if stop():
                return
            part = open_[start : start + batch]
            began = time.perf_counter()
            answers = self._answers(agent, setting, part)
            seconds = (time.perf_counter() - began) / len(part)
            rows = [self._row(i, setting, a, seconds) for i, a in zip(part, answers, strict=True)]
            states = [s for i, a in zip(part, answers, strict=True) for s in _kept(i, setting, a)]
            self.known |= {(s.item, s.setting, s.kind): s for s in states}
            self.store.add(rows, states)
            self.told.add(len(part), setting.name)

    def _cannot(self, item: Item, setting: Setting) -> str:
        """Why ``item`` cannot be asked under ``setting``; empty if it can."""
        if setting.switches.places and not item.shown:
            return "no true boxes"
        if setting.switches.swaps and self._donor(item, setting) is None:
            return "no item to swap with"
        return ""

    def _donor(self, item: Item, setting: Setting) -> str | None:
        """The item of this chunk whose control states ``item`` is given."""
        rule = setting.donor_type
        fitting = [
            other.id
            for other in self.items
            if other.id != item.id
            and (rule == "any" or (other.type == item.type) == (rule == "same"))
            and any(key[:2] == (other.id, setting.donors) for key in self.known)
        ]
        rng = random.Random(f"{self.seed}:{item.id}:{setting.name}")
        return rng.choice(fitting) if fitting else None

    def _answers(self, agent: Asks, setting: Setting, part: Sequence[Item]) -> list[Answer]:
        limits = self.limits
        if setting.rounds is not None:
            limits = replace(limits or Limits(), rounds=setting.rounds)
        if not hasattr(agent, "run_batch"):
            if setting.switches:
                raise UserError(
                    "this agent's forward pass cannot be changed",
                    where=setting.name,
                    got=type(agent).__name__,
                    expected="a PerceptionAgent",
                )
            run: Any = agent.run
            options: dict[str, Any] = {} if limits is None else {"limits": limits}
            return [
                run(i.question, self.pictures[i.id], tool_choice=setting.tool_choice, **options)
                for i in part
            ]
        self.changes = {
            item.id: self._change(agent, item, setting) for item in part if setting.switches
        }
        asked = [
            Question(i.question, self.pictures[i.id], intervention=self.changes.get(i.id))
            for i in part
        ]
        answers: list[Answer] = agent.run_batch(
            asked, tool_choice=setting.tool_choice, limits=limits
        )
        return answers

    def _change(self, agent: object, item: Item, setting: Setting) -> Counterfactual:
        grid, policy = None, "published"
        if isinstance(agent, PerceptionAgent):
            rows = agent.engine.table.rows
            if not item.crops:  # those say exactly what to show; boxes are asked for in cells
                grid = next((r.kind.grid for r in rows if r.kind.payload == "grid"), None)
            policy = agent.abilities.regions
        return Counterfactual(
            setting.switches,
            seed=f"{self.seed}:{item.id}:{setting.name}",
            donor=partial(self._state, self._donor(item, setting), setting.donors),
            shown=item.shown,
            grid=grid,
            policy="cover" if policy == "cover" else "published",
        )

    def _state(self, donor: str | None, setting: str, kind: str) -> Tensor | None:
        import torch

        found = self.known.get((donor or "", setting, kind))
        return None if found is None else torch.from_numpy(found.values.copy())

    def _skipped(self, item: Item, setting: Setting, why: str) -> Outcome:
        return Outcome(item.id, setting.name, item.type, status="skipped", why=why)

    def _row(self, item: Item, setting: Setting, answer: Answer, seconds: float) -> Outcome:
        change = self.changes.get(item.id)
        if change is not None and change.lacking:  # its run failed, or its call did
            return self._skipped(item, setting, f"no state of {change.lacking[0]} to swap with")
        views = [v for r in answer.results for v in r.views]
        rejected = sum(isinstance(e, ToolRejected) for e in answer.trace.events)
        return Outcome(
            item=item.id,
            setting=setting.name,
            type=item.type,
            question=item.question,
            expected=item.answer,
            answer=answer.text,
            score=self.score(answer.text, item) if answer.status != "failed" else 0.0,
            status=answer.status,
            why=answer.warnings[-1] if answer.status == "failed" and answer.warnings else "",
            calls=tuple(
                Called(c.name, c.kind or "", c.origin, None if r.error is None else r.error.kind)
                for c, r in zip(answer.calls, answer.results, strict=True)
            ),
            rejected=rejected,
            boxes=tuple(tuple(map(float, v.box)) for v in views),
            true=tuple(tuple(map(float, b)) for b in item.boxes),
            size=self.pictures[item.id].size,
            needs=item.needs,
            visual_tokens=answer.usage.visual_tokens,
            forward_tokens=answer.usage.forward_tokens,
            seconds=seconds,
        )


def _kept(item: Item, setting: Setting, answer: Answer) -> list[State]:
    """The control states of a run: of each kind the first call's."""
    if not setting.states:
        return []
    first: dict[str, State] = {}
    for call in answer.calls:
        if call.control is not None and call.kind is not None and call.kind not in first:
            first[call.kind] = State.of(item.id, setting.name, call.kind, item.type, call.control)
    return list(first.values())
