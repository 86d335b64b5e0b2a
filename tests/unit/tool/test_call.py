"""One call: nothing a model writes and no way a tool fails gets past the call path."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vpt_agent.errors import (
    CheckpointError,
    ImageError,
    InternalError,
    MissingExtraError,
    ModelRetry,
    ToolDefinitionError,
    ToolFailed,
    TraceError,
    UserError,
)
from vpt_agent.tokens.table import CLIP
from vpt_agent.tool import (
    FromContext,
    PerceptionTool,
    ToolArguments,
    ToolContext,
    ToolRegistry,
    execute,
    execute_batch,
    perception_tool,
)
from vpt_agent.types import Box, CallError, ToolCall, View


def picture(id_: str) -> View:
    return View(id_, Image.new("RGB", (40, 20)), id_, Box(0, 0, 40, 20), (40, 20))


VIEWS = {"image_1": picture("image_1"), "image_2": picture("image_2")}
CONTEXT = ToolContext(views=VIEWS)


def call(name: str = "t", **arguments: object) -> ToolCall:
    return ToolCall("c1", name, arguments, "json")


@perception_tool
def look(context: ToolContext, n: int, source: str | None = None) -> str:
    """Say which view it is."""
    return f"{context.require_view().id} {n}"


def test_a_call_is_checked_and_run() -> None:
    result = execute(look, call("look", n="3"), lambda: CONTEXT)
    assert (result.ok, result.text, result.call_id, result.name) == (
        True,
        "image_1 3",
        "c1",
        "look",
    )
    assert result.seconds > 0
    assert execute(look, call(n=1, source="image_2"), lambda: CONTEXT).text == "image_2 1"


def test_time_is_read_from_the_clock_that_is_given() -> None:
    ticks = iter(range(0, 1000, 10))
    result = execute(look, call(n=1), lambda: CONTEXT, clock=lambda: float(next(ticks)))
    assert result.seconds == 20.0  # ten for the check, ten for the run


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, "invalid_arguments", "n: Field required"),
        ({"n": "x"}, "invalid_arguments", "n: Input should be a valid integer"),
        ({"n": 1, "source": "w"}, "unknown_source", "no view 'w'; views: image_1, image_2"),
        ({"n": 1, "source": "w\n" * 300}, "unknown_source", "there is no view"),
    ],
)
def test_what_the_model_did_wrong(arguments: dict[str, object], kind: str, message: str) -> None:
    result = execute(look, call(**arguments), lambda: CONTEXT)
    assert result.error is not None
    assert result.error.kind == kind
    assert message in result.error.message
    assert "\n" not in result.error.message
    assert len(result.error.message) <= 300


def test_a_context_is_made_only_for_valid_arguments() -> None:
    made: list[int] = []

    def factory() -> ToolContext:
        made.append(1)
        return CONTEXT

    execute(look, call(), factory)
    assert made == []
    execute(look, call(n=1), factory)
    assert made == [1]


def test_an_unknown_tool_is_a_result_too() -> None:
    tools = ToolRegistry([look])
    result = execute(tools.get("lok"), call("lok"), lambda: CONTEXT)
    assert result.error == CallError("unknown_tool", "there is no tool 'lok'; did you mean look")


def test_source_is_only_an_address_for_tools_that_look() -> None:
    @perception_tool
    def query(source: str) -> str:
        """Ask a database."""
        return source

    assert execute(query, call(source="parts.db"), lambda: ToolContext()).text == "parts.db"


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"view"}, "there is no picture to look at"),
        ({"control"}, "needs the control state, which only its perception tokens carry"),
        ({"encoder:sam"}, "needs the encoder sam, which this model lacks"),
    ],
)
def test_what_a_tool_needs_is_checked_before_it_runs(needs: set[str], message: str) -> None:
    ran: list[int] = []

    @perception_tool(needs=needs)
    def tool() -> str:
        """Do it."""
        ran.append(1)
        return "done"

    bare = ToolContext(kinds={"clip": CLIP})
    result = execute(tool, call(), lambda: bare)
    assert result.error is not None
    assert message in result.error.message
    assert ran == []
    full = replace(CONTEXT, control=torch.zeros(1, 2), kinds={"sam": CLIP}, view=VIEWS["image_1"])
    assert execute(tool, call(), lambda: full).text == "done"


def failing(error: BaseException, timeout: float | None = 5.0) -> PerceptionTool:
    @perception_tool(timeout=timeout)
    def tool() -> str:
        """Fail."""
        raise error

    return tool


SECRET = "/home/somebody/secret"


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ModelRetry("too\nsmall", "box_too_small"), "box_too_small", "too small"),
        (ModelRetry("again"), "invalid_arguments", "again"),
        (ToolFailed("no luck"), "tool_failed", "no luck"),
        (ValueError(SECRET), "tool_failed", "tool failed: ValueError"),
        (KeyError(SECRET), "tool_failed", "tool failed: KeyError"),
        (SystemExit(SECRET), "tool_failed", "tool failed: SystemExit"),
        (GeneratorExit(SECRET), "tool_failed", "tool failed: GeneratorExit"),
        (asyncio.CancelledError(SECRET), "tool_failed", "tool failed: CancelledError"),
        (RecursionError(SECRET), "tool_failed", "tool failed: RecursionError"),
        (AssertionError(SECRET), "tool_failed", "tool failed: AssertionError"),
        (MemoryError(SECRET), "tool_failed", "tool ran out of memory"),
        (torch.OutOfMemoryError(SECRET), "tool_failed", "tool ran out of memory"),
        (UserError("no such row", got=SECRET), "tool_failed", "tool failed: no such row"),
        (ImageError("broken", where=SECRET), "tool_failed", "tool failed: broken"),
    ],
)
def test_a_failing_tool_is_a_result(
    error: BaseException, kind: str, message: str, timeout: float | None
) -> None:
    result = execute(failing(error, timeout), call(), lambda: CONTEXT)
    assert result.error is not None
    assert (result.error.kind, result.error.message) == (kind, message)
    if SECRET in str(error):
        assert "Traceback" in result.error.detail
        assert SECRET in result.error.detail
    assert result.metadata == {}


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("weights"),
        InternalError("impossible"),
        MissingExtraError("install it"),
        ToolDefinitionError("wrong"),
        TraceError("disk"),
    ],
)
def test_faults_that_no_call_can_cause_are_raised(error: Exception, timeout: float | None) -> None:
    with pytest.raises(type(error), match=str(error)):
        execute(failing(error, timeout), call(), lambda: CONTEXT)


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_the_user_s_interrupt_is_raised(timeout: float | None) -> None:
    with pytest.raises(KeyboardInterrupt, match="stop"):
        execute(failing(KeyboardInterrupt("stop"), timeout), call(), lambda: CONTEXT)


def test_an_output_that_cannot_be_is_raised_and_a_broken_picture_is_not() -> None:
    @perception_tool
    def number() -> int:
        """Give what no result can be."""
        return 7

    with pytest.raises(ToolDefinitionError, match=r"no result can be; where: .*got: builtins\.int"):
        execute(number, call(), lambda: CONTEXT)

    @perception_tool
    def empty() -> Image.Image:
        """Give a picture without pixels."""
        return Image.new("RGB", (0, 0))

    result = execute(empty, call(), lambda: CONTEXT)
    assert result.error == CallError("tool_failed", "the tool made a picture without pixels")


def test_the_cause_of_a_retry_is_kept_for_the_trace() -> None:
    @perception_tool
    def tool() -> str:
        """Fail with a reason."""
        try:
            return {}["missing"]
        except KeyError as error:
            raise ModelRetry("name a part that exists") from error

    result = execute(tool, call(), lambda: CONTEXT)
    assert result.error == CallError(
        "invalid_arguments", "name a part that exists", "KeyError: 'missing'"
    )


def test_a_failing_setup_is_a_result_and_is_tried_again() -> None:
    class Loading(PerceptionTool):
        """Load first."""

        name = "loading"
        tries = 0

        def setup(self, device: str) -> None:
            self.tries += 1
            if self.tries == 1:
                raise OSError("weights are gone")

        def run(self, arguments: object, context: ToolContext) -> str:
            return "done"

    tool = Loading()
    first = execute(tool, call(), lambda: CONTEXT)
    assert first.error is not None
    assert first.error.message == "loading failed: OSError"
    assert execute(tool, call(), lambda: CONTEXT).text == "done"
    assert execute(tool, call(), lambda: CONTEXT).text == "done"
    assert tool.tries == 2


def test_a_tool_that_will_not_stop_is_left_behind() -> None:
    release = threading.Event()

    @perception_tool(timeout=0.05)
    def stuck() -> str:
        """Hang."""
        release.wait(20)
        return "late"

    result = execute(stuck, call(), lambda: CONTEXT)
    release.set()
    assert result.error == CallError(
        "timeout",
        "stuck took longer than 0.05 s and was ended",
        "its thread did not stop and was left behind",
    )
    assert result.metadata == {"abandoned": True}
    assert result.seconds >= 0.05


def test_a_tool_can_notice_that_nobody_waits() -> None:
    @perception_tool(timeout=0.05)
    def polite(context: ToolContext) -> str:
        """Stop when asked."""
        context.cancelled.wait(20)
        return "late"

    result = execute(polite, call(), lambda: ToolContext(views=VIEWS))
    assert result.error is not None
    assert (result.error.kind, result.error.detail) == ("timeout", "it stopped")
    assert result.metadata == {}


@pytest.mark.parametrize("timeout", [None, 5.0])
def test_the_run_s_deadline_ends_a_tool(timeout: float | None) -> None:
    @perception_tool(timeout=timeout)
    def slow(context: ToolContext) -> str:
        """Wait for the end."""
        context.cancelled.wait(20)
        return "late"

    soon = ToolContext(views=VIEWS, deadline=time.monotonic() + 0.05)
    result = execute(slow, call(), lambda: soon)
    assert result.error == CallError(
        "limit", "the time of the run is over; slow was ended", "it stopped"
    )
    over = ToolContext(views=VIEWS, deadline=time.monotonic() - 1)
    result = execute(slow, call(), lambda: over)
    assert result.error is not None
    assert result.error.kind == "limit"
    assert result.seconds < 0.05


def test_a_deadline_far_away_changes_nothing() -> None:
    later = ToolContext(views=VIEWS, deadline=time.monotonic() + 60)
    assert execute(look, call(n=1), lambda: later).text == "image_1 1"


def test_the_gradient_mode_of_torch_is_carried_to_the_thread() -> None:
    @perception_tool(timeout=5.0)
    def modes() -> str:
        """Say the modes."""
        on_main = threading.current_thread() is threading.main_thread()
        return f"{torch.is_grad_enabled()} {torch.is_inference_mode_enabled()} {on_main}"

    assert execute(modes, call(), lambda: CONTEXT).text == "True False False"
    with torch.no_grad():
        assert execute(modes, call(), lambda: CONTEXT).text == "False False False"
    with torch.inference_mode():
        assert execute(modes, call(), lambda: CONTEXT).text == "False True False"


def test_no_torch_no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    assert execute(look, call(n=1), lambda: CONTEXT).text == "image_1 1"
    assert execute(failing(MemoryError()), call(), lambda: CONTEXT).error is not None


class Number(ToolArguments):
    n: int


class Batched(PerceptionTool):
    """Take several numbers at once; ``most`` is what fits into memory."""

    name = "batched"
    arguments = Number
    batch_size = 4
    most = 99

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run_batch(self, items: Sequence[tuple[Number, ToolContext]]) -> list[object]:  # type: ignore[override]
        self.sizes.append(len(items))
        if len(items) > self.most:
            raise torch.OutOfMemoryError("too many")
        if any(a.n == 13 for a, _ in items):
            raise ValueError("unlucky")
        return [ToolFailed("negative") if a.n < 0 else str(a.n) for a, _ in items]


def batch(
    tool: PerceptionTool, *numbers: object, context: Callable[[], ToolContext] = lambda: CONTEXT
) -> list[str]:
    calls = [
        (ToolCall(f"c{i}", tool.name, {"n": n}, "json"), context) for i, n in enumerate(numbers)
    ]
    results = execute_batch(tool, calls)
    assert [r.call_id for r in results] == [f"c{i}" for i in range(len(numbers))]
    return [r.text or "" if r.error is None else r.error.message for r in results]


def test_calls_run_in_batches_of_the_tool_s_size() -> None:
    tool = Batched()
    assert batch(tool, *range(6)) == ["0", "1", "2", "3", "4", "5"]
    assert tool.sizes == [4, 2]
    assert execute_batch(tool, []) == []


def test_a_wrong_call_does_not_touch_the_others() -> None:
    tool = Batched()
    assert batch(tool, 1, "x", -1, 3) == [
        "1",
        "n: Input should be a valid integer",
        "negative",
        "3",
    ]
    assert tool.sizes == [3]


def test_out_of_memory_splits_the_batch() -> None:
    tool = Batched()
    tool.most = 1
    assert batch(tool, 1, 2, 3, 4) == ["1", "2", "3", "4"]
    assert tool.sizes == [4, 2, 1, 1, 2, 1, 1]
    tool.most = 0
    assert batch(tool, 1, 2) == ["batched ran out of memory"] * 2


def test_one_bad_call_is_found_by_splitting() -> None:
    assert batch(Batched(), 1, 13, 3) == ["1", "batched failed: ValueError", "3"]


def test_a_batch_out_of_time_is_not_tried_again() -> None:
    class Slow(Batched):
        """Wait."""

        name = "slow"
        timeout = 0.05

        def run_batch(self, items: Sequence[tuple[Number, ToolContext]]) -> list[object]:  # type: ignore[override]
            self.sizes.append(len(items))
            items[0][1].cancelled.wait(20)
            return []

    tool = Slow()
    message = "slow took longer than 0.05 s and was ended"
    assert batch(tool, 1, 2, context=lambda: ToolContext(views=VIEWS)) == [message] * 2
    assert tool.sizes == [2]


def test_a_batch_of_the_wrong_length_and_a_fault_in_it_are_raised() -> None:
    class Short(Batched):
        """Forget one."""

        name = "short"
        given: object = ["one"]

        def run_batch(self, items: Sequence[tuple[Number, ToolContext]]) -> list[object]:  # type: ignore[override]
            return self.given  # type: ignore[return-value]

    tool = Short()
    with pytest.raises(ToolDefinitionError, match=r"one result for each call.*got: 1; expected: 2"):
        batch(tool, 1, 2)
    tool.given = "ab"
    with pytest.raises(ToolDefinitionError, match="got: <class 'str'>; expected: 2"):
        batch(tool, 1, 2)
    tool.given = ["fine", InternalError("impossible")]
    with pytest.raises(InternalError, match="impossible"):
        batch(tool, 1, 2)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(arguments=st.dictionaries(st.sampled_from(["n", "source", "x"]) | st.text(), JSON))
def test_whatever_the_model_sends_there_is_a_result(arguments: dict[str, object]) -> None:
    result = execute(look, ToolCall("c", "look", arguments, "json"), lambda: CONTEXT)
    assert result.ok or (result.error is not None and "\n" not in result.error.message)
    if result.error is not None:
        assert result.error.kind in ("invalid_arguments", "unknown_source")
        result.error.message.encode("utf-8")


def test_a_tool_with_a_device_of_its_own_is_told_it() -> None:
    @perception_tool(device="cuda:1")
    def where(device: Annotated[str, FromContext("device")]) -> str:
        """Say where."""
        return device

    assert execute(where, call("where"), lambda: ToolContext(device="cuda:0")).text == "cuda:1"
