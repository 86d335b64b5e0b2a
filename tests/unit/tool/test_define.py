"""From functions and classes to tools, and what an author can get wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

import pytest
from PIL import Image
from pydantic import Field

from vpt_agent.errors import ToolDefinitionError
from vpt_agent.tool import (
    Cancelled,
    ControlState,
    Deadline,
    FromContext,
    OriginalView,
    PerceptionTool,
    Rng,
    SourceView,
    ToolArguments,
    ToolContext,
    execute,
    perception_tool,
)
from vpt_agent.types import Box, ToolCall, View

if TYPE_CHECKING:
    from decimal import Decimal


@perception_tool
def count(
    context: ToolContext,
    colour: Literal["red", "blue"],
    most: Annotated[int, Field(ge=1, description="from the annotation")] = 10,
    source: str | None = None,
) -> str:
    """Count the tags of one colour.

    Args:
        colour: which ones
        most: from the docstring
    """
    return f"{colour} {most} {context.regions} {source}"


def test_a_function_is_a_tool() -> None:
    assert (count.name, count.version, count.full_name) == ("count", 1, "count@1")
    assert count.description == "Count the tags of one colour."
    assert count.needs == {"view"}
    assert count.timeout == 60.0
    schema = count.json_schema()
    assert schema["required"] == ["colour"]
    assert schema["properties"] == {
        "colour": {"type": "string", "enum": ["red", "blue"], "description": "which ones"},
        "most": {
            "type": "integer",
            "minimum": 1,
            "default": 10,
            "description": "from the annotation",
        },
        "source": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    }
    assert count.openai_schema() == {
        "type": "function",
        "function": {"name": "count", "description": count.description, "parameters": schema},
    }
    assert count.owner.endswith("test_define.count")
    assert "count@1 of " in repr(count)


def test_the_function_can_still_be_called() -> None:
    assert count(ToolContext(), "red") == "red 10 published None"
    arguments = count.spec.parse({"colour": "blue", "most": 3})
    assert count.run(arguments, ToolContext(regions="cover")) == "blue 3 cover None"  # type: ignore[arg-type]


def test_the_schema_given_out_is_a_copy() -> None:
    count.json_schema().clear()
    assert count.json_schema()["type"] == "object"


def test_options_are_kept() -> None:
    @perception_tool(
        name="other",
        version=3,
        description="Said here.",
        needs={"encoder:clip"},
        timeout=None,
        concurrency=2,
        always_run=True,
        device="cpu",
        max_retries=0,
        licence="MIT",
        extra="yolo",
    )
    def function(n: int) -> str:
        return str(n)

    got = (function.full_name, function.description, function.needs, function.timeout)
    assert got == ("other@3", "Said here.", {"encoder:clip"}, None)
    rest = (function.concurrency, function.always_run, function.device, function.max_retries)
    assert rest == (2, True, "cpu", 0)
    assert (function.licence, function.extra) == ("MIT", "yolo")


def test_needs_follow_the_context_unless_said() -> None:
    def without(n: int) -> str:
        """Say a number."""
        return str(n)

    def with_context(n: int, context: ToolContext) -> str:
        """Say a number."""
        return str(n)

    assert perception_tool(without).needs == frozenset()
    assert perception_tool(needs=())(with_context).needs == frozenset()
    assert perception_tool(needs="control")(with_context).needs == {"control"}


def _made(
    version: int = 1, text: str = "Say a number.", default: int = 1
) -> dict[str, PerceptionTool]:
    def say(n: int = default) -> str:
        return str(n)

    return {"tool": perception_tool(version=version, description=text)(say)}


def test_equal_contracts_have_equal_hashes() -> None:
    base = _made()["tool"].contract_hash
    assert len(base) == 64
    assert _made()["tool"].contract_hash == base
    others = {
        _made(version=2)["tool"].contract_hash,
        _made(text="Say it.")["tool"].contract_hash,
        _made(default=2)["tool"].contract_hash,
        base,
    }
    assert len(others) == 4


def test_the_hash_of_a_contract_does_not_change_by_itself() -> None:
    """Checkpoints and traces carry these hashes: a change here makes old ones warn."""

    class Fixed(PerceptionTool):
        """Say nothing."""

        name = "fixed"

        def run(self, arguments: object, context: ToolContext) -> str:
            return ""

    canonical = (
        '{"description":"Say nothing.","name":"fixed",'
        '"schema":{"additionalProperties":false,"properties":{},"type":"object"},"version":1}'
    )
    assert Fixed().contract_hash == hashlib.sha256(canonical.encode()).hexdigest()


def no_description(n: int) -> str:
    return ""


def no_type(n) -> str:  # type: ignore[no-untyped-def]
    """Do it."""
    return ""


def rest(*n: int) -> str:
    """Do it."""
    return ""


def positional(n: int, /) -> str:
    """Do it."""
    return ""


def unknown_type(n: Decimal) -> str:
    """Do it."""
    return ""


def shadow(json: int) -> str:
    """Do it."""
    return ""


def private(_n: int) -> str:
    """Do it."""
    return ""


def two_contexts(a: ToolContext, b: ToolContext) -> str:
    """Do it."""
    return ""


def surplus(n: int) -> str:
    """Do it.

    Args:
        m: not there
    """
    return ""


def strange(n: object.__class__) -> str:  # type: ignore[name-defined]
    """Do it."""
    return ""


async def later(n: int) -> str:
    """Do it."""
    return ""


class Opaque:
    pass


def opaque(n: Opaque) -> str:
    """Do it."""
    return ""


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (no_description, "needs a description.*where: .*no_description; got: ''"),
        (no_type, "no type.*where: .*no_type; got: n; do: annotate it"),
        (rest, r"passed by name.*got: \*n"),
        (positional, "passed by name.*expected: no .*positional-only"),
        (unknown_type, "not known when the tool is made.*Decimal.*not under TYPE_CHECKING"),
        (shadow, "a meaning in pydantic.*got: json; do: rename it"),
        (private, "a meaning in pydantic.*got: _n"),
        (two_contexts, "has two contexts.*got: b"),
        (surplus, "parameters that the function does not have.*got: m; expected: n"),
        (later, "cannot be async"),
        (opaque, "a parameter cannot be an argument of a tool.*Opaque"),
    ],
)
def test_a_function_that_is_no_tool_is_told_at_once(
    function: Callable[..., str], text: str
) -> None:
    with pytest.raises(ToolDefinitionError, match=text):
        perception_tool(function)


def fine(n: int) -> str:
    """Do it."""
    return ""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "two words"}, "cannot be the name of a tool.*got: 'two words'"),
        ({"name": "crop@2"}, "cannot be the name of a tool"),
        ({"name": ""}, "cannot be the name of a tool"),
        ({"name": "auto"}, "a tool_choice, not a tool; where: .*; got: 'auto'"),
        ({"version": 0}, "version of a tool is a number.*got: 0; expected: 1 or more"),
        ({"needs": {"eyes"}}, r"needs something that is not known.*got: \['eyes'\]"),
        ({"timeout": 0}, "timeout is a number of seconds; .*got: 0"),
        ({"concurrency": 0}, "impossible number; .*got: 'concurrency=0'; expected: concurrency >="),
        ({"concurrency": 1.5}, "impossible number.*concurrency=1.5"),
        ({"max_retries": -1}, "impossible number.*max_retries=-1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], text: str) -> None:
    with pytest.raises(ToolDefinitionError, match=text):
        perception_tool(**options)(fine)  # type: ignore[call-overload]


class Numbers(ToolArguments):
    n: int


class Adder(PerceptionTool):
    """Add one.

    Args:
        n: any number
    """

    name = "adder"
    arguments = Numbers

    def __init__(self) -> None:  # without super().__init__(), as authors do
        self.devices: list[str] = []

    def setup(self, device: str) -> None:
        self.devices.append(device)

    def run(self, arguments: Numbers, context: ToolContext) -> str:
        return str(arguments.n + 1)


def test_a_class_is_a_tool() -> None:
    tool = Adder()
    assert tool.description == "Add one."
    assert tool.run(Numbers(n=1), ToolContext()) == "2"
    assert list(tool.run_batch([(Numbers(n=i), ToolContext()) for i in range(3)])) == [
        "1",
        "2",
        "3",
    ]
    assert tool.owner.endswith("test_define.Adder")


def test_setup_is_called_once_for_a_device() -> None:
    tool = Adder()
    for device in ("cpu", "cpu", "cuda:0", "cuda:0"):
        tool.prepare(device)
    assert tool.devices == ["cpu", "cuda:0"]
    tool.close()
    fixed = Adder()
    fixed.device = "cpu"
    fixed.prepare("cuda:0")
    fixed.prepare("cuda:1")
    assert fixed.devices == ["cpu"]


class Doubler(PerceptionTool):
    """Double them all."""

    name = "doubler"
    arguments = Numbers
    batch_size = 2

    def run_batch(self, items):  # type: ignore[no-untyped-def]
        return [str(arguments.n * 2) for arguments, _ in items]


def test_run_batch_alone_is_enough() -> None:
    assert Doubler().run(Numbers(n=4), ToolContext()) == "8"


def test_run_batch_must_give_one_result_for_each() -> None:
    class Short(Doubler):
        """Forget one."""

        name = "short"

        def run_batch(self, items):  # type: ignore[no-untyped-def]
            return []

    with pytest.raises(ToolDefinitionError, match=r"one result for each call.*Short; got: 0"):
        Short().run(Numbers(n=4), ToolContext())

    class Failing(Doubler):
        """Fail one."""

        name = "failing"

        def run_batch(self, items):  # type: ignore[no-untyped-def]
            return [ValueError("odd")]

    with pytest.raises(ValueError, match="odd"):
        Failing().run(Numbers(n=4), ToolContext())


def test_a_class_is_checked_when_it_is_written() -> None:
    with pytest.raises(ToolDefinitionError, match=r"a tool does nothing.*Lazy"):

        class Lazy(PerceptionTool):
            """Do nothing."""

            name = "lazy"

    with pytest.raises(ToolDefinitionError, match="needs a description"):

        class Silent(PerceptionTool):
            name = "silent"

            def run(self, arguments: object, context: ToolContext) -> str:
                return ""


def test_a_base_class_without_a_name_is_left_alone() -> None:
    class Base(PerceptionTool):
        """Shared by several."""

    assert Base.name == ""


def test_the_table_of_kinds_names_valid_tools() -> None:
    from vpt_agent.tokens.table import PUBLISHED

    assert {k.tool for k in PUBLISHED.values()} == {
        "crop_region",
        "reencode_clip",
        "reencode_dino",
        "reencode_sam",
    }


@perception_tool
def peek(
    view: SourceView,
    original: OriginalView,
    rng: Rng,
    until: Deadline,
    stop: Cancelled,
    n: int = 1,
) -> str:
    """Look.

    Args:
        view: (filled in)
        n: how often
    """
    return f"{view.id} of {original.id} {n} {rng.random():.3f} {until} {stop.is_set()}"


def test_parts_of_the_context_are_filled_in_and_never_seen() -> None:
    properties = peek.json_schema()["properties"]
    assert list(properties) == ["n", "source"]  # type: ignore[arg-type]
    assert properties["source"]["description"].startswith("id of the picture")  # type: ignore[index,call-overload,union-attr]
    assert peek.needs == {"view"}
    whole = View("image_1", Image.new("RGB", (9, 9)), "image_1", Box(0, 0, 9, 9), (9, 9))
    part = View("c1", whole.image, "image_1", whole.box, (9, 9), parent="image_1")
    context = ToolContext(views={"image_1": whole, "c1": part}, deadline=None)
    results = [
        execute(peek, ToolCall("x", "peek", arguments, "json"), lambda: context)
        for arguments in ({}, {"source": "c1", "n": 2})
    ]
    assert results[0].text == "image_1 of image_1 1 0.844 None False"
    assert results[1].text == "c1 of image_1 2 0.758 None False"


def test_a_source_of_the_function_s_own_is_left_alone() -> None:
    @perception_tool
    def own(view: SourceView, source: str) -> str:
        """Look."""
        return f"{view.id} {source}"

    assert own.json_schema()["required"] == ["source"]
    view = View("v", Image.new("RGB", (9, 9)), "v", Box(0, 0, 9, 9), (9, 9))
    call = ToolCall("x", "own", {"source": "v"}, "json")
    assert execute(own, call, lambda: ToolContext(views={"v": view})).text == "v v"


def test_what_needs_the_control_state_says_so() -> None:
    @perception_tool
    def feel(control: ControlState, device: Annotated[str, FromContext("device")]) -> str:
        """Feel."""
        return f"{control} {device}"

    assert feel.needs == {"control"}
    assert feel.run(feel.spec.parse({}), ToolContext(control=7)) == "7 cpu"  # type: ignore[arg-type]


def test_a_view_is_no_argument_and_the_context_has_no_more_than_it_has() -> None:
    def bare(view: View) -> str:
        """Look."""
        return ""

    with pytest.raises(
        ToolDefinitionError, match=r"cannot send a View; .*got: view; do: view: Sour"
    ):
        perception_tool(bare)

    def odd(colour: Annotated[str, FromContext("colour")]) -> str:
        """Look."""
        return ""

    with pytest.raises(ToolDefinitionError, match=r"no such attribute.*got: colour: colour"):
        perception_tool(odd)
