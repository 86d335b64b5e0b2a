"""The only row that decodes takes a short way through the engine, and computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vpt_agent.engine import alone as short
from vpt_agent.engine import core
from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Tokens
from vpt_agent.engine.scheduler import BREATH
from vpt_agent.errors import UserError
from vpt_agent.model.testing import tiny_model
from vpt_agent.vision.policy import ImagePolicy

MODEL = tiny_model(("clip",))[0]


def taken(patch: pytest.MonkeyPatch, *, wanted: bool = True) -> list[bool]:
    """Whether each step took the short way; with ``wanted`` False none does."""
    found: list[bool] = []

    def watched(engine: Engine, feeding: Any) -> Any:
        fed = short.alone(engine, feeding) if wanted else None
        found.append(fed is not None)
        return fed

    patch.setattr(core, "alone", watched)
    return found


def decoded(engine: Engine, tokens: int = 20) -> tuple[Tensor, Any]:
    """Logits of single words behind a prompt, and their session."""
    session = engine.session()
    session.append([Tokens(range(40, 53))])
    rows = [session.append([Tokens((word,))]) for word in range(tokens)]
    return torch.cat(rows), session


def test_it_computes_what_the_ordinary_way_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = taken(monkeypatch)
    one, engine = Engine(MODEL, ImagePolicy()), Engine(MODEL, ImagePolicy())
    found, session = decoded(one)
    assert steps == [False, *[True] * 20]
    taken(monkeypatch, wanted=False)
    wanted, other = decoded(engine)
    assert torch.equal(found, wanted)
    assert vars(one.counters) == vars(engine.counters)
    for name in ("ids", "positions", "next_position", "forward_tokens", "forward_calls"):
        assert getattr(session, name) == getattr(other, name)
    assert [b.positions.tolist() for b in session.blocks] == [
        b.positions.tolist() for b in other.blocks
    ]
    assert one.cache.lengths == engine.cache.lengths
    assert one.cache.tables == engine.cache.tables


def test_a_block_that_others_hold_is_copied_before_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(MODEL, ImagePolicy())
    _, session = decoded(engine, 3)
    fork = session.fork()
    steps = taken(monkeypatch)
    alone = session.append([Tokens((9,))])
    assert steps == [True]
    assert torch.allclose(fork.append([Tokens((9,))]), alone, atol=1e-5)


def test_what_is_not_simple_goes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, ImagePolicy(), max_positions=24, max_cached_tokens=32)
    steps = taken(monkeypatch)
    fresh = engine.session()
    fresh.append([Tokens((5,))])  # nothing before it
    fresh.append([Tokens((5, 6))])  # two tokens
    fresh.append([Tokens((7,))], logits="all")
    fresh.append([Tokens((8,))])
    assert steps == [False, False, False, True]
    # Its row was taken away: it is computed again first.
    engine.cache.truncate(fresh.row, 0)
    fresh.append([Tokens((9,))])
    assert steps[-1] is False
    assert engine.counters.repeated_tokens == 5
    other = engine.session()
    other.append([Tokens(range(16))])
    steps.clear()
    feeds = [row.feed([Tokens((11,))]) for row in (fresh, other)]
    engine.drive(feeds)  # two rows, and no room for a third block
    assert steps
    assert not any(steps)
    while len(other) < 24:
        other.append([Tokens((3,))])
    with pytest.raises(UserError, match="longer than the model can hold"):
        other.append([Tokens((3,))])


def test_what_goes_wrong_is_told_by_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, ImagePolicy())
    _, session = decoded(engine, 1)
    real = type(MODEL).run_language_model
    failed: list[int] = []

    def broken(self: Any, *args: Any) -> Tensor:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("for once")
        return real(self, *args)

    steps = taken(monkeypatch)
    monkeypatch.setattr(type(MODEL), "run_language_model", broken)
    again = session.append([Tokens((9,))])
    assert steps == [False]
    assert failed == [1]
    assert again.isfinite().all()
    assert engine.cache.lengths[session.row] == len(session) == 15


def test_a_run_that_joins_waits_no_longer_than_some_steps() -> None:
    """The only run goes on without asking whether others wait, for so many steps at most."""
    engine = Engine(MODEL, ImagePolicy())
    seen: list[int] = []

    def steps(words: int) -> Any:
        session = engine.session()
        yield from session.feed([Tokens(range(4))])
        for word in range(words):
            if word == 3 and words > 3:
                future.append(engine.submit(steps(1)))
            yield from session.feed([Tokens((word,))])
            if future and future[0].done():
                seen.append(word)
        return words

    future: list[Any] = []
    assert engine.drive([steps(3 + 4 * BREATH)]) == [3 + 4 * BREATH]
    assert future[0].result(timeout=60) == 1
    assert seen
    assert seen[0] <= 3 + BREATH
