"""Whatever comes, whenever: every run ends in what it is alone, in a clear refusal, or cancelled.

Random prompts, budgets, blocks, tools that take time or fail, runs that are given up, from one
thread and from several. Nothing waits for ever, and all blocks come back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.unit.engine.conftest import Kit, make_kit
from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Tokens, Wait
from vpt_agent.engine.plan import Measures
from vpt_agent.errors import UserError

LONGEST = 60.0
"""Seconds after which a run is held to wait for ever."""


@dataclass(frozen=True)
class Plan:
    """One run: ``prompt`` tokens (those of equal ``seed`` begin alike), then ``count`` chosen ones.

    Behind token ``tool_at`` a tool takes ``tool_seconds``, and fails if ``breaks``. It says what it
    may still add if ``tells``. It comes ``late`` seconds after the first, is given up
    ``given_up`` seconds after it came, and is driven by a thread of its own or submitted.
    """

    seed: int
    prompt: int
    count: int
    tool_at: int | None
    tool_seconds: float
    breaks: bool
    tells: bool
    late: float
    given_up: float | None
    driven: bool

    def ids(self) -> list[int]:
        """Its prompt."""
        return [40 + (self.seed * 31 + i * 7) % 60 for i in range(self.prompt)]

    @property
    def length(self) -> int:
        """Tokens that it has at its end."""
        return self.prompt + self.count


SHORT = st.sampled_from([0.0, 0.002, 0.01])
PLANS = st.builds(
    Plan,
    seed=st.integers(0, 2),
    prompt=st.sampled_from([1, 3, 7, 16, 17, 40, 90]),
    count=st.integers(0, 12),
    tool_at=st.none() | st.integers(0, 8),
    tool_seconds=SHORT,
    breaks=st.integers(0, 5).map(lambda n: n == 0),
    tells=st.booleans(),
    late=SHORT,
    given_up=st.none() | st.none() | SHORT,
    driven=st.booleans(),
)


class ToolBrokeError(Exception):
    """What a tool of a test raises."""


def story(engine: Engine, plan: Plan) -> Generator[Any, Any, Any]:
    """A run of ``plan``: the ids that it chose, the most probable ones; or why it was refused."""
    session = engine.session()
    try:
        if plan.tells:
            session.expected = plan.length
        chosen: list[int] = []
        fed = yield from session.feed([Tokens(plan.ids())])
        for i in range(plan.count):
            chosen.append(int(fed[-1].logits[-1].argmax()))
            if i == plan.tool_at:
                future: Future[str] = Future()
                yield Wait((future,), lambda future=future: _begin(future, plan))
            fed = yield from session.feed([Tokens([chosen[-1]])])
        return chosen
    except UserError as error:
        return str(error)
    finally:
        session.close()


def _begin(future: Future[str], plan: Plan) -> None:
    """Starts the tool; may be called more than once."""
    if getattr(future, "begun", False):
        return
    future.begun = True  # type: ignore[attr-defined]

    def finish() -> None:
        if plan.breaks:
            future.set_exception(ToolBrokeError("the tool's own"))
        else:
            future.set_result("done")

    threading.Timer(plan.tool_seconds, finish).start()


@cache
def alone(seed: int, prompt: int, count: int) -> list[int]:
    """What a run chooses when there is no other, no tool and no end of room."""
    kit = make_kit(1)
    plan = Plan(seed, prompt, count, None, 0.0, False, False, 0.0, None, False)
    engine = kit.fresh()
    (found,) = engine.drive([story(engine, plan)])
    return list(found)


def outcome(kit: Kit, engine: Engine, plan: Plan, found: dict[int, Any], number: int) -> None:
    """Run ``plan`` and note how it ended."""
    time.sleep(plan.late)
    try:
        if plan.driven and plan.given_up is None:
            (found[number],) = engine.drive([story(engine, plan)])
            return
        future = engine.submit(story(engine, plan))
        if plan.given_up is not None:
            time.sleep(plan.given_up)
            future.cancel()
        found[number] = future.result(LONGEST)
    except (ToolBrokeError, CancelledError) as error:
        found[number] = error


@given(
    plans=st.lists(PLANS, min_size=2, max_size=6),
    budget=st.none() | st.sampled_from([24, 48, 64, 128]),
    block=st.sampled_from([1, 4, 16]),
    most=st.integers(1, 4),
    chunk=st.sampled_from([1, 5, 512]),
    patience=st.sampled_from([0.0, 0.02]),
)
@settings(max_examples=60, deadline=None)
def test_every_run_ends(
    plans: list[Plan], budget: int | None, block: int, most: int, chunk: int, patience: float
) -> None:
    kit = make_kit(1)
    measures = Measures(chunk=chunk, most=max(chunk, 64), patience=patience)
    engine = Engine(
        kit.model, kit.policy, max_cached_tokens=budget, block=block, max_runs=most,
        measures=measures,
    )  # fmt: skip
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=outcome, args=(kit, engine, plan, found, i), daemon=True)
        for i, plan in enumerate(plans)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONGEST)
    assert set(found) == set(range(len(plans))), "a run waits for ever"
    for i, plan in enumerate(plans):
        check(plan, found[i], budget, block)
    settled(engine)
    if budget is not None and engine.cache.keys:
        assert engine.cache.keys[0].shape[0] <= budget


def check(plan: Plan, ended: Any, budget: int | None, block: int) -> None:
    """Whether ``plan`` may end so."""
    fits = budget is None or -(-plan.length // block) <= budget // block
    called = plan.tool_at is not None and plan.tool_at < plan.count
    if isinstance(ended, CancelledError):
        event("given up")
        assert plan.given_up is not None
    elif isinstance(ended, ToolBrokeError):
        event("the tool broke")
        assert called
        assert plan.breaks
    elif isinstance(ended, str):
        event("refused")
        assert "this conversation alone does not fit" in ended
        assert not fits
    else:
        event("answered")
        assert fits
        assert not (called and plan.breaks)
        assert ended == alone(plan.seed, plan.prompt, plan.count)


def settled(engine: Engine) -> None:
    """All runs are gone, and with them what they held."""
    end = time.monotonic() + LONGEST
    while engine.loop._lives or engine.loop._server is not None:
        assert time.monotonic() < end, "runs are left over"
        time.sleep(0.002)
    assert engine.cache.used_rows == 0
    assert engine.cache.blocks.used == 0
    assert set(engine.cache.blocks.users) <= {0}
    assert not engine.cache.prefixes._known
