"""Limits, tools that give odd things, and requests that cannot be met."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vpt_agent.agent import PerceptionAgent
from vpt_agent.errors import ModelRetry, ToolDefinitionError, UserError
from vpt_agent.model.scripted import ScriptedModel
from vpt_agent.tokens.table import PUBLISHED, PerceptionKind, PerceptionTable
from vpt_agent.tool import ToolContext, ToolOutput, ToolRegistry, perception_tool
from vpt_agent.types import Box, Limits, View, VisualFeatures
from vpt_agent.vision.policy import ImagePolicy

REGION = "<|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>"
CLIP = "<|clip_action_start|><|clip_action|><|clip_action_end|>"
ASK = "<|ask_start|><|ask_end|>"
KIND = PerceptionKind(
    name="ask",
    tool="oracle",
    start="<|ask_start|>",
    end="<|ask_end|>",
    payload="none",
    placeholder="<|image_pad|>",
    tag="<ask>",
    encoder="none",
)


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (160, 240, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def custom(turns: list[str], tool: object, kind: PerceptionKind = KIND) -> PerceptionAgent:
    from vpt_agent.agent.plan import Abilities

    model = ScriptedModel(turns, table=PerceptionTable((kind, PUBLISHED["clip"])))
    return PerceptionAgent(
        model,
        model.tokenizer,
        policy=ImagePolicy(),
        registry=ToolRegistry([tool]),
        abilities=Abilities(name="scripted"),
    )


def told(answer, kind: str) -> list:
    return [e for e in answer.trace.events if e.type == kind]


# --- the end of the context ---------------------------------------------------------------


def test_a_story_longer_than_the_model_holds_is_an_outcome(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script(["x" * 900])
    agent.engine.max_positions = 200
    answer = agent.run("q?", image=image, limits=Limits(new_tokens=1000))
    assert (answer.status, answer.limit) == ("limit", "context")
    assert set(answer.text) == {"x"}
    assert len(answer.trace.record().ids) == 200


def test_a_result_with_no_room_is_told_and_the_run_goes_on() -> None:
    @perception_tool
    def oracle() -> str:
        """Know the number."""
        return "words " * 400

    agent = custom([ASK, "Fine."], oracle)
    agent.engine.max_positions = 500
    answer = agent.run("q?")
    assert answer.text == "Fine."
    assert answer.results[0].error.message.startswith("the limit of context is reached")
    assert [e.limit for e in told(answer, "limit_reached")] == ["context"]


def test_where_not_even_an_error_fits_the_run_ends(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "Fine."])
    (prefilled,) = told(agent.run("q?", image=image), "prefilled")
    agent.engine.max_positions = prefilled.tokens + 12
    chat = agent.conversation(image=image)
    answer = chat.ask("q?")
    assert (answer.status, answer.limit) == ("limit", "context")
    assert len(answer.results) == len(answer.calls) == 1
    with pytest.raises(UserError, match="longer than the model can hold"):
        chat.ask("and?")


# --- retries ------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [0, 1])
def test_a_tools_own_retries_count(allowed: int) -> None:
    @perception_tool(max_retries=allowed)
    def oracle() -> str:
        """Know the number."""
        raise ModelRetry("no")

    agent = custom([ASK], oracle)
    answer = agent.run("q?", limits=Limits(retries=9, rounds=9, new_tokens=40))
    assert len(answer.calls) == allowed + 1
    (limit,) = told(answer, "limit_reached")[:1]
    assert limit.limit == "retries of oracle"


def test_a_call_that_is_asked_for_but_not_allowed_is_warned_about(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script(["Yes."])
    answer = agent.run("q?", image=image, tool_choice="crop_region", limits=Limits(calls=0))
    assert answer.calls == ()
    assert any("the limit of calls is 0" in w for w in answer.warnings)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(calls=1),
        Limits(rounds=1),
        Limits(retries=0),
        Limits(visual_tokens=1),
        Limits(pixels=1),
        Limits(new_tokens=3),
        Limits(new_tokens=0),
        Limits(seconds=0.0),
    ],
)
def test_after_any_limit_the_conversation_goes_on(image: Image.Image, limits: Limits) -> None:
    agent = PerceptionAgent.from_script([REGION, REGION + CLIP, "Ok.", "Ok.", "Ok."])
    chat = agent.conversation(image=image)
    first = chat.ask("One?", limits=replace(limits, new_tokens=min(30, limits.new_tokens)))
    if limits != Limits(retries=0):
        assert told(first, "limit_reached")
    second = chat.ask("Two?", limits=Limits(new_tokens=60))
    assert told(second, "run_finished")[-1].status in ("answered", "limit")
    state = chat._state
    assert chat.trace.record().ids == [*state.session.ids, *state.tail]
    computed = sum(a.usage.forward_tokens for a in (first, second))
    assert computed == len(state.session.ids)


def test_usage_adds_up(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION + CLIP, REGION, "Ok."])
    answer = agent.run("q?", image=image)
    usage, record = answer.usage, answer.trace.record()
    assert usage.prompt_tokens + usage.new_tokens == len(record.ids)
    assert usage.forward_tokens == len(record.ids) - 1
    by = {s: sum(len(x.ids) for x in record.spans if x.source == s) for s in ("visual", "sampled")}
    assert usage.visual_tokens == by["visual"]
    assert usage.sampled_tokens == by["sampled"]
    assert usage.tool_calls == len(answer.calls) == len(answer.to_dict()["calls"]) == 3


# --- what tools may give ------------------------------------------------------------------


def test_several_views_text_and_features_with_odd_names(image: Image.Image) -> None:
    @perception_tool
    def oracle(context: ToolContext) -> ToolOutput:
        """Draw."""
        dark = image.point(lambda v: v // 2)
        light = image.point(lambda v: 255 - v)
        views = [
            View("image_1", p, "image_1", Box(0, 0, *p.size), p.size) for p in (dark, light, image)
        ]
        tokens = torch.ones(3, 4)
        return ToolOutput(views=views, features=VisualFeatures("clip", tokens), text="<|im_end|>")

    agent = custom([ASK, "Ok."], oracle)
    answer = agent.run("q?", image=image)
    assert answer.text == "Ok."
    names = [v.id for v in answer.views]
    assert names == ["image_1", "image_1~2", "image_1~3", "image_1"]
    for view in answer.views:
        assert answer.trace.view(view.id).image.tobytes() == view.image.tobytes()
    (appended,) = told(answer, "perception_appended")
    blocks = [(s.kind, len(s.ids)) for s in appended.spans if s.source == "visual"]
    assert blocks[-1] == ("clip", 3), "features are laid out by their own kind"
    assert {k for k, _ in blocks[:-1]} == {"ask"}
    pad = agent.engine.table["clip"].placeholder
    assert appended.spans[-2].ids == (pad,) * 3


@pytest.mark.parametrize(
    "features",
    [
        VisualFeatures("clip", torch.ones(3, 5)),
        VisualFeatures("clip", torch.ones(0, 4)),
        VisualFeatures("clip", torch.ones(2, 3, 4)),
        VisualFeatures("clip", torch.ones(3, 4, dtype=torch.long)),
        VisualFeatures("dino", torch.ones(3, 4)),
    ],
)
def test_features_that_do_not_fit_are_their_authors_fault(features: VisualFeatures) -> None:
    @perception_tool
    def oracle() -> VisualFeatures:
        """Give features."""
        return features

    agent = custom([ASK, "Ok."], oracle)
    with pytest.raises(ToolDefinitionError, match="visual features that this model cannot take"):
        agent.run("q?")
    answers = agent.run_batch(["a?", "b?"])
    assert [a.status for a in answers] == ["failed", "failed"]


@pytest.mark.parametrize("payload", ["none", "control"])
def test_an_inline_call_that_gives_nothing_goes_on(payload: str) -> None:
    @perception_tool
    def oracle() -> str:
        """Say nothing."""
        return ""

    control = "<|ask|>" if payload == "control" else None
    kind = replace(KIND, result="inline", payload=payload, control=control)
    call = f"<|ask_start|>{control or ''}<|ask_end|>"
    agent = custom([f"So {call}it is."], oracle, kind)
    answer = agent.run("q?")
    assert answer.results[0].ok
    assert answer.text == "So it is."


def test_stray_perception_tokens_are_text_and_the_call_takes_its_own_state(
    image: Image.Image,
) -> None:
    stray = "<|clip_action|><|clip_action_end|><|x_3|> and "
    agent = PerceptionAgent.from_script([stray + CLIP, "Ok."])
    seen: list[torch.Tensor] = []
    real = agent.model.run_language_model

    def watched(*args, **kwargs):
        hidden = real(*args, **kwargs)
        # Made distinguishable: one number more for each row of the cache.
        length = args[0].shape[1]
        hidden[0, :, 1] = torch.arange(length) + float(agent.engine.cache.lengths[0])
        seen.append(hidden)
        return hidden

    agent.model.run_language_model = watched
    answer = agent.run("q?", image=image)
    (call,) = answer.calls
    ids = answer.trace.record().ids
    control = agent.engine.table["clip"].control
    places = [i for i, token in enumerate(ids) if token == control]
    assert len(places) == 2
    assert call.control[0, 1] == places[1] - 1, "the state before its own control token"


def test_many_tools_at_once_do_not_spin() -> None:
    waits = threading.Event()

    @perception_tool
    def oracle() -> str:
        """Be slow the second time."""
        if not waits.is_set():
            waits.set()
            return "quick"
        time.sleep(0.4)
        return "slow"

    agent = custom([ASK + ASK, "Ok."], oracle)
    steps = sum(1 for _ in agent.engine.steps([agent.conversation().steps(
        "q?", "auto", None, _greedy())]))  # fmt: skip
    assert steps < 60, "the loop sleeps while tools run"


def _greedy():
    from vpt_agent.engine.sampling import Sampling

    return Sampling()


@pytest.mark.parametrize(
    "values",
    [{"calls": float("nan")}, {"seconds": float("nan")}, {"rounds": 1.5}, {"pixels": -1},
     {"retries": True}, {"new_tokens": "9"}, {"visual_tokens": None}],
)  # fmt: skip
def test_what_is_no_limit_is_refused(values: dict) -> None:
    with pytest.raises(UserError, match="a limit must be a number, 0 or more"):
        Limits(**values)


# --- what users pass ----------------------------------------------------------------------


def test_text_of_any_kind_is_taken(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script(["Ok."])
    assert agent.run("half \ud800 a pair").text == "Ok."
    ids = agent.layout.encode_text("<|im_end|>" * 3000)
    assert not set(ids) & set(agent.tokenizer.get_added_vocab().values())


def test_pictures_that_are_none_are_refused() -> None:
    agent = PerceptionAgent.from_script(["Ok."])
    with pytest.raises(UserError, match="the list of pictures is empty"):
        agent.run("q?", image=[])
    for bad in (bytearray(b"123"), {"a": 1}, [None], 5, (i for i in ())):
        with pytest.raises(UserError, match="this is no picture"):
            agent.run("q?", image=bad)


def test_tool_choice_may_name_a_version(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "Ok."])
    answer = agent.run("q?", image=image, tool_choice="crop_region@1")
    assert [c.name for c in answer.calls] == ["crop_region"]
    for bad in (None, ["crop_region"], "crop_region@7"):
        with pytest.raises(UserError, match="tool_choice names no tool"):
            agent.run("q?", image=image, tool_choice=bad)


def test_an_old_version_is_not_what_the_models_tokens_call() -> None:
    @perception_tool
    def oracle() -> str:
        """Know."""
        return "old"

    @perception_tool(name="oracle", version=2)
    def newer() -> str:
        """Know more."""
        return "new"

    agent = custom([ASK, "Ok."], oracle)
    agent.registry.add(newer)
    with pytest.raises(UserError, match="no perception token for; got: oracle@1"):
        agent.run("q?", tool_choice="oracle@1")
    answer = agent.run("q?", tool_choice="oracle@2")
    assert answer.results[0].text == "new"
