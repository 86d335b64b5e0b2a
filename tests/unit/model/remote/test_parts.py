"""What a server is told and what it says: options, messages, answers of every shape."""

from __future__ import annotations

import sys
from types import SimpleNamespace as Object
from typing import Any

import pytest

from vpt_agent.agent import PerceptionAgent
from vpt_agent.agent.state import Conversation
from vpt_agent.errors import InternalError, MissingExtraError, TraceError, UserError
from vpt_agent.model.remote import Prices, RemoteOptions
from vpt_agent.model.remote.client import Remote
from vpt_agent.model.remote.completion import BrokenAnswerError, streamed, whole
from vpt_agent.model.remote.elsewhere import Elsewhere
from vpt_agent.model.remote.messages import (
    Answered,
    Given,
    NativeCall,
    Picture,
    Results,
    Said,
    as_messages,
    readable,
)
from vpt_agent.model.remote.testing import Say, ScriptedServer, completion, lines
from vpt_agent.review.replay import replay
from vpt_agent.tool import ToolRegistry

PICTURE = Picture("crop", "crop", "data:image/png;base64,AA==", (3, 2))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"coordinates": "inches"}, "unknown frame"),
        ({"calls": "xml"}, r"unknown option of a server.*calls.*native, text"),
        ({"tool_images": "never"}, r"tool_images.*auto, tool, user"),
        ({"image_format": "gif"}, r"image_format.*png, jpeg"),
        ({"token_limit": "tokens"}, "token_limit"),
        ({"longest": 3}, r"out of range.*longest.*28 or more"),
        ({"timeout": 0}, "out of range.*timeout"),
        ({"retries": -1}, "out of range.*retries"),
        ({"backoff": float("nan")}, "out of range.*backoff"),
        ({"context": 0}, "out of range.*context"),
    ],
)
def test_options_are_checked(values: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        RemoteOptions(**values)


def test_prices() -> None:
    assert Prices(prompt=3, completion=10).cost(1_000_000, 100_000) == 4.0
    assert Prices(prompt=2, completion=0, cached=1).cost(1_000_000, 0, 500_000) == 1.5
    with pytest.raises(UserError, match=r"a price is a number.*cached.*-1"):
        Prices(prompt=1, completion=1, cached=-1)


def test_a_server_needs_a_name_a_key_and_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="needs the name of its model"):
        Remote("")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"needs a key.*OPENAI_API_KEY.*base_url"):
        Remote("m")
    with ScriptedServer([Say("Yes.")]) as server:
        PerceptionAgent.from_server("m", server.url, tools=ToolRegistry()).run("?")
        PerceptionAgent.from_server("m", server.url, "secret", tools=ToolRegistry()).run("?")
    assert server.keys == ["Bearer none", "Bearer secret"]
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingExtraError, match=r"vpt-agent\[openai\]"):
        Remote("m", base_url="http://127.0.0.1:1/v1")


def test_an_own_client_is_used() -> None:
    said = Object(
        choices=[Object(message=Object(content="Hi."), finish_reason="stop")], usage=None, model="x"
    )
    bodies: list[dict[str, Any]] = []

    def create(**body: Any) -> Any:
        bodies.append(body)
        return said

    client = Object(chat=Object(completions=Object(create=create)))
    options = RemoteOptions(stream=False, extra={"top_k": 1}, context=500)
    agent = PerceptionAgent.from_server("m", client=client, tools=ToolRegistry(), options=options)
    answer = agent.run("?", temperature=0.5, top_p=0.9, top_k=3, seed=4)
    assert answer.text == "Hi."
    assert bodies[0]["extra_body"] == {"top_k": 1}
    assert (bodies[0]["temperature"], bodies[0]["top_p"], bodies[0]["seed"]) == (0.5, 0.9, 4)
    assert any("top_k is no part of the protocol" in w for w in answer.warnings)
    assert any("does not count tokens" in w for w in answer.warnings)


