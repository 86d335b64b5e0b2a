"""Models behind a server that answers in the official client's own types."""

from __future__ import annotations

import base64
import io
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vpt_agent.agent import AnswerReady, PerceptionAgent, Question, TokenDelta
from vpt_agent.errors import ServerError, UserError
from vpt_agent.model.remote import Prices, RemoteOptions
from vpt_agent.model.remote.testing import Fail, Say, ScriptedServer
from vpt_agent.tool import Norm1000Box, PixelBox, SourceView, ToolRegistry, perception_tool
from vpt_agent.trace import Trace
from vpt_agent.trace.show import render_text
from vpt_agent.types import Limits


@perception_tool
def where(view: SourceView, box: PixelBox) -> str:
    """Tell a box."""
    return f"{view.id}: {[round(v) for v in box]}"


@perception_tool
def look(view: SourceView, box: Norm1000Box) -> list:
    """Look closer."""
    half = view.image.crop((0, 0, view.size[0] // 2, view.size[1] // 2))
    return ["closer", half]


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (160, 240, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def agent_on(server: ScriptedServer, **options: Any) -> PerceptionAgent:
    options = {"backoff": 0.01, "longest_wait": 0.05} | options
    return PerceptionAgent.from_server(
        "tiny",
        server.url,
        tools=ToolRegistry([where, look]),
        options=RemoteOptions(**options),
    )


def told(answer: Any, kind: str) -> list[Any]:
    return [e for e in answer.trace.events if e.type == kind]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_calls_results_and_the_answer(image: Image.Image, stream: bool) -> None:
    script = [
        Say(
            "Let me see.",
            [("where", {"box": [0, 0, 500, 1000]}), ("look", {"box": [0, 0, 500, 500]})],
        ),
        Say("A cat.", prompt_tokens=300, cached_tokens=100),
    ]
    with ScriptedServer(script) as server:
        agent = agent_on(server, stream=stream, prices=Prices(prompt=10, completion=20, cached=1))
        answer = agent.run("What is there?", image=image)
    assert (answer.status, answer.text) == ("answered", "A cat.")
    assert [call.name for call in answer.calls] == ["where", "look"]
    # The model writes 0 to 1000, the tool wants pixels of 240 x 160.
    assert answer.results[0].text == "image_1: [0, 0, 120, 160]"
    first, second = server.requests
    assert [t["function"]["name"] for t in first["tools"]] == ["where", "look"]
    shown = first["tools"][0]["function"]["parameters"]["properties"]["box"]
    assert "0 to 1000" in shown["description"]
    label, picture, question = first["messages"][0]["content"]
    assert (label["text"], question["text"]) == ("image_1:", "What is there?")
    data = base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])
    sent = Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(sent), np.asarray(image))
    said, one, two = second["messages"][1:]
    assert [c["id"] for c in said["tool_calls"]] == ["call_0", "call_1"]
    assert one == {"role": "tool", "tool_call_id": "call_0", "content": answer.results[0].text}
    assert two["tool_call_id"] == "call_1"
    assert [part["type"] for part in two["content"]] == ["text", "image_url", "text"]
    usage = answer.usage
    assert (usage.requests, usage.prompt_tokens, usage.cached_tokens) == (2, 400, 100)
    costs = [e.cost for e in told(answer, "request_answered")]
    assert usage.cost == pytest.approx(sum(costs))
    assert costs[1] == pytest.approx((200 * 10 + 100 * 1 + 2 * 20) / 1e6)


def test_pictures_go_to_a_user_message_where_the_server_refuses_them(image: Image.Image) -> None:
    script = [Say(calls=[("look", {"box": [0, 0, 9, 9]})]), Say("Done.")]
    with ScriptedServer(script, refuses=["images in tool messages"]) as server:
        agent = agent_on(server)
        answer = agent.run("What?", image=image)
        agent.run("And now?", image=image)
    assert answer.text == "Done."
    tool, user = server.requests[2]["messages"][-2:]
    assert (tool["role"], tool["content"]) == ("tool", "closer")
    assert user["role"] == "user"
    assert [part["type"] for part in user["content"]] == ["text", "image_url"]
    (failed,) = told(answer, "request_failed")
    assert (failed.status, failed.left_out) == (422, "pictures in messages of tools")
    assert any("pictures in messages of tools" in w for w in answer.warnings)
    # It is remembered: the second question was not refused once more.
    assert len(server.requests) == 4


