"""JSON as models write it: the strict kind is read as it is, the near kind with what was mended."""

from __future__ import annotations

import json
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt_agent.tool.lenient import Lenient, UnreadableError, read_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def attempt(text: str) -> Lenient | UnreadableError:
    try:
        return read_json(text)
    except UnreadableError as error:
        return error


@settings(max_examples=100, deadline=None)
@given(JSON, st.booleans(), st.booleans())
def test_json_is_read_as_json(value: object, ascii_only: bool, close: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    if not close and isinstance(value, int | float) and not isinstance(value, bool):
        text += " "
    found = read_json(text + " and more", close=close)
    assert found.value == value
    assert found.repairs == ()
    assert (text + " and more")[found.end :].strip() == "and more"


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_python_s_spelling_is_read(value: object) -> None:
    assert read_json(repr(value)).value == value


@settings(max_examples=100, deadline=None)
@given(st.lists(JSON, max_size=4) | st.dictionaries(st.text(), JSON, max_size=4), st.data())
def test_a_cut_text_gives_its_beginning_or_an_error(value: object, data: st.DataObject) -> None:
    text = json.dumps(value)
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    with pytest.raises(UnreadableError) as caught:
        read_json(cut, close=False)
    assert caught.value.cut
    found = attempt(cut)
    if isinstance(found, UnreadableError):
        assert found.cut
    else:
        assert type(found.value) is type(value)
        assert found.repairs == ("missing closing brackets were added",)


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("{}[]()\"'`:,.0123456789eE+-tfnTFN\\u/* \nabc_")))
def test_any_text_gives_a_value_or_one_error(text: str) -> None:
    found = attempt(text)
    if isinstance(found, UnreadableError):
        assert 0 <= found.position <= len(text)
    else:
        assert 0 <= found.end <= len(text)
        json.dumps(found.value, allow_nan=False)


@pytest.mark.parametrize(
    ("text", "value", "repair"),
    [
        ("{'a': 'it's'}", {"a": "it's"}, 'other quotes than " were taken'),
        ("{\u201ca\u201d: \u2018b\u2019}", {"a": "b"}, 'other quotes than " were taken'),
        ('{"a": [1, 2,],}', {"a": [1, 2]}, "a comma before a closing bracket was left out"),
        ("{a: 1, b-c: 2}", {"a": 1, "b-c": 2}, "a name without quotes was taken"),
        ('{"a": (1, 2)}', {"a": [1, 2]}, "a tuple was read as a list"),
        ('{"a": [True, False, None]}', {"a": [True, False, None]}, "Python's True, False and None"),
        ('{"a": 1 // one\n, "b": /* two */ 2}', {"a": 1, "b": 2}, "comments were left out"),
        ('{"a": "x\ny"}', {"a": "x\ny"}, "line breaks in a text were taken"),
        (r'{"a": "\d+"}', {"a": "d+"}, "an unknown escape"),
        ('{"a": [1, {"b": 2', {"a": [1, {"b": 2}]}, "missing closing brackets were added"),
        ('{"a": [.5, 5., +3]}', {"a": [0.5, 5.0, 3]}, None),
        (r"['\x41\u0042\U00000043\ud83d\ude00\ud800']", ["ABC\U0001f600\ufffd"], "other quotes"),
        (r"['\n\t\r\b\f\/\uzz']", ["\n\t\r\b\f/uzz"], "an unknown escape"),
    ],
)
def test_what_is_mended_is_said(text: str, value: object, repair: str | None) -> None:
    found = read_json(text)
    assert found.value == value
    if repair is not None:
        assert any(line.startswith(repair) for line in found.repairs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it ends where a value should be"),
        ("{", "its closing bracket"),
        ('{"a"', "there is no ':' behind a name"),
        ('{"a" 1}', "there is no ':' behind a name"),
        ('{"a": }', "there is '}' where a value should be"),
        ('{"a": 1 "b": 2}', "where ',' or '}' should be"),
        ('{"a": "b', "a text has no end"),
        ('{"a": "b\\', "a text has no end"),
        ("[1}", "where ',' or ']' should be"),
        ("{1: 2}", "where a name should be"),
        ("[.]", "this is no number"),
        ("[NaN]", "there is 'NaN' where a value should be"),
        ("[Infinity]", "there is 'Infinity'"),
        ("[1e999]", "a number is too large"),
        ("[" + "9" * 5000 + "]", "a number is too long"),
        ("[" * 100_000, "nested too deeply"),
        ("hello", "there is 'hello' where a value should be"),
        ("[tru", "there is 'tru'"),
        ("[1, 2", "it ends in a number, which may go on"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, message: str) -> None:
    with pytest.raises(UnreadableError, match=message):
        read_json(text, close=False)


def test_long_nonsense_takes_no_time() -> None:
    began = time.process_time()
    for text in ("{" * 50_000, "[" * 50_000, "'" * 50_000, "['" + "a' " * 20_000, "/*" * 50_000):
        with suppress(UnreadableError):
            read_json(text)
    assert time.process_time() - began < 3
