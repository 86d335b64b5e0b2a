"""Arguments: what the model is told, and what it may send."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from vpt_agent.errors import ModelRetry, ToolDefinitionError
from vpt_agent.tool import GridBoxes, Norm1000Box, PixelBoxes, ToolArguments
from vpt_agent.tool.arguments import argument_spec, read_values
from vpt_agent.tool.text import one_line, split_docstring


class Count(ToolArguments):
    """Not for the model."""

    colour: str = Field(description="which ones")
    most: Annotated[int, Field(ge=1)] = 10


def test_the_schema_is_short_and_says_what_it_must() -> None:
    assert argument_spec(Count, where="here").schema == {
        "type": "object",
        "additionalProperties": False,
        "required": ["colour"],
        "properties": {
            "colour": {"type": "string", "description": "which ones"},
            "most": {"type": "integer", "minimum": 1, "default": 10},
        },
    }


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({}, "colour: Field required"),
        ({"colour": "red", "most": 0}, "most: Input should be greater than or equal to 1"),
        ({"colour": "red", "size": 3}, "size: Extra inputs are not permitted"),
        ("red", "Input should be an object"),
        ({"colour": ["\n"], "most": "many"}, "colour: .*string; most: .*integer"),
        (
            {"a": 1, "b": 2, "c": 3, "d": 4},
            "colour: Field required; a: .* permitted; b: .* permitted; and 2 more",
        ),
    ],
)
def test_a_wrong_call_is_told_in_one_line(values: object, line: str) -> None:
    with pytest.raises(ModelRetry, match=f"^{line}$") as caught:
        argument_spec(Count, where="here").parse(values)
    assert caught.value.kind == "invalid_arguments"
    assert caught.value.__cause__ is not None


def test_a_right_call_is_an_instance() -> None:
    parsed = argument_spec(Count, where="here").parse(MappingProxyType({"colour": "red"}))
    assert parsed == Count(colour="red", most=10)


class Boxes(ToolArguments):
    region: GridBoxes | None = None
    box: PixelBoxes | None = None
    at: Norm1000Box | None = None


def test_one_box_or_several() -> None:
    spec = argument_spec(Boxes, where="here")
    assert spec.parse({"region": [1, 2, 3, 4]}) == Boxes(region=[[1, 2, 3, 4]])
    assert spec.parse({"box": [[1, 2, 3, 4.5], (5, 6, 7, 8)]}) == Boxes(
        box=[[1, 2, 3, 4.5], [5, 6, 7, 8]]
    )
    assert spec.parse({"at": [0, 0, 1000, 1000]}).at == [0, 0, 1000, 1000]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"region": []}, "region: List should have at least 1 item"),
        ({"region": [1, 2, 3]}, "region.0: List should have at least 4 items"),
        ({"region": [[1, 2, 3, 4.5]]}, r"region\.0\.3: .*valid integer"),
        ({"region": [[0, 0, 1, 1]] * 17}, "region: List should have at most 16 items"),
        ({"box": "all"}, "box: Input should be a valid array"),
        (
            {"box": [float("inf")] * 3, "at": None},
            "^box: there is something in it that JSON cannot",
        ),
        ({"at": [1, 2, 3, 4, 5]}, "at: List should have at most 4 items"),
    ],
)
def test_wrong_boxes_are_told(values: object, line: str) -> None:
    with pytest.raises(ModelRetry, match=line):
        argument_spec(Boxes, where="here").parse(values)


def test_the_check_is_strict_and_what_is_near_is_read_before() -> None:
    spec = argument_spec(Count, where="here")
    with pytest.raises(ModelRetry, match=r"^most: Input should be a valid integer$"):
        spec.parse({"colour": "red", "most": "3"})
    parsed, repairs = read_values(spec, {"colour": "red", "most": "3"})
    assert parsed == Count(colour="red", most=3)
    assert repairs == ("most: '3' was read as 3",)
    assert read_values(spec, {"colour": "a\ud800b"}) == (Count(colour="a?b"), ())
    for values in ([1], None, {"colour": object()}, {"colour": float("nan")}):
        with pytest.raises(ModelRetry, match=r"object|JSON"):
            read_values(spec, values)


def test_boxes_say_their_frame_in_the_schema() -> None:
    schema = argument_spec(Boxes, where="here").schema
    properties = schema["properties"]
    assert isinstance(properties, dict)
    assert "cells of the region grid" in str(properties["region"])
    assert "in pixels of the source view" in str(properties["box"])
    assert "0 to 1000" in str(properties["at"])
    assert "prefixItems" not in str(schema)  # not every model's server knows it


RAW = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/small"}, "names": {"type": "array"}},
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {"small": {"type": "integer", "maximum": 5}},
}


def test_a_raw_schema_is_checked_with_jsonschema() -> None:
    spec = argument_spec(RAW, where="here")
    assert spec.schema == RAW
    assert spec.parse({"n": 3}) == {"n": 3}
    for values, line in [
        ({"n": 9}, "^n: 9 is greater than the maximum of 5$"),
        ({"n": True}, "^n: True is not of type 'integer'$"),
        ({"m": 1}, "^'n' is a required property; .* \\('m' was unexpected\\)$"),
        ([1], r"^\[1\] is not of type 'object'$"),
        (None, "None is not of type 'object'"),
    ]:
        with pytest.raises(ModelRetry, match=line):
            spec.parse(values)


class Lax(BaseModel):
    n: int


class Odd(ToolArguments):
    call: Callable[[], int]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (Lax, "must refuse unknown names; where: here; got: Lax .*'ignore'.*ToolArguments"),
        (Odd, "a type that JSON Schema cannot say"),
        ({"type": "objekt"}, "is no JSON Schema; where: here; got: 'objekt' is not valid"),
        ({"type": "array"}, "their schema is an object; where: here; got: type 'array'"),
        ({"properties": {}}, "got: type None"),
        (
            {"type": "object", "properties": {"a": [{"$ref": "https://example.org/s"}]}},
            "no JSON Schema",
        ),
        (
            {"type": "object", "allOf": [{"$ref": "https://example.org/s.json"}]},
            r"to itself only.*got: https://example\.org/s\.json; do: put the definitions",
        ),
        ([1], r"declared wrongly; where: here; got: \[1\]; expected: a pydantic model"),
    ],
)
def test_what_an_author_can_get_wrong(arguments: object, text: str) -> None:
    with pytest.raises(ToolDefinitionError, match=text):
        argument_spec(arguments, where="here")  # type: ignore[arg-type]


def test_one_line_is_one_safe_line() -> None:
    assert one_line("a\n  b\x1b[2J\ud800\tc") == "a b[2J? c"
    assert one_line("x" * 400) == "x" * 299 + "…"


@pytest.mark.parametrize(
    "doc",
    [
        """Count things.

        Carefully.

        Args:
            colour: which ones,
                by name
            most (int): where to stop: at this number

        Returns:
            how many
        """,
        """Count things.

        Carefully.

        :param colour: which ones,
            by name
        :param int most: where to stop: at this number
        :returns: how many
        """,
    ],
)
def test_both_habits_of_docstrings_are_read(doc: str) -> None:
    assert split_docstring(doc) == (
        "Count things.\n\nCarefully.",
        {"colour": "which ones, by name", "most": "where to stop: at this number"},
    )


def test_no_docstring_is_no_description() -> None:
    assert split_docstring(None) == ("", {})
