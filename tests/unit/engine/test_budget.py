"""Memory: a stated budget holds, runs wait for room or compute again, and what cannot fit is said.

And what runs have in common at their beginnings is computed and stored once.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from tests.unit.engine.conftest import KINDS, Kit, picture
from tests.unit.engine.test_batch_contract import story
from tests.unit.engine.test_many_answers import equal, stories, waiting
from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Look, Part, Tokens, Visual
from vpt_agent.engine.plan import Measures
from vpt_agent.errors import UserError


def bounded(kit: Kit, tokens: int | None, **options: Any) -> Engine:
    return Engine(kit.model, kit.policy, max_cached_tokens=tokens, **options)


def one_by_one(kit: Kit) -> list[Any]:
    return [(engine := kit.fresh()).drive([stories(kit, engine)[i]])[0] for i in range(len(KINDS))]


def expecting(run: Generator[Any, Any, Any], session: Any, tokens: int) -> Any:
    """As an agent's run, which says what it may still add."""
    session.expected = tokens
    try:
        return (yield from run)
    finally:
        session.close()


@pytest.mark.parametrize("budget", [112, 256, 320])
def test_runs_wait_for_room_and_equal_single_runs(one: Kit, budget: int) -> None:
    engine = bounded(one, budget)
    runs = []
    for seed, kind in enumerate(KINDS):
        session, parts = engine.session(), one.conversation(kind, seed)
        run = story(session, one, parts, 7 + seed, 5 + 3 * seed)
        length = sum(len(p.ids) if isinstance(p, Tokens) else len(p.features) for p in parts)
        runs.append(expecting(run, session, length + 20))
    most = 0
    results: list[Any] = [None] * len(runs)

    def kept(i: int) -> Generator[Any, Any, None]:
        results[i] = yield from runs[i]

    for _ in engine.steps([kept(i) for i in range(len(runs))]):
        most = max(most, engine.cache.blocks.used)
    equal(results, one_by_one(one))
    assert 0 < most <= budget // 16
    assert engine.counters.repeated_tokens == 0, "who has begun need not stop"
    assert max(engine.counters.rows_per_forward) < len(KINDS), "some had to wait"


def test_rows_that_outgrow_the_budget_are_computed_again(one: Kit) -> None:
    """Nobody said how long they get: the youngest give up their blocks, and lose nothing."""
    engine = bounded(one, 384)
    results = engine.drive(stories(one, engine))
    equal(results, one_by_one(one))
    engine = bounded(one, 160, block=4)

    def long(number: int, engine: Engine) -> Any:
        session = engine.session()
        return story(session, one, one.conversation("text", number), number, 60)

    together = engine.drive([long(n, engine) for n in range(3)])
    equal(together, [(e := one.fresh()).drive([long(n, e)])[0] for n in range(3)])
    assert engine.counters.repeated_tokens > 0
    assert engine.cache.keys[0].shape[0] == 160


def test_what_can_never_fit_is_its_own_runs_trouble(one: Kit) -> None:
    engine = bounded(one, 128)
    errors: list[UserError] = []

    def hopeful() -> Generator[Any, Any, str]:
        try:
            yield from engine.session().feed([Tokens([5] * 200)])
        except UserError as error:
            errors.append(error)
        return "refused"

    small = story(engine.session(), one, one.conversation("text"), 3, 6)
    refused, done = engine.drive([hopeful(), small])
    assert refused == "refused"
    assert "this conversation alone does not fit" in str(errors[0])
    assert "200 tokens" in str(errors[0])
    (wanted,) = (e := one.fresh()).drive([story(e.session(), one, one.conversation("text"), 3, 6)])
    equal([done], [wanted])


def test_a_row_that_grows_to_the_budgets_end_is_told(one: Kit) -> None:
    engine = bounded(one, 64)
    with pytest.raises(UserError, match="this conversation alone does not fit"):
        engine.drive([story(engine.session(), one, one.conversation("text"), 3, 60)])


def test_idle_sessions_give_way_and_come_back_equal(one: Kit) -> None:
    engine = bounded(one, 112)
    idle = engine.session()
    parts = one.conversation("clip")
    idle.append(parts)
    other = engine.session()
    other.append(one.conversation("dino", 3))
    assert engine.cache.lengths[idle.row] == 0, "its blocks went to the other"
    fork = idle.fork()
    other.close()
    tail: list[Part] = [Tokens(one.ids(" and so on"))]
    wanted = one.fresh().session()
    wanted.append(parts)
    expected = wanted.append(tail, logits="all")
    torch.testing.assert_close(idle.append(tail, logits="all"), expected, atol=1e-4, rtol=0)
    assert idle.ids == wanted.ids
    idle.close()
    torch.testing.assert_close(fork.append(tail, logits="all"), expected, atol=1e-4, rtol=0)


def test_a_run_waits_for_one_that_only_it_can_help(one: Kit) -> None:
    """A tool that asks the same engine: who waits for it must not keep the room it needs."""
    engine = bounded(one, 192)
    gate: Future[str] = Future()

    def outer() -> Generator[Any, Any, Any]:
        session = engine.session()
        session.expected = 190
        yield from session.feed(one.conversation("clip"))
        answer = yield from waiting(gate)
        fed = yield from session.feed([Tokens(one.ids(" and so on"))])
        return answer, fed[-1].logits

    def inner() -> Generator[Any, Any, None]:
        for _ in range(4):
            yield [Look("base", ())]
        yield from engine.session().feed(one.conversation("dino", 3))
        gate.set_result("helped")

    (answer, logits), _ = engine.drive([outer(), inner()])
    assert answer == "helped"
    alone = one.fresh().session()
    alone.append(one.conversation("clip"))
    wanted = alone.append([Tokens(one.ids(" and so on"))])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)