def test_fields_that_a_server_does_not_know_are_left_out(image: Image.Image) -> None:
    refuses = ["stream_options", "tool_choice", "max_completion_tokens"]
    with ScriptedServer([Say("Nothing to call.")], refuses=refuses) as server:
        answer = agent_on(server).run("What?", image=image, tool_choice="where")
    last = server.requests[-1]
    assert not set(refuses) & set(last)
    assert last["max_tokens"] == Limits().new_tokens
    assert {e.left_out for e in told(answer, "request_failed")} == set(refuses)
    assert any("asked for a call, and the server's model made none" in w for w in answer.warnings)
    assert any("does not count tokens" in w for w in answer.warnings)


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        ("auto", None),
        ("none", None),
        ("required", "required"),
        ("look", {"type": "function", "function": {"name": "look"}}),
    ],
)
def test_tool_choice(image: Image.Image, choice: str, sent: Any) -> None:
    with ScriptedServer([Say("Hm.")]) as server:
        agent_on(server).run("What?", image=image, tool_choice=choice)
    assert server.requests[0].get("tool_choice") == sent
    assert ("tools" in server.requests[0]) == (choice != "none")


@pytest.mark.parametrize(
    "trouble",
    [
        Fail(429, headers={"retry-after": "0.01"}),
        Fail(500),
        Fail(503),
        Fail(0),
        Say("half an ans", broken="cut"),
        Say("half an ans", broken="garbage"),
        Say("half an ans", broken="error"),
        Say("half an ans", broken="endless"),
    ],
    ids=lambda t: str(t.status) if isinstance(t, Fail) else t.broken,
)
def test_what_may_pass_is_tried_again(image: Image.Image, trouble: Say | Fail) -> None:
    with ScriptedServer([trouble, trouble, Say("Whole.")]) as server:
        answer = agent_on(server).run("What?", image=image)
    assert (answer.status, answer.text) == ("answered", "Whole.")
    failed = told(answer, "request_failed")
    assert [e.attempt for e in failed] == [1, 2]
    assert all(e.wait > 0 for e in failed)
    assert told(answer, "request_answered")[0].attempts == 3
    assert answer.usage.requests == 3


def test_the_wait_grows_and_the_end_is_an_error(image: Image.Image) -> None:
    with ScriptedServer([Fail(500, "the engine died")]) as server:
        agent = agent_on(server, retries=2, backoff=0.02, longest_wait=1.0)
        trace = Trace()
        with pytest.raises(ServerError, match=r"did not answer.*the engine died.*3 att"):
            agent.run("What?", image=image, trace=trace)
        (answer,) = agent.run_batch([("What?", image)])
    waits = [e.wait for e in trace.events if e.type == "request_failed"]
    assert waits[-1] is None
    assert 0.015 <= waits[0] <= 0.025
    assert 0.03 <= waits[1] <= 0.05
    assert trace.events[-1].status == "failed"
    assert answer.status == "failed"
    assert "the engine died" in answer.warnings[-1]


@pytest.mark.parametrize(
    ("failure", "error", "match"),
    [
        (Fail(401, "wrong key"), UserError, "does not take this request.*401: wrong key"),
        (Fail(404, "no such model"), UserError, "does not take this request.*404"),
        (Fail(400, "bad picture"), ServerError, "refuses the request.*bad picture"),
        (Fail(400, "no tool parser"), ServerError, "calls='text'"),
    ],
)
def test_what_will_not_pass_is_an_error_at_once(
    image: Image.Image, failure: Fail, error: type[Exception], match: str
) -> None:
    with ScriptedServer([failure]) as server:
        with pytest.raises(error, match=match):
            agent_on(server).run("What?", image=image)
        assert len(server.requests) == 1


