"""A kind of one's own on a model in memory: tokens, rows, parts, manifest; saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vpt_agent.errors import UserError
from vpt_agent.model import (
    VPTForConditionalGeneration,
    VPTProcessor,
    add_perception_kind,
    mark_trained,
)
from vpt_agent.model.inspect import inspect_checkpoint
from vpt_agent.model.testing import DINO, tiny_model
from vpt_agent.tokens import own_kind
from vpt_agent.tool import PerceptionTool, ToolContext, perception_tool
from vpt_agent.types import View

PRICE = own_kind("price", payload="text", pattern=r"[A-Z]\d{1,2}", argument="key")
AGAIN = own_kind("again", payload="control")


@perception_tool
def price(key: str) -> str:
    """Say what a part costs."""
    return f"{key}: 4"


@perception_tool(needs={"view", "control"})
def again(context: ToolContext) -> View:
    """Look again."""
    return context.require_view()


Made = tuple[VPTForConditionalGeneration, VPTProcessor]


@pytest.fixture
def made() -> Made:
    return tiny_model(encoders=("clip",), seed=1)


def test_tokens_and_rows_are_added_and_nothing_else_moves(made: Made) -> None:
    model, processor = made
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = dict(model.config.perception["ids"])
    length = len(processor.tokenizer)
    added = add_perception_kind(model, processor, PRICE, tool=price)
    assert added.tokens == {PRICE.start: length, PRICE.end: length + 1}
    assert added.grew
    assert model.config.text_config.vocab_size % 64 == 0
    assert ids.items() <= model.config.perception["ids"].items()
    assert model.config.perception["untrained"] == ["price"]
    assert model.config.perception["tools"] == {"price@1": price.contract_hash}
    assert model.table is not None
    assert model.table["price"].start == length
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)], value), name
    rows = model.get_input_embeddings().weight
    assert model.lm_head.weight is rows, "still tied"
    mean = rows[:length].mean(0)
    for token in added.tokens.values():
        away = (rows[token] - mean).norm()
        assert 0.5 < away < 1.5, "noise of deviation 1/sqrt(D) has a norm of about 1"
    assert not torch.equal(rows[length], rows[length + 1])


def test_spare_rows_are_used_first_and_untied_heads_get_theirs() -> None:
    model, processor = tiny_model(encoders=("clip",), tied=False)
    add_perception_kind(model, processor, PRICE, tool=price)
    rows = model.config.text_config.vocab_size
    added = add_perception_kind(model, processor, AGAIN, tool=again, like="clip")
    assert not added.grew
    assert model.config.text_config.vocab_size == rows
    ids = model.config.perception["ids"]
    clip = model.table["clip"]
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        for mine, its in ((AGAIN.start, clip.start), (AGAIN.control, clip.control)):
            assert 0 < (weight[ids[mine]] - weight[its]).norm() < 0.2
    assert model.config.perception["untrained"] == ["price", "again"]
    mark_trained(model, ["price"])
    assert model.config.perception["untrained"] == ["again"]
    with pytest.raises(UserError, match=r"no such perception kind; got: prise"):
        mark_trained(model, ["prise"])


def test_saved_loaded_and_inspected(made: Made, tmp_path: Path) -> None:
    model, processor = made
    add_perception_kind(model, processor, PRICE, tool=price)
    add_perception_kind(model, processor, AGAIN, tool=again)
    mark_trained(model, ["price", "again"])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = VPTForConditionalGeneration.from_pretrained(tmp_path, dtype="float32")
    assert loaded.config.perception == model.config.perception
    assert loaded.table == model.table
    assert loaded.table["price"].kind == PRICE
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert any(name.startswith("again_projector.") for name in loaded.state_dict())
    again_processor = VPTProcessor.from_pretrained(tmp_path)
    assert again_processor.table == processor.table
    assert again_processor.chat_template == processor.chat_template
    report = inspect_checkpoint(tmp_path)
    kinds = {k.name: k for k in report.kinds}
    assert kinds["price"].payload == "text"
    assert kinds["price"].trained
    assert r"price: tool price; text key: [A-Z]\d{1,2}; start" in report.to_text()
    assert report.missing == ()
    assert report.tools["price@1"] == price.contract_hash


@pytest.mark.parametrize("encoder", ["base", "dino"])
def test_a_reencoding_kind_goes_through_processor_and_forward(made: Made, encoder: str) -> None:
    model, processor = made
    options = {"encoder": "dino", "visual_tokens": 16, "input_size": 56}
    kind = own_kind("again", payload="control", **({} if encoder == "base" else options))
    config = None if encoder == "base" else DINO
    add_perception_kind(model, processor, kind, tool=again, encoder_config=config)
    picture = Image.new("RGB", (84, 56), "red")
    text = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": kind.call_text()},
            {"role": "user", "content": [{"type": "again_image"}]},
            {"role": "assistant", "content": "Red."},
        ]
    )
    inputs = processor(picture, text, again={"again": picture})
    assert set(inputs["perception_inputs"]) == {"again"}
    model.config.gradients = "full"
    output = model(**inputs, labels=inputs["input_ids"])
    assert output.controls is not None
    assert output.controls.shape == (1, model.config.text_config.hidden_size)
    output.loss.backward()
    assert model.again_projector.linear_condition.weight.grad.abs().sum() > 0


def test_what_does_not_fit_changes_nothing(made: Made) -> None:
    model, processor = made

    def refused(kind: object, tool: PerceptionTool, message: str, **options: object) -> None:
        with pytest.raises(UserError, match=message):
            add_perception_kind(model, processor, kind, tool=tool, **options)  # type: ignore[arg-type]

    before, length = dict(model.config.perception), len(processor.tokenizer)
    renamed = own_kind("price", tool="cost", payload="none")
    refused(renamed, price, r"do not fit.*kind price, tool price@1; got: a tool called price")
    bare = own_kind("price", payload="none")
    refused(bare, price, r"got: arguments key; required key; expected: no required argument but n")
    other = own_kind("price", payload="text", pattern="a", argument="name")
    refused(other, price, r"got: arguments key; required key.*but name")
    refused(own_kind("again", payload="none"), again, "got: a tool that needs a control state")
    dino = own_kind("again", payload="control", encoder="dino", visual_tokens=16, input_size=56)
    refused(dino, again, r"config has no shapes.*encoders\['again'\]")
    refused(PRICE, price, r"no such perception kind; got: sam", like="sam")
    from dataclasses import replace

    taken = replace(PRICE, start=model.table["clip"].kind.start)
    refused(
        taken, price, r"token of the new kind means something already.*it belongs to the kind c"
    )
    layout = replace(PRICE, end="\n")
    processor.tokenizer.add_tokens(["\n"])
    refused(layout, price, r"means something already; where: kind price; got: \n")
    assert model.config.perception == before
    assert len(processor.tokenizer) == length + 1
    add_perception_kind(model, processor, PRICE, tool=price)
    refused(PRICE, price, r"a kind of this name already; got: price")
