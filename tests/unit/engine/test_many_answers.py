"""Runs that join and leave, prompts in chunks, and runs that must not hold up others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.unit.engine.conftest import KINDS, Kit
from tests.unit.engine.test_batch_contract import story
from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Look, Part, Tokens, Wait
from vpt_agent.engine.plan import Measures
from vpt_agent.errors import UserError


@contextmanager
def watched(engine: Engine) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of each pass of the language model."""
    real, seen = engine.model.run_language_model, []

    def run(embeds: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append((embeds.shape[0], embeds.shape[1]))
        return real(embeds, *args)

    engine.model.run_language_model = run  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        del engine.model.run_language_model


def stories(kit: Kit, engine: Engine) -> list[Generator[Any, Any, Any]]:
    return [
        story(engine.session(), kit, kit.conversation(kind, seed), 7 + seed, 5 + 3 * seed)
        for seed, kind in enumerate(KINDS)
    ]


def alone(kit: Kit) -> list[Any]:
    return [kit.fresh().drive([run])[0] for run in stories(kit, kit.fresh())[:0]] + [
        (engine := kit.fresh()).drive([stories(kit, engine)[i]])[0] for i in range(len(KINDS))
    ]


def equal(got: list[Any], wanted: list[Any]) -> None:
    for (logits, ids), (one_logits, one_ids) in zip(got, wanted, strict=True):
        torch.testing.assert_close(logits, one_logits, atol=1e-4, rtol=0)
        assert ids == one_ids


def waiting(future: Future[Any]) -> Generator[Any, Any, Any]:
    """A run that waits for a tool."""
    (answer,) = yield Wait((future,))
    return answer


# --- joining and leaving ------------------------------------------------------------------


def test_runs_join_a_loop_that_is_going_and_equal_single_runs(one: Kit) -> None:
    engine = one.fresh()
    runs = stories(one, engine)
    results: list[Any] = [None] * len(runs)

    def kept(i: int) -> Generator[Any, Any, None]:
        results[i] = yield from runs[i]

    loops = []
    with watched(engine) as seen:
        for i in range(len(runs)):
            loops.append(engine.steps([kept(i)]))
            next(loops[-1])
        for loop in loops:
            for _ in loop:
                pass
    equal(results, alone(one))
    assert max(rows for rows, _ in seen) >= 4


def test_submitted_runs_share_forwards_with_driven_ones(one: Kit) -> None:
    engine = one.fresh()
    runs = stories(one, engine)
    gate: Future[None] = Future()

    def late(run: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        yield Wait((gate,))
        return (yield from run)

    futures = [engine.submit(late(run)) for run in runs[:-1]]
    other: list[Any] = []
    thread = threading.Thread(target=lambda: other.extend(engine.drive([late(runs[-1])])))
    thread.start()
    while len(engine.loop._lives) < len(runs):
        time.sleep(0.005)
    gate.set_result(None)
    thread.join(60)
    equal([f.result(60) for f in futures] + other, alone(one))
    assert max(engine.counters.rows_per_forward) == len(runs)


def test_a_submitted_run_can_be_cancelled_and_its_error_is_its_owners(one: Kit) -> None:
    engine = one.fresh()
    closed = threading.Event()
    never: Future[None] = Future()

    def endless() -> Generator[Any, Any, None]:
        try:
            yield Wait((never,))
        finally:
            closed.set()

    def broken() -> Generator[Any, Any, None]:
        yield [Look("base", ())]
        raise ValueError("my own")

    future = engine.submit(endless())
    with pytest.raises(ValueError, match="my own"):
        engine.submit(broken()).result(20)
    assert future.cancel()
    engine.submit(iter_once()).result(20)  # anything that moves the loop
    assert closed.wait(20)
    with pytest.raises(CancelledError):
        future.result()
    # Nobody is left, so the thread ends, and a later run gets a new one.
    assert engine.submit(iter_once()).result(20) == "done"


def iter_once() -> Generator[Any, Any, str]:
    yield [Look("base", ())]
    return "done"


def test_an_error_ends_the_runs_of_its_own_drive_only(one: Kit) -> None:
    engine = one.fresh()
    closed: list[str] = []

    def patient(name: str) -> Generator[Any, Any, str]:
        try:
            for _ in range(3):
                yield [Look("base", ())]
            return name
        finally:
            closed.append(name)

    def broken() -> Generator[Any, Any, str]:
        yield [Look("base", ())]
        raise ValueError("my own")

    outside = engine.steps([patient("outside")])
    next(outside)
    with pytest.raises(ValueError, match="my own"):
        engine.drive([patient("beside"), broken()])
    assert closed == ["beside"]
    for _ in outside:
        pass
    assert closed == ["beside", "outside"]


def test_a_run_may_run_others(one: Kit) -> None:
    engine = one.fresh()

    def outer() -> Generator[Any, Any, Any]:
        inner = engine.session().append([Tokens(one.ids("inside"))])
        fed = yield from engine.session().feed([Tokens(one.ids("inside"))])
        return inner[-1], fed[-1].logits[-1]

    ((inner, own),) = engine.drive([outer()])
    torch.testing.assert_close(inner, own, atol=1e-4, rtol=0)


def test_no_more_runs_at_once_than_wanted_and_waiting_ones_do_not_count(one: Kit) -> None:
    engine = Engine(one.model, one.policy, max_runs=2)
    gate: Future[str] = Future()
    results = engine.drive([waiting(gate), waiting(gate), *stories(one, engine), _opens(gate)])
    equal(results[2:-1], alone(one))
    assert results[:2] == ["open", "open"]
    assert max(engine.counters.rows_per_forward) == 2


def _opens(gate: Future[str]) -> Generator[Any, Any, None]:
    yield [Look("base", ())]
    gate.set_result("open")


# --- prompts beside decoding rows ---------------------------------------------------------


def test_a_long_prompt_goes_in_chunks_beside_decoding_rows(one: Kit) -> None:
    parts: list[Part] = [p for i in range(3) for p in one.conversation("text", i)]
    parts += one.conversation("dino", 5)
    engine = Engine(one.model, one.policy, measures=Measures(chunk=24))
    decoding = story(engine.session(), one, one.conversation("text", 1), 3, 40)
    with watched(engine) as seen:
        loop = engine.steps([decoding])
        for _ in range(4):
            next(loop)
        before = len(seen)
        session = engine.session()
        (long,) = engine.drive([session.feed(parts, logits="all")])
        blocks = [f.logits for f in long]
    wanted = one.fresh().session().append(parts, logits="all")
    torch.testing.assert_close(torch.cat(blocks), wanted, atol=1e-4, rtol=0)
    passes = seen[before:]
    chunks = [n for _, n in passes if n > 4]
    assert len(chunks) > 3
    assert max(chunks) <= 24
    decoded = sum(1 for rows, n in passes if (rows, n) == (1, 1))
    assert decoded >= len(chunks), "the other row went on in every step"
    assert session.forward_tokens == len(session), "nothing twice"
    loop.close()


def test_a_run_whose_tools_are_always_ready_does_not_hold_up_others(one: Kit) -> None:
    engine = one.fresh()

    def busy() -> Generator[Any, Any, int]:
        count = 0
        while not stop.is_set():
            done: Future[None] = Future()
            done.set_result(None)
            yield Wait((done,))
            count += 1
        return count

    stop = threading.Event()

    def ends() -> Generator[Any, Any, Any]:
        try:
            return (yield from story(engine.session(), one, one.conversation("text"), 3, 12))
        finally:
            stop.set()

    count, _ = engine.drive([busy(), ends()])
    assert count <= 20, "each step is for all"


def test_rows_whose_tools_run_do_not_hold_up_others(one: Kit) -> None:
    engine = one.fresh()
    gate: Future[str] = Future()

    def opens() -> Generator[Any, Any, Any]:
        answer = yield from story(engine.session(), one, one.conversation("clip"), 3, 6)
        gate.set_result("late")
        return answer

    first, second = engine.drive([waiting(gate), opens()])
    assert first == "late"
    assert len(second[1]) == 6


# --- trouble ------------------------------------------------------------------------------


def test_memory_that_does_not_hold_a_batch_holds_its_rows(one: Kit) -> None:
    engine = one.fresh()
    real = engine.model.run_language_model

    def crowded(most: int) -> Any:
        def run(embeds: torch.Tensor, *args: Any) -> torch.Tensor:
            if embeds.shape[0] > most:
                raise torch.OutOfMemoryError("too many")
            return real(embeds, *args)

        return run

    try:
        engine.model.run_language_model = crowded(1)  # type: ignore[method-assign]
        equal(engine.drive(stories(one, engine)), alone_plain := _with(engine, real, one))
        engine.model.run_language_model = crowded(0)  # type: ignore[method-assign]
        with pytest.raises(UserError, match="too little memory for these tokens"):
            engine.session().append([Tokens([1, 2])])
    finally:
        del engine.model.run_language_model
    assert len(alone_plain) == len(KINDS)


def _with(engine: Engine, real: Any, kit: Kit) -> list[Any]:
    crowded = engine.model.run_language_model
    engine.model.run_language_model = real  # type: ignore[method-assign]
    try:
        return alone(kit)
    finally:
        engine.model.run_language_model = crowded  # type: ignore[method-assign]


# --- tools that begin together ------------------------------------------------------------


def calling(
    engine: Engine, kit: Kit, future: Future[None], start: Callable[[], None], count: int
) -> Generator[Any, Any, Any]:
    """A run that asks a tool, and then feeds ``count`` tokens one at a time."""
    session = engine.session()
    yield from session.feed([Tokens(kit.ids("before"))])
    yield Wait((future,), start)
    for token in range(count):
        yield from session.feed([Tokens([40 + token])])


def together(kit: Kit, patience: float, *, second: float) -> list[int]:
    """Rows of each pass of two runs whose tools begin together; that of the second one takes
    ``second`` seconds."""
    engine = Engine(kit.model, kit.policy, measures=Measures(patience=patience))
    futures: list[Future[None]] = [Future(), Future()]
    begun: list[threading.Timer] = []

    def start() -> None:
        if not begun:
            futures[0].set_result(None)
            begun.append(threading.Timer(second, futures[1].set_result, [None]))
            begun[0].start()

    engine.drive([calling(engine, kit, future, start, 3) for future in futures])
    begun[0].join()
    return engine.counters.rows_per_forward


def test_tools_that_begin_together_are_waited_for_a_moment(one: Kit) -> None:
    assert together(one, 20.0, second=0.05) == [2, 2, 2, 2]
    impatient = together(one, 0.0, second=0.3)
    assert impatient[0] == 2
    assert impatient[1:].count(1) == 6, "the first did not wait"


def test_a_tool_that_takes_long_is_waited_for_no_longer_than_said(one: Kit) -> None:
    began = time.perf_counter()
    rows = together(one, 0.04, second=0.5)
    assert rows.count(1) == 6
    assert time.perf_counter() - began >= 0.5


@pytest.mark.parametrize(("others", "waited"), [(1, True), (3, False)])
def test_most_runs_are_not_held_up_by_tools_of_a_few(one: Kit, others: int, waited: bool) -> None:
    engine = Engine(one.model, one.policy, measures=Measures(patience=20.0))
    futures: list[Future[None]] = [Future(), Future()]
    begun: list[threading.Timer] = []

    def start() -> None:
        if not begun:
            for future in futures:
                begun.append(threading.Timer(0.2, future.set_result, [None]))
                begun[-1].start()

    def busy() -> Generator[Any, Any, None]:
        session = engine.session()
        for token in range(5):
            yield from session.feed([Tokens([60 + token])])

    calls = [calling(engine, one, future, start, 4) for future in futures]
    engine.drive([*calls, *(busy() for _ in range(others))])
    together = engine.counters.rows_per_forward.count(others + 2)
    assert together == 4 if waited else together < 4