def test_a_refusal_is_an_outcome(image: Image.Image) -> None:
    with ScriptedServer([Say(refusal="I will not look at this.")]) as server:
        answer = agent_on(server).run("What?", image=image)
    assert (answer.status, answer.text) == ("refused", "I will not look at this.")
    assert told(answer, "request_answered")[0].refusal == answer.text
    assert told(answer, "run_finished")[0].status == "refused"
    with ScriptedServer([Say("Half", finish="content_filter")]) as server:
        answer = agent_on(server, stream=False).run("What?", image=image)
    assert answer.status == "refused"
    assert "content filter" in answer.text


def test_broken_and_unknown_calls_are_told_and_can_be_mended(image: Image.Image) -> None:
    script = [
        Say(calls=[("where", "{'box': [0, 0, 500, 500],}"), ("where", "no JSON"), ("nothing", {})]),
        Say("Fine."),
    ]
    with ScriptedServer(script) as server:
        answer = agent_on(server).run("What?", image=image)
    assert answer.text == "Fine."
    assert answer.results[0].ok
    assert answer.calls[0].repairs
    assert answer.results[1].error.kind == "unknown_tool"
    (rejected,) = told(answer, "tool_rejected")
    assert rejected.error.kind == "invalid_json"
    said, *results = server.requests[1]["messages"][1:]
    assert [r["tool_call_id"] for r in results] == [c["id"] for c in said["tool_calls"]]
    assert results[1]["content"].startswith("Error: ")
    # What is no object is not sent back: servers read it again, and fail.
    assert said["tool_calls"][1]["function"]["arguments"] == "{}"


@pytest.mark.parametrize("written", ["[" * 50_000, '{"box": ' * 50_000])
def test_arguments_nested_without_end_are_an_error_of_the_call(
    image: Image.Image, written: str
) -> None:
    with ScriptedServer([Say(calls=[("where", written)]), Say("Good.")]) as server:
        answer = agent_on(server).run("Where?", image)
        sent = server.requests[-1]["messages"][-2]["tool_calls"][0]["function"]["arguments"]
    assert (answer.status, answer.text) == ("answered", "Good.")
    assert sent == "{}"  # what no server could read is not sent back
    (error,) = told(answer, "tool_rejected")
    assert error.error.kind == "invalid_json"


def test_calls_in_the_words_are_found_too(image: Image.Image) -> None:
    call = '{"name": "where", "arguments": {"box": [0, 0, 1000, 1000]}}'
    text = f"So.\n<tool_call>\n{call}\n</tool_call>"
    with ScriptedServer([Say(text), Say("Good.")]) as server:
        answer = agent_on(server).run("What?", image=image)
    assert answer.results[0].text == "image_1: [0, 0, 240, 160]"
    assistant, user = server.requests[1]["messages"][1:]
    assert assistant["content"] == text
    assert user["role"] == "user"
    assert user["content"][0]["text"].startswith("<tool_response>\nimage_1")


def test_a_server_that_reads_no_calls_is_told_of_the_tools_in_words(image: Image.Image) -> None:
    text = '<tool_call>{"name": "look", "arguments": {"box": [0, 0, 9, 9]}}</tool_call>'
    with ScriptedServer([Say(text), Say("Good.")]) as server:
        answer = agent_on(server, calls="text", system="Be short.").run("What?", image=image)
    first, second = server.requests
    assert "tools" not in first
    system = first["messages"][0]["content"]
    assert system.startswith("Be short.")
    assert '"name": "look"' in system
    assert [p["type"] for p in second["messages"][-1]["content"]] == [
        "text",
        "text",
        "image_url",
        "text",
    ]
    assert answer.text == "Good."


def test_a_stream_is_heard_as_it_comes_and_can_be_stopped(image: Image.Image) -> None:
    with ScriptedServer([Say("One two three four five.")]) as server:
        items = list(agent_on(server).run_stream("What?", image=image))
        deltas = [i for i in items if isinstance(i, TokenDelta)]
        assert "".join(d.text for d in deltas) == "One two three four five."
        assert len(deltas) > 2
        assert isinstance(items[-1], AnswerReady)
    with ScriptedServer([Say("Late.", wait=5.0)]) as server:
        trace = Trace()
        stream = agent_on(server).run_stream("What?", image=image, trace=trace)
        next(stream)
        stream.close()
    assert trace.events[-1].error == "stopped by the caller"


