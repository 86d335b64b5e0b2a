"""Stock models as agents: loaded, told of tools, asked several times; what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vpt_agent.agent import PerceptionAgent
from vpt_agent.errors import CheckpointError, InternalError, UserError
from vpt_agent.model.chat.testing import STOCK, TEMPLATES, save_stock, tiny_stock
from vpt_agent.model.testing import tiny_model
from vpt_agent.review.replay import replay
from vpt_agent.tool import PixelBox, SourceView, ToolRegistry, perception_tool
from vpt_agent.types import Limits
from vpt_agent.vision.policy import ImagePolicy
from vpt_tools.reencode_clip import reencode_clip


@perception_tool
def where(view: SourceView, box: PixelBox) -> str:
    """Tell a box."""
    return f"{view.id}: {[round(v) for v in box]}"


@perception_tool
def clock() -> str:
    """Tell the time."""
    return "noon"


def picture(seed: int = 0, size: tuple[int, int] = (96, 64)) -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8))


def stock(model_type: str = "qwen2_vl", tools: Any = (where, clock), **options: Any) -> Any:
    net, tokenizer = tiny_stock(model_type)
    patch = 16 if model_type == "qwen3_vl" else 14
    policy = ImagePolicy(kind="native", patch=patch, min_pixels=3136, max_pixels=8192)
    options = {"policy": policy} | options
    return PerceptionAgent.from_stock(net, tokenizer, ToolRegistry(tools), **options)


def written(turns: list[str], tools: Any = (where, clock)) -> PerceptionAgent:
    return PerceptionAgent.from_script(turns, ToolRegistry(tools), written=True)


def call(name: str, **arguments: Any) -> str:
    said = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{said}\n</tool_call>"


# --- loading ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", STOCK)
def test_a_checkpoint_directory_is_an_agent(model_type: str, tmp_path: Path) -> None:
    folder = save_stock(tmp_path / "model", model_type)
    agent = PerceptionAgent.from_pretrained(folder, device="cpu", tools=ToolRegistry([where]))
    frames = {"qwen2_vl": "norm1000", "qwen2_5_vl": "shown", "qwen3_vl": "norm1000"}
    assert agent.dialect.habit.coordinates == frames[model_type]
    patch = 16 if model_type == "qwen3_vl" else 14
    assert agent.engine.policy.patch == patch
    assert agent.engine.policy.max_pixels == 36 * patch * patch
    answer = agent.run("What?", picture(), tool_choice="where", limits=Limits(new_tokens=200))
    assert answer.calls[0].name == "where"
    # The same from memory: what was loaded is what was saved.
    net, tokenizer = tiny_stock(model_type)
    again = PerceptionAgent.from_stock(
        net, tokenizer, ToolRegistry([where]), policy=agent.engine.policy
    ).run("What?", picture(), tool_choice="where", limits=Limits(new_tokens=200))
    assert again.trace.record().ids == answer.trace.record().ids


def test_options_of_stock_models(tmp_path: Path) -> None:
    folder = save_stock(tmp_path / "model")
    agent = PerceptionAgent.from_pretrained(
        folder,
        device="cpu",
        tools=ToolRegistry([where]),
        coordinates="view",
        max_pixels=4 * 28 * 28,
        chat_template=TEMPLATES["tools"],
        constrained=False,
    )
    assert agent.dialect.layout.takes_tools
    assert agent.dialect.habit.coordinates == "view"
    assert agent.dialect.vocabulary is None
    assert agent.engine.policy.plan((500, 500)).visual_tokens == 4
    with pytest.raises(UserError, match="no perception tokens"):
        _ = agent.layout
    with pytest.raises(UserError, match="unknown frame"):
        PerceptionAgent.from_pretrained(folder, device="cpu", coordinates="inches")


def test_a_processor_s_template_goes_before_the_tokenizer_s(tmp_path: Path) -> None:
    folder = save_stock(tmp_path / "model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    template = json.dumps({"chat_template": TEMPLATES["tools"]})
    (folder / "chat_template.json").write_text(template)
    agent = PerceptionAgent.from_pretrained(folder, device="cpu", tools=ToolRegistry())
    assert agent.dialect.layout.takes_tools
    (folder / "chat_template.json").write_text("{no JSON")
    with pytest.raises(CheckpointError, match="a file of the checkpoint is no JSON"):
        PerceptionAgent.from_pretrained(folder, device="cpu")


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from vpt_agent.model.chat.families import FAMILIES
    from vpt_agent.model.chat.load import family_of

    folder = save_stock(tmp_path / "model")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if "q_proj.weight" in name)
    save_file({k: v for k, v in tensors.items() if k != lost}, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights of its model.*q_proj\.weight"):
        PerceptionAgent.from_pretrained(folder, device="cpu")
    weights.unlink()
    with pytest.raises(CheckpointError, match="transformers cannot load this checkpoint"):
        PerceptionAgent.from_pretrained(folder, device="cpu")
    with pytest.raises(CheckpointError, match=r"no model of pictures and text.*'bert'"):
        family_of({"model_type": "bert"}, where="here")
    assert family_of({"model_type": "llava"}, where="here") is None
    assert set(FAMILIES) == set(STOCK)
    with pytest.raises(UserError, match=r"cuts other patches.*14 pixels.*16"):
        stock("qwen3_vl", policy=ImagePolicy())
    with pytest.raises(UserError, match="are for stock models"):
        PerceptionAgent.from_pretrained(device="cpu", coordinates="view")


def test_a_model_with_perception_tokens_is_no_stock_model(tmp_path: Path) -> None:
    from vpt_agent.agent.load import is_stock

    model, processor = tiny_model(("clip",))
    model.save_pretrained(tmp_path / "vpt")
    processor.save_pretrained(tmp_path / "vpt")
    assert not is_stock(tmp_path / "vpt")
    assert is_stock(save_stock(tmp_path / "plain"))
    (tmp_path / "plain" / "config.json").write_text("{")
    assert not is_stock(tmp_path / "plain")


def test_a_dialect_in_json_is_for_stock_models() -> None:
    from vpt_agent.agent.load import parts_of, stock_dialect

    model, processor = tiny_model(("clip",))
    parts = parts_of(model, processor.tokenizer, "vpt")
    with pytest.raises(InternalError, match="has another dialect"):
        stock_dialect(parts, constrained=False)


# --- asking -------------------------------------------------------------------------------


def test_boxes_are_converted_and_the_source_is_one_that_there_is() -> None:
    agent = stock()
    for seed in range(4):
        answer = agent.run(
            "What?", picture(), tool_choice="where", seed=seed, temperature=1.0,
            limits=Limits(new_tokens=400),
        )  # fmt: skip
        (called,) = [e for e in answer.trace.events if e.type == "tool_called"][:1]
        left, top, right, bottom = called.arguments["box"]
        assert max(left, right) <= 96
        assert max(top, bottom) <= 64
        assert called.arguments.get("source") in (None, "image_1")
        assert called.origin == "json"


def test_tools_that_need_a_perception_token_are_not_offered() -> None:
    agent = stock(tools=[where, reencode_clip])
    answer = agent.run("What?", picture(), limits=Limits(new_tokens=5))
    prompt = next(e for e in answer.trace.events if e.type == "prompt_rendered").text
    assert '"name": "where"' in prompt
    assert "reencode_clip" not in prompt
    with pytest.raises(UserError, match=r"cannot be called as JSON.*reencode_clip.*where.*VPT"):
        agent.run("What?", picture(), tool_choice="reencode_clip")
    with pytest.raises(UserError, match=r"no tool that can be called as JSON.*reencode_clip"):
        stock(tools=[reencode_clip]).run("What?", tool_choice="required")
    with pytest.raises(UserError, match=r"tool_choice names no tool.*zoom.*clock, where"):
        stock().run("What?", tool_choice="zoom")
    with pytest.raises(UserError, match="the question is empty"):
        stock().run("  ")


def test_without_tools_the_prompt_is_the_template_s_own() -> None:
    _, tokenizer = tiny_stock()
    agent = stock()
    answer = agent.run("What?", picture(), tool_choice="none", limits=Limits(new_tokens=3))
    given = [i for s in answer.trace.record().spans if s.source != "sampled" for i in s.ids]
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    count = agent.engine.policy.plan((96, 64)).visual_tokens
    text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    assert given == tokenizer.encode(text, add_special_tokens=False)
    assert answer.calls == ()


def test_no_call_may_be_made_without_tools_or_beyond_the_limit() -> None:
    agent = stock()
    for limits, choice in ((Limits(calls=0, new_tokens=40), "auto"), (Limits(), "none")):
        for seed in range(3):
            answer = agent.run(
                "What?", picture(), tool_choice=choice, seed=seed, temperature=2.0, limits=limits
            )
            assert answer.calls == ()
    answer = agent.run("?", tool_choice="where", limits=Limits(rounds=0, new_tokens=9))
    assert "the limit of rounds is 0" in " ".join(answer.warnings)


def test_a_script_in_json_calls_thinks_and_answers() -> None:
    said = f"<think>{call('clock')} no</think>{call('where', box=[0, 0, 48, 32])}"
    agent = written([said, "<think>Hm.</think>\nA cat."])
    answer = agent.run("What?", picture())
    assert [c.name for c in answer.calls] == ["where"]
    assert answer.results[0].text == "image_1: [0, 0, 48, 32]"
    assert answer.text == "A cat."
    shown = agent.dialect.raw_text(answer.trace.record().ids)
    assert "<tool_response>\nimage_1: [0, 0, 48, 32]\n</tool_response>" in shown


def test_mistakes_are_told_and_counted() -> None:
    turns = [
        "<tool_call>{broken",
        call("where", box=[1, 2]),
        call("zoom"),
        call("where", box=[0, 0, 9, 9]),
        "Done.",
    ]
    answer = written(turns).run("What?", picture(), limits=Limits(retries=5, rounds=9))
    kinds = [r.error.kind if r.error else None for r in answer.results]
    assert kinds == ["invalid_arguments", "unknown_tool", None]
    (rejected,) = [e for e in answer.trace.events if e.type == "tool_rejected"]
    assert rejected.error.kind == "invalid_json"
    assert answer.text == "Done."
    answer = written(turns).run("What?", picture(), limits=Limits(retries=1, rounds=9))
    assert [e.limit for e in answer.trace.events if e.type == "limit_reached"] == ["retries"]
    # What looks like a call when none may be made any more is no call, and nothing is left to say.
    assert answer.text == ""


def test_more_calls_than_may_be_made_and_a_tool_that_is_given_up() -> None:
    box = {"box": [0, 0, 9, 9]}
    many = "\n".join(call("where", **box | {"box": [0, 0, 9, n]}) for n in range(1, 5))
    answer = written([many, "Done."]).run("?", picture(), limits=Limits(calls=2))
    assert [r.ok for r in answer.results] == [True, True]
    rejected = [e.error.message for e in answer.trace.events if e.type == "tool_rejected"]
    assert rejected == ["no more calls can be made: answer with what you have"] * 2
    turns = [call("where", box=[n]) for n in range(4)] + [call("where", **box), "Done."]
    answer = written(turns).run("?", picture(), limits=Limits(retries=9, rounds=9))
    limits = [e.limit for e in answer.trace.events if e.type == "limit_reached"]
    assert limits == ["retries of where"]
    rejected = [e.error.message for e in answer.trace.events if e.type == "tool_rejected"]
    assert rejected == ["where failed too often: answer without it"] * 2


def test_a_conversation_tells_of_tools_when_they_are_offered() -> None:
    agent = written(["Hello.", "Fine.", "Yes."])
    chat = agent.conversation(picture())
    chat.ask("First?", tool_choice="none")
    chat.ask("Second?", picture(1))
    chat.ask("Third?")
    session = agent.dialect.raw_text(chat._state.session.ids)
    assert session.count('"name": "where"') == 1
    first, second, third = (session.index(q) for q in ("First?", "Second?", "Third?"))
    assert first < session.index('"name": "where"') < second < third
    assert session.index("image_2 (") < second
    assert session.count("<|im_end|>") == 5  # the last one is not computed yet


def test_a_batch_equals_single_runs_and_a_trace_replays() -> None:
    agent = stock("qwen3_vl")
    options: dict[str, Any] = {"limits": Limits(new_tokens=60), "seed": 5, "temperature": 1.0}
    images = [picture(0), picture(1, (64, 64)), None]
    together = agent.run_batch([("What?", image) for image in images], **options)
    for image, answer in zip(images, together, strict=True):
        alone = agent.run("What?", image, **options)
        assert alone.trace.record().ids == answer.trace.record().ids
    assert replay(together[0].trace, agent).same


def test_an_unconstrained_model_writes_what_it_likes() -> None:
    free = stock(constrained=False)
    answer = free.run("What?", picture(), tool_choice="where", limits=Limits(new_tokens=20), seed=0)
    decoded = [e for e in answer.trace.events if e.type == "decoded"]
    assert all(s.source == "sampled" for e in decoded for s in e.spans)
    assert answer.calls == ()
