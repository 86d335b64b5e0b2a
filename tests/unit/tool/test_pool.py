"""Calls of many runs together: batches, time of each run, stops, and what is left behind."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError

import pytest

from vpt_agent.errors import InternalError, ToolDefinitionError, ToolFailed, UserError
from vpt_agent.tool import (
    PerceptionTool,
    Submitted,
    ToolArguments,
    ToolContext,
    ToolPool,
    ToolRegistry,
)
from vpt_agent.types import ToolCall, ToolResult

WAIT = 20.0


class Number(ToolArguments):
    n: int


class Batched(PerceptionTool):
    """Take several numbers at once."""

    name = "batched"
    arguments = Number
    batch_size = 4

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Event()
        self.closed = 0
        self.contexts: list[ToolContext] = []

    def run_batch(self, items: Sequence[tuple[Number, ToolContext]]) -> list[object]:  # type: ignore[override]
        self.batches.append([a.n for a, _ in items])
        self.contexts = [c for _, c in items]
        self.begun.set()
        self.go.wait(WAIT)
        return [ToolFailed("negative") if a.n < 0 else str(a.n) for a, _ in items]

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def tool() -> Iterator[Batched]:
    made = Batched()
    yield made
    made.go.set()


@pytest.fixture
def pool() -> Iterator[ToolPool]:
    made = ToolPool(workers=4)
    yield made
    made.close()


def item(
    tool: PerceptionTool,
    n: object,
    *,
    deadline: float | None = None,
    context: Callable[[], ToolContext] | None = None,
) -> Submitted:
    call = ToolCall(f"c{n}", tool.name, {"n": n}, "json")
    return Submitted(tool, call, context or (lambda: ToolContext(deadline=deadline)), deadline)


def texts(pending) -> list[str]:  # type: ignore[no-untyped-def]
    results = [future.result(WAIT) for future in pending.futures]
    return [r.text or "" if r.error is None else r.error.message for r in results]


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def test_calls_of_several_runs_stand_in_one_batch(pool: ToolPool, tool: Batched) -> None:
    runs = [pool.submit([item(tool, n)]) for n in range(3)]
    assert tool.batches == [], "nothing runs before it is started"
    runs[0].start()
    assert [texts(run) for run in runs] == [["0"], ["1"], ["2"]]
    assert tool.batches == [[0, 1, 2]]


def test_what_comes_while_a_tool_is_busy_goes_together_next(pool: ToolPool, tool: Batched) -> None:
    tool.go.clear()
    first = pool.submit([item(tool, 0)])
    first.start()
    assert tool.begun.wait(WAIT)
    later = [pool.submit([item(tool, n)]) for n in range(1, 7)]
    for run in later:
        run.start()
    tool.go.set()
    assert texts(first) == ["0"]
    assert [texts(run) for run in later] == [[str(n)] for n in range(1, 7)]
    assert tool.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_wrong_call_of_one_run_is_that_run_s(pool: ToolPool, tool: Batched) -> None:
    good, wrong, bad = (pool.submit([item(tool, n)]) for n in (1, "x", -1))
    good.start()
    assert texts(good) == ["1"]
    assert texts(wrong) == ["n: Input should be a valid integer"]
    assert texts(bad) == ["negative"]
    assert tool.batches == [[1, -1]]


def test_an_unknown_tool_is_answered_at_once(pool: ToolPool) -> None:
    error = ToolRegistry().get("gone")
    pending = pool.submit([Submitted(error, ToolCall("c", "gone", {}, "json"), ToolContext)])
    (future,) = pending.futures
    assert future.done()
    assert future.result().error is error
    pending.cancel()


def test_one_run_s_end_does_not_end_the_others(pool: ToolPool, tool: Batched) -> None:
    tool.go.clear()
    hurried = pool.submit([item(tool, 1, deadline=time.monotonic() + 0.1)])
    patient = pool.submit([item(tool, 2)])
    patient.start()
    (result,) = (future.result(WAIT) for future in hurried.futures)
    assert result.error is not None
    assert (result.error.kind, result.error.detail) == (
        "limit",
        "the tool goes on for the calls of other runs",
    )
    assert [c.cancelled.is_set() for c in tool.contexts] == [True, False]
    assert not patient.futures[0].done()
    tool.go.set()
    assert texts(patient) == ["2"]
    assert tool.batches == [[1, 2]]


def test_a_run_that_ends_while_its_call_waits_is_told(pool: ToolPool, tool: Batched) -> None:
    tool.go.clear()
    first = pool.submit([item(tool, 0)])
    first.start()
    assert tool.begun.wait(WAIT)
    waiting = pool.submit([item(tool, 1, deadline=time.monotonic() + 0.05)])
    waiting.start()
    (result,) = (future.result(WAIT) for future in waiting.futures)
    assert result.error is not None
    assert (result.error.kind, result.error.detail) == ("limit", "it waited for its turn")
    tool.go.set()
    assert texts(first) == ["0"]
    assert tool.batches == [[0]]


def test_a_stopped_run_frees_what_it_held(pool: ToolPool, tool: Batched) -> None:
    tool.go.clear()
    running, other = pool.submit([item(tool, 1)]), pool.submit([item(tool, 2)])
    running.start()
    assert tool.begun.wait(WAIT)
    waiting = pool.submit([item(tool, 3)])
    waiting.start()
    waiting.cancel()
    running.cancel()
    running.cancel()
    for stopped in (running, waiting):
        with pytest.raises(CancelledError, match=r"^$"):
            stopped.futures[0].result(0)
    wait_for(lambda: tool.contexts[0].cancelled.is_set())
    assert not tool.contexts[1].cancelled.is_set()
    tool.go.set()
    assert texts(other) == ["2"]
    assert tool.batches == [[1, 2]], "what was taken back never ran"


def test_a_batch_that_nobody_waits_for_is_left(pool: ToolPool, tool: Batched) -> None:
    tool.go.clear()
    alone = pool.submit([item(tool, 1)])
    alone.start()
    assert tool.begun.wait(WAIT)
    alone.cancel()
    wait_for(lambda: tool.slots.closed == 1)
    refused = pool.submit([item(tool, 2)])
    refused.start()
    assert texts(refused) == ["batched takes no calls now: earlier ones have not stopped"]
    tool.go.set()
    wait_for(lambda: tool.slots.closed == 0)
    again = pool.submit([item(tool, 3)])
    again.start()
    assert texts(again) == ["3"]


def test_a_tool_that_hangs_is_abandoned_and_the_runs_go_on(pool: ToolPool, tool: Batched) -> None:
    tool.timeout = 0.05
    tool.go.clear()
    runs = [pool.submit([item(tool, n)]) for n in (1, 2)]
    runs[0].start()
    for run in runs:
        (result,) = (future.result(WAIT) for future in run.futures)
        assert result.error is not None
        assert result.error.kind == "timeout"
        assert result.metadata == {"abandoned": True}


def test_an_author_s_fault_is_raised_in_every_run_of_the_batch(pool: ToolPool) -> None:
    class Short(Batched):
        """Forget one."""

        name = "short"

        def run_batch(self, items: Sequence[tuple[Number, ToolContext]]) -> list[object]:  # type: ignore[override]
            return []

    short = Short()
    runs = [pool.submit([item(short, n)]) for n in (1, 2)]
    runs[0].start()
    for run in runs:
        with pytest.raises(ToolDefinitionError, match="one result for each call"):
            run.futures[0].result(WAIT)


def test_what_no_call_can_cause_is_told_to_the_runs(pool: ToolPool, tool: Batched) -> None:
    def broken() -> ToolContext:
        raise KeyboardInterrupt("from a thread")

    def ours() -> ToolContext:
        raise InternalError("impossible")

    runs = [pool.submit([item(tool, 1, context=ours)]), pool.submit([item(tool, 2)])]
    runs[0].start()
    with pytest.raises(InternalError, match="impossible"):
        runs[0].futures[0].result(WAIT)
    assert texts(runs[1]) == ["2"]
    stopped = pool.submit([item(tool, 1, context=broken)])
    stopped.start()
    with pytest.raises(KeyboardInterrupt, match="from a thread"):
        stopped.futures[0].result(WAIT)


def test_results_are_inspected_and_the_threads_prepared(tool: Batched) -> None:
    seen: list[str | None] = []
    entered: list[str] = []

    def inspect(result: ToolResult) -> None:
        seen.append(result.text)
        if result.text == "2":
            raise ToolDefinitionError("two is too many")

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        entered.append(threading.current_thread().name)
        yield

    pool = ToolPool(workers=1, around=around, inspect=inspect)
    pending = pool.submit([item(tool, 1), item(tool, 2)])
    pending.start()
    assert pending.futures[0].result(WAIT).text == "1"
    with pytest.raises(ToolDefinitionError, match="two is too many"):
        pending.futures[1].result(WAIT)
    assert seen == ["1", "2"]
    assert entered[0].startswith("vpt-tools")
    pool.close()


def test_closing_ends_what_waits_and_closes_tools_that_nobody_else_uses(tool: Batched) -> None:
    pool, other = ToolPool(workers=2), ToolPool(workers=2)
    for each in (pool, other):
        pending = each.submit([item(tool, 0)])
        pending.start()
        assert texts(pending) == ["0"]
    tool.go.clear()
    tool.begun.clear()
    running = pool.submit([item(tool, 1)])
    running.start()
    assert tool.begun.wait(WAIT)
    waiting = pool.submit([item(tool, 2)])
    waiting.start()
    pool.close()
    pool.close()
    assert "the time of the run is over" in texts(waiting)[0]
    with pytest.raises(UserError, match="this agent is closed: its tools do not run any more"):
        pool.submit([item(tool, 3)])
    tool.go.set()
    assert texts(running) == ["1"]
    assert tool.closed == 0, "the other agent uses it"
    other.close()
    wait_for(lambda: tool.closed == 1)


def test_a_tool_that_cannot_close_is_only_warned_about(tool: Batched) -> None:
    class Stubborn(Batched):
        """Stay."""

        name = "stubborn"

        def close(self) -> None:
            raise OSError("no")

    pool = ToolPool(workers=1)
    pending = pool.submit([item(Stubborn(), 1), item(tool, 1)])
    pending.start()
    texts(pending)
    time.sleep(0.05)
    with pytest.warns(UserWarning, match=r"closing the tool stubborn@1 failed: OSError\('no'\)"):
        pool.close()
    assert tool.closed == 1


def test_many_runs_at_once(figures: Callable[..., None]) -> None:
    """Each gets its own answer, in batches of the tool's size or less."""
    tool = Batched()
    pool = ToolPool(workers=4)

    def run(start: int, found: list[list[str]]) -> None:
        for n in range(start, start + 20):
            pending = pool.submit([item(tool, n)])
            pending.start()
            found.append(texts(pending))

    answers: list[list[list[str]]] = [[] for _ in range(6)]
    threads = [
        threading.Thread(target=run, args=(100 * i, answer)) for i, answer in enumerate(answers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    for i, answer in enumerate(answers):
        assert answer == [[str(n)] for n in range(100 * i, 100 * i + 20)]
    assert sorted(n for batch in tool.batches for n in batch) == sorted(
        n for i in range(6) for n in range(100 * i, 100 * i + 20)
    )
    assert max(map(len, tool.batches)) <= tool.batch_size
    figures("tool pool", calls=120, batches=len(tool.batches))
    pool.close()