# --- beginnings ---------------------------------------------------------------------------


def asked(kit: Kit, look: Visual, question: str) -> list[Part]:
    before = kit.ids("<|im_start|>user\n<|vision_start|>")
    after = kit.ids(f"<|vision_end|>\n{question}<|im_end|>\n<|im_start|>assistant\n")
    return [Tokens(before), look, Tokens(after)]


@pytest.mark.parametrize("chunk", [512, 20])
def test_a_beginning_in_common_is_computed_and_stored_once(one: Kit, chunk: int) -> None:
    engine = bounded(one, None, measures=Measures(chunk=chunk, most=chunk if chunk < 512 else 8192))
    view = picture(4, 168, 168)
    (found,) = engine.look("base", [view])
    look = Visual(one.ids("<|image_pad|>")[0], found.tokens, found.grid, view.id)
    questions = [asked(one, look, q) for q in ("What is it?", "Where?", "Who is there?", "Where?")]
    lengths = [
        sum(len(p.ids) if isinstance(p, Tokens) else len(p.features) for p in q) for q in questions
    ]
    sessions = [engine.session() for _ in questions]
    fed = engine.drive([s.feed(q) for s, q in zip(sessions, questions, strict=True)])
    for parts, got in zip(questions, fed, strict=True):
        wanted = one.fresh().session().append(parts)
        torch.testing.assert_close(got[-1].logits, wanted, atol=1e-4, rtol=0)
    ids = [s.ids for s in sessions]
    common = next(i for i in range(len(ids[0])) if len({row[i] for row in ids}) > 1)
    assert common > look.features.shape[0]
    block = engine.cache.block
    saved = sum(lengths) - engine.counters.tokens
    # All but the first share the beginning; the last one all of its question but the last token.
    assert saved >= 3 * (common - common % block)
    assert saved == sum(s.shared_tokens for s in sessions) == engine.counters.shared_tokens
    assert [s.forward_tokens + s.shared_tokens for s in sessions] == lengths
    shared = [engine.cache.tables[s.row][: common // block] for s in sessions]
    assert all(blocks == shared[0] for blocks in shared), "stored once"
    for session in sessions:
        session.close()
    again = engine.session()
    again.append(questions[0])
    assert again.shared_tokens == 0, "what nobody holds is gone"
    assert engine.counters.repeated_tokens == 0


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_chunk_may_be_one_token_of_a_picture(kit: Kit, chunk: int) -> None:
    """It stands at its place in the picture, not where a word would."""
    kinds = ("clip", "region")
    engine = bounded(kit, None, measures=Measures(chunk=chunk, most=chunk))
    stories = [kit.conversation(kind, seed) for seed, kind in enumerate(kinds)]
    fed = engine.drive([engine.session().feed(parts) for parts in stories])
    for parts, got in zip(stories, fed, strict=True):
        wanted = kit.fresh().session().append(parts)
        torch.testing.assert_close(got[-1].logits, wanted, atol=1e-4, rtol=0)


def test_the_last_token_of_a_shared_picture_is_computed_at_its_place(one: Kit) -> None:
    parts: list[Part] = [Tokens(one.ids("<|vision_start|>")), one.look(picture(1))]
    engine = one.fresh()
    first, second = engine.session(), engine.session()
    wanted = first.append(parts)
    torch.testing.assert_close(second.append(parts), wanted, atol=1e-4, rtol=0)
    assert second.shared_tokens == len(second) - 1


def test_other_features_at_the_same_place_are_another_beginning(one: Kit) -> None:
    engine = one.fresh()
    sessions = []
    for seed in (1, 2):
        (found,) = engine.look("base", [picture(seed)])
        look = Visual(one.ids("<|image_pad|>")[0], found.tokens, found.grid)
        sessions.append((engine.session(), asked(one, look, "What?")))
    fed = engine.drive([s.feed(parts) for s, parts in sessions])
    for (session, parts), got in zip(sessions, fed, strict=True):
        assert session.shared_tokens <= len(parts[0].ids)  # type: ignore[union-attr]
        wanted = one.fresh().session().append(parts)
        torch.testing.assert_close(got[-1].logits, wanted, atol=1e-4, rtol=0)


def test_a_beginning_survives_the_run_that_computed_it(one: Kit) -> None:
    engine = one.fresh()
    parts = one.conversation("clip")
    first, second = engine.session(), engine.session()
    first.append(parts)
    second.append(parts)
    assert second.shared_tokens > 0
    first.truncate(40)
    first.append([Tokens(one.ids("something else entirely, and long"))])
    first.close()
    tail: list[Part] = [Tokens(one.ids(" again"))]
    alone = one.fresh().session()
    alone.append(parts)
    torch.testing.assert_close(
        second.append(tail, logits="all"), alone.append(tail, logits="all"), atol=1e-4, rtol=0
    )


def test_logits_of_all_positions_are_never_left_out(one: Kit) -> None:
    engine = one.fresh()
    parts = one.conversation("text")
    first, second = engine.session(), engine.session()
    wanted = first.append(parts, logits="all")
    torch.testing.assert_close(second.append(parts, logits="all"), wanted, atol=1e-4, rtol=0)
    assert second.shared_tokens == 0
