"""An agent whose device runs ahead answers as one whose host chooses every token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from vpt_agent.agent import AnswerReady, PerceptionAgent, Question, TokenDelta
from vpt_agent.model import add_perception_kind, mark_trained
from vpt_agent.model.testing import tiny_model
from vpt_agent.tokens import own_kind
from vpt_agent.tool import perception_tool
from vpt_agent.trace import Decoded
from vpt_agent.types import Answer, Limits

PRICE = own_kind("price", payload="text", pattern=r"[A-Z]\d{1,2}", argument="key")
CHOICES = ("crop_region", "reencode_clip", "reencode_dino", "price", "auto", "none")
LIMITS = Limits(new_tokens=60, calls=4)
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 5}


@perception_tool
def price(key: str) -> str:
    """Say what a part costs."""
    return f"{key} costs 41"


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (56, 84, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def agents() -> dict[str, PerceptionAgent]:
    model, processor = tiny_model(encoders=("clip", "dino"), seed=1)
    add_perception_kind(model, processor, PRICE, tool=price)
    mark_trained(model, ["price"])
    make = PerceptionAgent.from_model
    return {
        "host": make(model, processor.tokenizer, [price], decoding="host"),
        "device": make(model, processor.tokenizer, [price], decoding="device"),
    }


def told(answer: Answer) -> list[Any]:
    """What an answer's trace tells, but for its clock."""
    calls = [(c.name, dict(c.arguments), c.origin, c.tokens) for c in answer.calls]
    return [answer.text, answer.status, answer.trace.record().ids, calls, answer.warnings]


def turns(answer: Answer) -> list[Decoded]:
    return [e for e in answer.trace.events if isinstance(e, Decoded)]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_both_ways_tell_the_same(
    agents: dict[str, PerceptionAgent], choice: str, sampling: dict[str, Any]
) -> None:
    answers = {
        way: agent.run("What is it?", picture(1), tool_choice=choice, limits=LIMITS, **sampling)
        for way, agent in agents.items()
    }
    assert told(answers["device"]) == told(answers["host"])
    assert answers["device"].calls or choice in ("auto", "none")
    events = turns(answers["device"])
    assert sum(e.ahead for e in events) > 0.8 * sum(len(e.removed_mass) for e in events)
    assert not any(e.ahead for e in turns(answers["host"]))


def test_a_batch_and_a_later_question(agents: dict[str, PerceptionAgent]) -> None:
    questions = [
        Question(f"What is it, {i}?", picture(i), tool_choice=choice, seed=i)
        for i, choice in enumerate(CHOICES)
    ]
    batches = {
        way: agent.run_batch(questions, limits=LIMITS, temperature=1.0)
        for way, agent in agents.items()
    }
    for ours, theirs in zip(batches["device"], batches["host"], strict=True):
        assert told(ours) == told(theirs)
    talks = {}
    for way, agent in agents.items():
        talk = agent.conversation(picture(2))
        first = talk.ask("What is it?", tool_choice="reencode_clip", limits=LIMITS, **SAMPLED)
        talks[way] = [told(first), told(talk.ask("And where?", limits=LIMITS, **SAMPLED))]
        talk.close()
    assert talks["device"] == talks["host"]


def test_a_stream_tells_every_token(agents: dict[str, PerceptionAgent]) -> None:
    heard: dict[str, list[Any]] = {}
    for way, agent in agents.items():
        stream = agent.run_stream(
            "What is it?", picture(1), tool_choice="crop_region", limits=LIMITS
        )
        heard[way] = [i for i in stream if isinstance(i, TokenDelta | AnswerReady)]
        assert isinstance(heard[way].pop(), AnswerReady)
    assert heard["device"] == heard["host"]


def test_a_stream_that_is_closed_leaves_nothing_behind(agents: dict[str, PerceptionAgent]) -> None:
    agent = agents["device"]
    before = agent.engine.cache.used_rows
    stream = agent.run_stream("What is it?", picture(1), limits=LIMITS)
    for item in stream:
        if isinstance(item, TokenDelta):
            break
    stream.close()
    assert agent.engine.cache.used_rows == before
    again = agent.run("What is it?", picture(1), limits=LIMITS)
    assert told(again) == told(agents["host"].run("What is it?", picture(1), limits=LIMITS))
