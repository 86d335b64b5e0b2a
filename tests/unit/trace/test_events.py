"""Events hold whatever a model can emit, and read back equal."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vpt_agent.trace import (
    Decoded,
    ErrorInfo,
    RunFinished,
    SpanInfo,
    ToolCalled,
    ToolFinished,
    ToolRejected,
    read_event,
    span_infos,
)
from vpt_agent.trace.events import jsonable
from vpt_agent.types import CallError, Span

ANY_TEXT = st.text(st.characters(exclude_categories=()))  # halves of surrogate pairs included
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(name=ANY_TEXT, arguments=st.dictionaries(ANY_TEXT, ANY_JSON, max_size=4))
def test_a_call_with_anything_in_it_reads_back_equal(name: str, arguments: object) -> None:
    event = ToolCalled(run="r", call_id="c", name=name, arguments=arguments, origin="json")
    assert read_event(event.model_dump_json().encode()) == event


@settings(max_examples=100, deadline=None)
@given(text=ANY_TEXT, logprob=st.floats(allow_nan=False))
def test_text_and_infinite_numbers_read_back_equal(text: str, logprob: float) -> None:
    span = SpanInfo(source="sampled", ids=(1,), logprobs=(logprob,), text=text)
    event = Decoded(run="r", spans=(span,))
    assert read_event(event.model_dump_json().encode()) == event


@pytest.mark.parametrize("depth", [10, 100, 900])
def test_deep_arguments_are_cut_not_fatal(depth: int) -> None:
    value: object = 1
    for _ in range(depth):
        value = [value]
    event = ToolCalled(run="r", call_id="c", name="t", arguments={"a": value}, origin="json")
    assert read_event(event.model_dump_json().encode()) == event
    assert ("nested too deeply" in event.model_dump_json()) == (depth > 64)


def test_what_json_lacks_becomes_text() -> None:
    assert jsonable({1: (math.inf, {"b", "a"}, 10**400)}) == {
        "1": ["inf", ["a", "b"], hex(10**400)]
    }
    result = ToolFinished(
        run="r", call_id="c", name="t", ok=True, metadata={"object": ErrorInfo}, structured=(1, 2)
    )
    assert result.structured == [1, 2]
    assert read_event(result.model_dump_json().encode()) == result


def test_the_type_decides_and_events_are_frozen() -> None:
    event = RunFinished(run="r", status="answered", text="yes")
    assert isinstance(read_event(event.model_dump_json().encode()), RunFinished)
    with pytest.raises(ValidationError, match="frozen"):
        event.text = "no"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        read_event(b'{"type": "warning", "message": "m", "colour": 1}')
    with pytest.raises(ValidationError, match="does not match any of the expected tags"):
        read_event(b'{"type": "guess"}')


def test_parts_are_made_from_the_values_of_types() -> None:
    span = Span("sampled", (1, 2), view="v", kind="region", call_id="c", logprobs=(-1.0, -2.0))
    assert span_infos([span])[0].to_span() == span
    error = ErrorInfo.of(CallError("timeout", "too slow", "detail"))
    rejected = ToolRejected(run="r", error=error)
    assert rejected.error.kind == "timeout"
    assert rejected.error.detail == "detail"
