"""Calls in text are found however they are spelled; nothing a model writes raises."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt_agent.tool.written import (
    MOST_CALLS,
    WrittenCall,
    WrittenError,
    read_arguments,
    read_calls,
    settled,
)

BOX = {"box": [1, 2, 3, 4]}
PLAIN = '{"name": "crop", "arguments": {"box": [1, 2, 3, 4]}}'
PARAMETERS = "<parameter=box>\n[1, 2, 3, 4]\n</parameter>"


def meant(text: str, *, cut: bool = False) -> list[tuple[str, dict]]:
    return [(call.name, dict(call.arguments)) for call in read_calls(text, cut=cut).calls]


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{PLAIN}\n</tool_call>",
        f"<tool_call>{PLAIN}",
        f"< Tool_Call >{PLAIN}</ tool_call >",
        f"<function_call>{PLAIN}</function_call>",
        f"<tool_call>```json\n{PLAIN}\n```</tool_call>",
        f"```json\n{PLAIN}\n```",
        f"```\n[{PLAIN}]\n```",
        f"```{PLAIN}",
        PLAIN,
        f"[{PLAIN}]",
        "<tool_call>{'name': 'crop', 'arguments': {'box': [1, 2, 3, 4,],},}</tool_call>",
        '<tool_call>{name: "crop", arguments: {box: (1, 2, 3, 4)}}</tool_call>',
        '<tool_call>{"name": "crop", "arguments": {"box": [1, 2, 3, 4',
        '<tool_call>{"name": "crop", "box": [1, 2, 3, 4]}</tool_call>',
        '<tool_call>{"name": "crop", "parameters": {"box": [1, 2, 3, 4]}}</tool_call>',
        '<tool_call>{"tool": "crop", "args": {"box": [1, 2, 3, 4]}}</tool_call>',
        r'{"name": "crop", "arguments": "{\"box\": [1, 2, 3, 4]}"}',
        r'{"id": "x", "type": "function", "function": {"name": "crop", "arguments": '
        r'"{\"box\": [1, 2, 3, 4]}"}}',
        f'{{"tool_calls": [{PLAIN}]}}',
        f"<think>I could <tool_call>{{}}</tool_call></think><tool_call>{PLAIN}</tool_call>",
    ],
)
@pytest.mark.parametrize("around", [("", ""), ("Let me look. ", "\nThen I will answer.")])
def test_every_spelling_means_the_same(text: str, around: tuple[str, str]) -> None:
    if text.endswith("4") and around[1]:
        text += "]}}"  # cut by a stop: nothing follows it
    assert meant(around[0] + text + around[1]) == [("crop", BOX)]


def test_what_is_said_around_the_calls_is_kept() -> None:
    text = f" First. <tool_call>{PLAIN}</tool_call>\n\nThen.\n```json\n{PLAIN}\n``` Last. "
    found = read_calls(text)
    assert found.text == "First.\nThen.\nLast."
    assert len(found.calls) == 2
    assert found.calls[0].text == PLAIN
    assert found.errors == ()


def test_several_calls_at_once() -> None:
    a, b, c = (json.dumps({"name": name, "arguments": {}}) for name in "abc")
    for text in (
        f"<tool_call>{a}</tool_call><tool_call>{b}</tool_call><tool_call>{c}</tool_call>",
        f"<tool_call>{a}<tool_call>{b}<tool_call>{c}",
        f"<tool_call>{a}\n{b};{c}</tool_call>",
        f"<tool_call>[{a}, {b}, {c}]</tool_call>",
        f"[{a}, {b}, {c}]",
        f"{a}\n{b} and {c}",
        f'{{"tool_calls": [{a}, {b}, {c}]}}',
    ):
        assert [name for name, _ in meant(text)] == ["a", "b", "c"], text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No call at all.",
        "  spaces stay  ",
        "5 < 6 and {x} and [y] and `z`",
        'The part is {"name": "bolt", "price": 3}.',
        '```json\n{"name": "bolt", "arguments": [1]}\n```',
        "```python\nprint({'name': 'x'})\n```",
        '{"name": 5, "arguments": {}}',
        '{"arguments": {}}',
        '[{"name": "a", "arguments": {}}, 5',
        f"<think>still thinking <tool_call>{PLAIN}</tool_call>",
        f"<think><tool_call>{PLAIN}</tool_call></think>No.",
    ],
)
def test_what_is_no_call_is_left_alone(text: str) -> None:
    found = read_calls(text)
    assert (found.text, found.items) == (text, ())


@pytest.mark.parametrize(
    ("inside", "kind", "message"),
    [
        ("crop the tag", "invalid_json", "the call is no JSON: there is 'crop' where a value"),
        ("", "invalid_json", "the call is empty"),
        ("[]", "invalid_json", "the call is empty"),
        ('{"arguments": {}}', "invalid_json", "this has no name"),
        ('{"name": ""}', "invalid_json", "this has no name"),
        ("[1, 2]", "invalid_json", "this has no name"),
        ('{"name": "a", "arguments": [1]}', "invalid_arguments", "no object with names and values"),
        ('{"name": "a", "arguments": "{x"}', "invalid_json", "the call is cut off"),
        ('{"name": "a", "arguments": "x"}', "invalid_json", "the call is no JSON"),
    ],
)
def test_a_tag_around_something_else_is_one_error(inside: str, kind: str, message: str) -> None:
    found = read_calls(f"So: <tool_call>{inside}</tool_call> done")
    assert found.text == "So:\ndone"
    error = found.errors[0]
    assert isinstance(error, WrittenError)
    assert error.kind == kind
    assert message in error.message
    assert "\n" not in error.message


def test_a_cut_call_is_taken_only_if_it_is_complete() -> None:
    for length in range(len("<tool_call>"), len(f"<tool_call>{PLAIN}") + 1):
        text = f"<tool_call>{PLAIN}"[:length]
        found = read_calls(text, cut=True)
        if length == len(f"<tool_call>{PLAIN}"):
            assert meant(text, cut=True) == [("crop", BOX)]
        else:
            assert [e.message for e in found.errors] == ["the call is cut off"], text
            assert found.calls == ()


def test_a_call_that_the_model_ended_itself_gets_its_brackets() -> None:
    found = read_calls('<tool_call>{"name": "crop", "arguments": {"box": [1, 2, 3, 40')
    assert found.calls[0].arguments == {"box": [1, 2, 3, 40]}
    assert found.calls[0].repairs == ("missing closing brackets were added",)
    half = read_calls('<tool_call>{"name": "crop", "arguments": {"label": "the re')
    assert [e.message for e in half.errors] == ["the call is cut off"]


def test_the_form_of_coder_models() -> None:
    text = f"<tool_call>\n<function=crop>\n{PARAMETERS}\n<parameter=label>\nthe tag\n</parameter>\n"
    whole = read_calls(text + "</function>\n</tool_call>")
    assert meant(text + "</function>\n</tool_call>") == [
        ("crop", {"box": "[1, 2, 3, 4]", "label": "the tag"})
    ]
    assert whole.text == ""
    assert meant(text) == meant(text + "</function>")
    assert [e.message for e in read_calls(text, cut=True).errors] == ["the call is cut off"]
    assert meant("<tool_call><function=now></function></tool_call>") == [("now", {})]


def test_a_tag_inside_a_text_is_part_of_it() -> None:
    text = (
        '<tool_call>{"name": "say", "arguments": {"text": "</tool_call><tool_call>"}}</tool_call>'
    )
    assert meant(text) == [("say", {"text": "</tool_call><tool_call>"})]


def test_the_number_of_calls_is_bounded() -> None:
    one = '<tool_call>{"name": "a"}</tool_call>'
    found = read_calls(one * (MOST_CALLS + 5))
    assert len(found.calls) == MOST_CALLS
    assert [e.kind for e in found.errors] == ["limit"]
    assert f"at most {MOST_CALLS} calls" in found.errors[0].message
    many = f"<tool_call>[{', '.join([PLAIN] * 500)}]</tool_call>"
    assert len(read_calls(many).items) <= MOST_CALLS + 1


def test_arguments_that_come_apart_from_the_name() -> None:
    made = read_arguments("{'box': [1, 2, 3, 4],}")
    assert isinstance(made, WrittenCall)
    assert made.arguments == BOX
    assert len(made.repairs) == 2
    assert read_arguments("  ").arguments == {}  # type: ignore[union-attr]
    assert read_arguments("null").arguments == {}  # type: ignore[union-attr]
    for text, kind, message in (
        ("[1]", "invalid_arguments", "no object"),
        ("{} and more", "invalid_json", "'and more' follows them"),
        ("{", "invalid_json", "cut off"),
        ("box", "invalid_json", "no JSON"),
    ):
        error = read_arguments(text, cut=True)
        assert isinstance(error, WrittenError)
        assert (error.kind, message in error.message) == (kind, True)


def test_a_call_goes_on_with_what_was_mended() -> None:
    (made,) = read_calls("<tool_call>{'name': 'crop'}</tool_call>").calls
    call = made.as_call("c1")
    assert (call.id, call.name, call.origin) == ("c1", "crop", "json")
    assert call.repairs == ('other quotes than " were taken',)
    (openai,) = read_calls('{"id": "x7", "function": {"name": "a", "arguments": ""}}').calls
    assert openai.id == "x7"


NAMES = st.text(st.sampled_from("abcxyz_019"), min_size=1, max_size=8)
VALUES = st.dictionaries(
    st.text(max_size=6),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | st.text(max_size=12),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
        ),
        max_leaves=8,
    ),
    max_size=4,
)
CALLS = st.lists(st.tuples(NAMES, VALUES), min_size=1, max_size=4)
SAID = st.text(st.sampled_from("abcXYZ019 .,!?äß漢\n"), max_size=30)


@settings(max_examples=100, deadline=None)
@given(CALLS, SAID, SAID, st.sampled_from(["tag", "open", "fence", "bare", "python"]))
def test_calls_come_back(calls: list[tuple[str, dict]], before: str, after: str, how: str) -> None:
    written = []
    for name, values in calls:
        value = {"name": name, "arguments": values}
        text = repr(value) if how == "python" else json.dumps(value)
        written.append(
            {"fence": f"```json\n{text}\n```", "bare": text, "open": f"<tool_call>{text}"}.get(
                how, f"<tool_call>\n{text}\n</tool_call>"
            )
        )
    found = read_calls(before + " " + "\n".join(written) + ("" if how == "open" else " " + after))
    assert [(c.name, dict(c.arguments)) for c in found.calls] == calls
    assert found.errors == ()
    said = [before.strip(), "" if how == "open" else after.strip()]
    assert found.text == "\n".join(s for s in said if s)


PIECES = st.sampled_from([
    "<tool_call>", "</tool_call>", "```", "```json\n", "{", "}", "[", "]", '"', "'", ",", ":",
    '"name"', '"arguments"', '"crop"', "<function=", "<parameter=a>", ">", "</function>", "<think>",
    "</think>", "\n", " ", "\\", "1", "tru", "<", "\ud800", PLAIN, '{"name": ', "\u201c",
])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join) | st.text(), st.booleans())
def test_anything_is_read_without_an_exception(text: str, cut: bool) -> None:
    found = read_calls(text, cut=cut)
    assert len(found.items) <= MOST_CALLS + 1
    if not found.items:
        assert found.text == text
    for call in found.calls:
        assert call.name
        json.dumps(dict(call.arguments), allow_nan=False)
    for error in found.errors:
        assert error.kind in ("invalid_json", "invalid_arguments", "limit")
        assert len(error.message) < 300
    read_arguments(text, cut=cut)


@settings(max_examples=100, deadline=None)
@given(SAID, st.sampled_from([f"<tool_call>{PLAIN}", f"```json\n{PLAIN}", PLAIN, f"[{PLAIN}"]))
def test_what_a_stream_has_shown_is_never_part_of_a_call(said: str, call: str) -> None:
    shown = 0
    for end in range(len(said + call) + 1):
        now = settled((said + call)[:end])
        assert now >= min(shown, now)
        shown = max(shown, now)
        assert shown <= len(said), "a piece of the call was shown"
    assert settled(said) == len(said)


def test_long_nonsense_takes_no_time() -> None:
    began = time.process_time()
    for piece in ("{", " ", "[ ", "<tool_call>", '{"name": "', "{'name': '", "```", "<", "<think>",
                  "<tool_call><function=a><parameter=b>", '{"name":{"name":'):  # fmt: skip
        read_calls(piece * (40_000 // len(piece)))
    assert time.process_time() - began < 8