def test_limits_are_outcomes(image: Image.Image) -> None:
    with ScriptedServer([Say("Late.", wait=5.0)]) as server:
        began = time.monotonic()
        answer = agent_on(server).run("What?", image=image, limits=Limits(seconds=0.3))
        assert time.monotonic() - began < 3
    assert (answer.status, answer.limit) == ("limit", "seconds")
    with ScriptedServer([Say("Cut of", finish="length")]) as server:
        answer = agent_on(server).run("What?", image=image, limits=Limits(new_tokens=2))
    assert (answer.status, answer.limit, answer.text) == ("limit", "new_tokens", "Cut of")
    assert server.requests[0]["max_completion_tokens"] == 2
    with ScriptedServer([Fail(400, "too much", code="context_length_exceeded")]) as server:
        answer = agent_on(server).run("What?", image=image)
    assert (answer.status, answer.limit) == ("limit", "context")
    calls = [Say(calls=[("where", {"box": [0, 0, 1, n]})]) for n in range(1, 9)]
    with ScriptedServer([*calls, Say("Enough.")]) as server:
        answer = agent_on(server).run("What?", image=image, limits=Limits(calls=2, rounds=9))
    assert len([r for r in answer.results if r.ok]) == 2
    assert server.requests[-1]["tool_choice"] == "none"


def test_a_conversation_goes_on_and_a_failed_question_is_taken_back(image: Image.Image) -> None:
    script = [Say("A cat."), Fail(401), Say("Black.")]
    with ScriptedServer(script) as server:
        chat = agent_on(server).conversation(image)
        assert chat.ask("What?").text == "A cat."
        with pytest.raises(UserError):
            chat.ask("What colour?")
        assert chat.ask("Which colour?").text == "Black."
    roles = [m["role"] for m in server.requests[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert server.requests[-1]["messages"][-1]["content"] == "Which colour?"


def test_an_experiment_on_a_server_is_refused(image: Image.Image) -> None:
    class Change:
        name = "no crops"

    with ScriptedServer([Say("Yes.")]) as server:
        question = Question("What?", image, intervention=Change())
        (answer,) = agent_on(server).run_batch([question])
    assert answer.status == "failed"
    assert "a server's cannot be changed" in answer.warnings[-1]


def test_a_batch_asks_at_the_same_time(image: Image.Image) -> None:
    together = threading.Barrier(3, timeout=20)

    class Meeting(ScriptedServer):
        def answer(self, body: dict[str, Any], key: str) -> Say | Fail:
            together.wait()
            return super().answer(body, key)

    with Meeting([Say("Here.")]) as server:
        answers = agent_on(server).run_batch([("What?", image)] * 3)
    assert [a.text for a in answers] == ["Here."] * 3


def test_large_pictures_are_sent_smaller_and_boxes_come_back_right() -> None:
    large = Image.new("RGB", (1200, 600))
    script = [Say(calls=[("where", {"box": [0, 0, 150, 150]})]), Say("Yes.")]
    with ScriptedServer(script) as server:
        agent = agent_on(server, longest=300, coordinates="shown", image_format="jpeg")
        answer = agent.run("What?", image=large)
    url = server.requests[0]["messages"][0]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (300, 150)
    assert server.requests[0]["messages"][0]["content"][0]["text"] == "image_1 (300 x 150 pixels):"
    assert answer.results[0].text == "image_1: [0, 0, 600, 600]"


def test_the_trace_tells_all_and_reads_back(image: Image.Image, tmp_path: Path) -> None:
    script = [Fail(500), Say("Hm.", [("where", {"box": [0, 0, 9, 9]})]), Say("Yes.")]
    with ScriptedServer(script) as server:
        answer = agent_on(server).run("What?", image=image, trace=tmp_path / "run")
    assert [e.type for e in answer.trace.events] == [
        "run_started",
        "prompt_rendered",
        "request_failed",
        "request_answered",
        "decoded",
        "tool_called",
        "tool_finished",
        "perception_appended",
        "request_answered",
        "decoded",
        "run_finished",
    ]
    again = Trace.read(tmp_path / "run")
    assert again.events == answer.trace.events
    text = str(render_text(again))
    assert "attempt 1: InternalServerError 500" in text
    page = tmp_path / "run.html"
    again.to_html(page)
    assert "InternalServerError" in page.read_text()