def test_messages_of_a_conversation() -> None:
    entries = (
        Said("What?", (PICTURE,)),
        Answered("", (NativeCall("a", "look", '{"x": 1}'), NativeCall("b", "look", "[1]"))),
        Results((Given("a", "closer", (PICTURE,)), Given("b", ""))),
        Answered("So <tool_call>"),
        Results((Given(None, "written", (PICTURE,)),)),
        Answered(""),
    )
    url = {"type": "image_url", "image_url": {"url": PICTURE.url}}
    label = {"type": "text", "text": "crop:"}
    first = {"role": "system", "content": "Short."}
    messages = as_messages(entries, system="Short.", images="tool")
    assert messages[:2] == [
        first,
        {"role": "user", "content": [label, url, {"type": "text", "text": "What?"}]},
    ]
    assert [c["function"]["arguments"] for c in messages[2]["tool_calls"]] == ['{"x": 1}', "{}"]
    assert messages[2]["content"] is None
    assert messages[3]["content"] == [label, url, {"type": "text", "text": "closer"}]
    assert messages[4] == {"role": "tool", "tool_call_id": "b", "content": "Done."}
    texts = [p.get("text") for p in messages[6]["content"]]
    assert texts == ["<tool_response>\nwritten", "crop:", None, "</tool_response>"]
    assert messages[7] == {"role": "assistant", "content": ""}
    behind = as_messages(entries, system=None, images="user")
    assert behind[2] == {"role": "tool", "tool_call_id": "a", "content": "closer"}
    assert behind[4] == {"role": "user", "content": [label, url]}
    assert readable(entries[0]) == "[crop: 3 x 2]\nWhat?"
    assert readable(entries[1]) == 'look({"x": 1})\nlook([1])'
    assert readable(entries[2]) == "[crop: 3 x 2]\ncloser\n"


def test_a_picture_without_words_is_named() -> None:
    silent = (Results((Given("a", "", (PICTURE,)),)),)
    (tool, _) = as_messages(silent, system=None, images="user")
    assert tool["content"] == "Shown in the next message: crop"


@pytest.mark.parametrize(
    "broken",
    [Object(), Object(choices=None), Object(choices=[]), Object(choices=[Object(message=None)])],
)
def test_answers_that_are_none(broken: Any) -> None:
    with pytest.raises(BrokenAnswerError, match="the answer has no"):
        whole(broken)


def test_odd_but_readable_answers() -> None:
    parts = [{"text": "a"}, Object(text="b"), {"image": 1}, 3]
    call = Object(id=None, function=Object(name="f", arguments=None))
    message = Object(content=parts, tool_calls=[call, Object()], refusal=None, reasoning="hm")
    usage = Object(prompt_tokens=-1, completion_tokens=True, cost=0.25)
    said = whole(Object(choices=[Object(message=message)], usage=usage, model=None, id=None))
    assert (said.text, said.reasoning, said.finish) == ("ab", "hm", "stop")
    assert said.calls == (NativeCall("call_0", "f", ""), NativeCall("call_1", "", ""))
    assert (said.tokens.prompt, said.tokens.completion, said.tokens.cost) == (None, None, 0.25)


def test_pieces_of_a_stream_are_put_together() -> None:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    step = Say("Let me see.", [("look", {"box": [1, 2]}), ("clock", {})], reasoning="Hm.")
    heard: list[str] = []
    chunks = [
        ChatCompletionChunk.model_validate_json(line)
        for line in lines(step, "m", counted=True)
        if line != "[DONE]"
    ]
    told = streamed(iter(chunks), heard.append)
    at_once = whole(ChatCompletion.model_validate_json(completion(step, "m")))
    assert told == at_once
    assert "".join(heard) == told.text == "Let me see."
    assert len(heard) == 2
    with pytest.raises(BrokenAnswerError, match="ended before the answer did"):
        streamed(iter(chunks[:-2]), heard.append)
    with pytest.raises(BrokenAnswerError, match="ended before"):
        streamed(iter([Object(), Object(choices=3)]), heard.append)


def test_what_only_we_can_do_wrong() -> None:
    with pytest.raises(InternalError, match="this model is on another machine"):
        Elsewhere().compute_logits(None)
    with pytest.raises(InternalError, match="this conversation has no session"):
        Conversation().require_session()
    with pytest.raises(UserError, match="a script needs at least one answer"):
        ScriptedServer([])


def test_a_server_s_answers_are_not_replayed() -> None:
    with ScriptedServer([Say("Yes.")]) as server:
        agent = PerceptionAgent.from_server("m", server.url, tools=ToolRegistry())
        answer = agent.run("?")
        with pytest.raises(TraceError, match=r"cannot be computed again here.*answers of m"):
            replay(answer.trace, agent)
