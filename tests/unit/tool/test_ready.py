"""A tool's life: set up once however many ask, closed by its last user, its slots counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from vpt_agent.tool import PerceptionTool, ToolContext, execute, perception_tool
from vpt_agent.tool.ready import NoSlotError, NotReadyError, Slots
from vpt_agent.types import ToolCall

CALL = ToolCall("c1", "t", {}, "json")


class Heavy(PerceptionTool):
    """Load for a while."""

    name = "heavy"

    def __init__(self) -> None:
        self.go = threading.Event()
        self.opened: list[str] = []
        self.closed = 0
        self.fail: list[BaseException] = []

    def setup(self, device: str) -> None:
        self.go.wait(20)
        self.opened.append(device)
        if self.fail:
            raise self.fail.pop()

    def run(self, arguments: object, context: ToolContext) -> str:
        return "done"

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def heavy() -> Iterator[Heavy]:
    tool = Heavy()
    yield tool
    tool.go.set()


def together(number: int, work) -> list:  # type: ignore[no-untyped-def, type-arg]
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(work())) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_many_callers_set_up_once(heavy: Heavy) -> None:
    heavy.go.set()
    results = together(8, lambda: execute(heavy, CALL, ToolContext).text)
    assert results == ["done"] * 8
    assert heavy.opened == ["cpu"]


def test_a_setup_that_takes_long_does_not_hold_the_run(heavy: Heavy) -> None:
    heavy.setup_timeout = 0.05
    result = execute(heavy, CALL, ToolContext)
    assert result.error is not None
    assert (result.error.kind, result.error.message) == (
        "timeout",
        "heavy is not ready yet: try again later, or go on without it",
    )
    assert result.error.detail == "its setup took longer than 0.05 s"
    soon = ToolContext(deadline=time.monotonic() + 0.05)
    heavy.setup_timeout = 20.0
    result = execute(heavy, CALL, lambda: soon)
    assert result.error is not None
    assert (result.error.kind, result.error.detail) == ("limit", "its setup goes on")
    heavy.go.set()
    assert execute(heavy, CALL, ToolContext).text == "done"
    assert heavy.opened == ["cpu"], "the setup that had begun was the one that was used"


def test_a_failed_setup_is_told_to_all_who_waited_and_tried_again(heavy: Heavy) -> None:
    heavy.fail = [OSError("no weights")]
    threading.Timer(0.1, heavy.go.set).start()
    told = together(3, lambda: execute(heavy, CALL, ToolContext))
    messages = [r.error.message for r in told if r.error is not None]
    assert set(messages) <= {"heavy failed: OSError"}
    assert messages, "at least the one that began it"
    assert execute(heavy, CALL, ToolContext).text == "done"


def test_another_device_is_another_setup(heavy: Heavy) -> None:
    heavy.go.set()
    for device in ("cpu", "cuda:0", "cuda:0", "cpu"):
        heavy.prepare(device)
    assert heavy.opened == ["cpu", "cuda:0", "cpu"]
    heavy.go.clear()
    with pytest.raises(NotReadyError, match="the setup for cuda:1 is still going on"):
        heavy.prepare("cuda:1", seconds=0.02)


def test_the_last_user_closes(heavy: Heavy) -> None:
    heavy.go.set()
    heavy.hold()
    heavy.hold()
    heavy.prepare("cpu")
    heavy.let_go()
    assert heavy.closed == 0
    heavy.let_go()
    assert heavy.closed == 1
    heavy.release()
    assert heavy.closed == 1, "what is not set up is not closed"


def test_slots_bound_how_many_run_at_once() -> None:
    running: list[int] = []
    most: list[int] = []

    @perception_tool(concurrency=2)
    def slow() -> str:
        """Take a while."""
        running.append(1)
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return "done"

    assert together(6, lambda: execute(slow, CALL, ToolContext).text) == ["done"] * 6
    assert max(most) == 2


def test_a_slot_whose_thread_does_not_stop_is_closed_until_it_does() -> None:
    release = threading.Event()
    stuck = threading.Event()

    @perception_tool(concurrency=2, timeout=0.05)
    def sticky(hang: bool = False) -> str:
        """Hang if told to."""
        if hang:
            stuck.set()
            release.wait(20)
        return "done"

    hang = ToolCall("c1", "sticky", {"hang": True}, "json")
    assert execute(sticky, hang, ToolContext).metadata == {"abandoned": True}
    assert sticky.slots.closed == 1
    assert execute(sticky, CALL, ToolContext).text == "done", "the other slot is open"
    assert execute(sticky, hang, ToolContext).metadata == {"abandoned": True}
    began = time.monotonic()
    refused = execute(sticky, CALL, ToolContext)
    assert time.monotonic() - began < 5
    assert refused.error is not None
    assert (refused.error.kind, refused.error.message) == (
        "tool_failed",
        "sticky takes no calls now: earlier ones have not stopped",
    )
    release.set()
    for _ in range(200):
        if sticky.slots.closed == 0:
            break
        time.sleep(0.01)
    assert execute(sticky, CALL, ToolContext).text == "done", "its threads have stopped"


def test_slots_by_themselves() -> None:
    slots = Slots(1)
    first = slots.take("t", lambda: True)
    assert first is not None
    assert slots.take("t", lambda: False) is None, "nobody waits"
    first.leave()
    with pytest.raises(NoSlotError, match="t takes no calls now: earlier ones have not stopped"):
        slots.take("t", lambda: True)
    first.over()
    first.over()
    assert slots.closed == 0
    second = slots.take("t", lambda: True)
    assert second is not None
    second.over()
    second.leave()
    assert slots.closed == 0, "its thread had ended already"
    assert slots.take("t", lambda: True) is not None
