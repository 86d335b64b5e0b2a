"""Arguments are brought to their schema's types where there is one reading, and left otherwise."""

from __future__ import annotations

import time

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt_agent.tool.fit import fit

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "yes": {"type": "boolean"},
        "label": {"type": "string"},
        "names": {"type": "array", "items": {"type": "string"}},
        "box": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4},
        "boxes": {
            "anyOf": [
                {"$ref": "#/$defs/box"},
                {"type": "array", "items": {"$ref": "#/$defs/box"}},
            ]
        },
        "where": {"type": "object", "properties": {"deep": {"type": "integer"}}},
        "source": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "grid": {"enum": [4, 8, 16]},
        "mode": {"enum": ["fast", "Exact"]},
        "pair": {"prefixItems": [{"type": "integer"}, {"type": "string"}], "type": "array"},
        "either": {"type": ["integer", "null"]},
    },
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {
        "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
    },
}


@pytest.mark.parametrize(
    ("name", "given_value", "wanted"),
    [
        ("n", "12", 12),
        ("n", " -3 ", -3),
        ("n", 3.0, 3),
        ("n", "3.0", 3),
        ("x", "1.5", 1.5),
        ("x", "1e2", 100.0),
        ("yes", "true", True),
        ("yes", " False", False),
        ("label", 5, "5"),
        ("names", "one", ["one"]),
        ("names", '["a", "b"]', ["a", "b"]),
        ("box", "1, 2, 3, 4", [1, 2, 3, 4]),
        ("box", "(1, 2, 3, 4)", [1, 2, 3, 4]),
        ("box", ["1", 2.0, "3", 4], [1, 2, 3, 4]),
        ("boxes", ["1", "2", "3", "4"], [1, 2, 3, 4]),
        ("boxes", [["1", 2, 3, 4]], [[1, 2, 3, 4]]),
        ("where", '{"deep": "7"}', {"deep": 7}),
        ("grid", 8.0, 8),
        ("grid", "8", 8),
        ("mode", "exact", "Exact"),
        ("pair", ["1", 2], [1, "2"]),
        ("either", "4", 4),
        ("either", "null", None),
    ],
)
def test_what_has_one_reading_is_read(name: str, given_value: object, wanted: object) -> None:
    fitted, repairs = fit({name: given_value}, SCHEMA)  # type: ignore[dict-item]
    assert fitted == {name: wanted}
    assert type(fitted[name]) is type(wanted)
    assert repairs
    assert all(line.startswith(name) for line in repairs)


@pytest.mark.parametrize(
    "values",
    [
        {"n": 3, "x": 2, "yes": True, "label": "12", "names": [], "box": [1, 2, 3, 4]},
        {"boxes": [1, 2, 3, 4]},
        {"boxes": [[1, 2, 3, 4]]},
        {"source": "12"},
        {"source": None},
        {"n": "3.5"},
        {"n": 3.5},
        {"n": True},
        {"n": "three"},
        {"n": "9" * 500},
        {"x": "1e999"},
        {"yes": 1},
        {"label": ["a"]},
        {"box": "1; 2; 3"},
        {"box": "[1, 2"},
        {"box": [1, 2, 3]},
        {"grid": 5},
        {"mode": None, "n": None},
        {"unknown": "12"},
        {"where": "no object"},
    ],
)
def test_what_is_right_or_has_no_reading_is_left(values: dict) -> None:
    fitted, repairs = fit(values, SCHEMA)
    expected = {k: v for k, v in values.items() if not (v is None and k == "mode")}
    assert fitted == expected
    assert [r for r in repairs if "null was left out" not in r] == []


def test_null_stands_for_left_out_where_that_is_allowed() -> None:
    fitted, repairs = fit({"n": None, "label": None, "source": None}, SCHEMA)
    assert fitted == {"n": None, "source": None}
    assert repairs == ["label: null was left out"]


def test_a_change_is_said_in_one_short_line() -> None:
    _, repairs = fit({"n": "12", "names": "x\n" * 300}, SCHEMA)
    assert repairs[0] == "n: '12' was read as 12"
    assert all(len(line) < 200 and "\n" not in line for line in repairs)


def test_schemas_that_lead_nowhere_end() -> None:
    circle = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    assert fit({"n": 1}, circle) == ({"n": 1}, [])
    assert fit({"n": "1"}, {"properties": {"n": {"$ref": "#/$defs/gone"}}, "type": "object"}) == (
        {"n": "1"},
        [],
    )
    wide = {
        "type": "object",
        "properties": {"v": {"$ref": "#/$defs/v"}},
        "$defs": {"v": {"anyOf": [
            {"type": "array", "items": {"$ref": "#/$defs/v"}},
            {"type": "object", "additionalProperties": {"$ref": "#/$defs/v"}},
            {"type": "integer"},
        ]}},
    }  # fmt: skip
    value: object = "1"
    for _ in range(12):
        value = {"a": value, "b": value}
    began = time.process_time()
    assert fit({"v": value}, wide) == ({"v": value}, [])  # type: ignore[dict-item]
    assert time.process_time() - began < 2


LEAF = {
    "integer": st.integers(-1000, 1000),
    "number": st.integers(-1000, 1000) | st.floats(-1e6, 1e6, allow_nan=False),
    "boolean": st.booleans(),
    "string": st.text(max_size=8),
}
PLAIN = st.sampled_from(sorted(LEAF)).map(lambda name: {"type": name})


@st.composite
def schema_and_value(draw: st.DrawFn) -> tuple[dict, dict]:
    """A schema, and arguments that are right for it."""
    properties, values = {}, {}
    for name in draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=5)):
        leaf = draw(PLAIN)
        if draw(st.booleans()):
            properties[name] = leaf
            values[name] = draw(LEAF[leaf["type"]])
        else:
            properties[name] = {"type": "array", "items": leaf}
            values[name] = draw(st.lists(LEAF[leaf["type"]], max_size=4))
    return {"type": "object", "properties": properties, "required": list(values)}, values


@settings(max_examples=100, deadline=None)
@given(schema_and_value())
def test_right_arguments_are_never_touched(case: tuple[dict, dict]) -> None:
    schema, values = case
    jsonschema.validate(values, schema)
    assert fit(values, schema) == (values, [])


@settings(max_examples=100, deadline=None)
@given(schema_and_value(), st.data())
def test_arguments_written_as_text_come_back(case: tuple[dict, dict], data: st.DataObject) -> None:
    schema, values = case
    said = {
        name: str(value).lower() if isinstance(value, bool) else repr(value)
        if isinstance(value, int | float | list) else value
        for name, value in values.items()
    }  # fmt: skip
    fitted, _ = fit(said, schema)
    for name, value in values.items():
        if isinstance(value, list) and len(repr(value)) >= 400:
            continue
        assert fitted[name] == value
    jsonschema.validate(fitted, schema)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*SCHEMA["properties"], "other"]), JSON))  # type: ignore[misc]
def test_anything_at_all_is_taken(values: dict) -> None:
    fitted, repairs = fit(values, SCHEMA)
    assert set(fitted) <= set(values)
    if repr(fitted) != repr(values):
        assert repairs
