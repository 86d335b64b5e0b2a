"""Models without an adapter of their own: a tiny LLaVA, checked against its own forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.agent.plain_models import idefics3, llava_next
from vpt_agent.agent import PerceptionAgent, Question
from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model.chat.load import plain_parts, stock_parts
from vpt_agent.model.chat.plain import StockPlain
from vpt_agent.model.chat.speaking import save_speaking, tiny_llava
from vpt_agent.tool import PixelBox, SourceView, ToolRegistry, perception_tool
from vpt_agent.types import Limits

CALL = '<tool_call>\n{"name": "where", "arguments": {"box": [0, 0, 500, 1000]}}\n</tool_call>'


@perception_tool
def where(view: SourceView, box: PixelBox) -> list[Any]:
    """Tell a box, and show it."""
    whole = [round(v) for v in box]
    return [f"{view.id}: {whole}", view.image.crop(whole)]


@perception_tool
def mirror(view: SourceView) -> Image.Image:
    """Show the picture mirrored."""
    return view.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("make", [tiny_llava, idefics3, llava_next], ids=lambda m: m.__name__)
def test_it_computes_what_the_model_computes(
    make: Callable[[], tuple[Any, Any]], figures: Callable[..., None]
) -> None:
    net, processor = make()
    parts = plain_parts(net, processor)
    share = parts.model.check(parts.layout)
    figures("models without an adapter", model=make.__name__, logits_off_by_share=share)
    assert share < 1e-5
    agent = PerceptionAgent.from_stock(net, processor, ToolRegistry())
    images = [picture(1), picture(2)]
    answer = agent.run("What?", images, limits=Limits(new_tokens=12))
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
    end = parts.layout.end
    theirs = net.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=end)
    record = answer.trace.record()
    given = [i for s in record.spans if s.source in ("given", "visual") for i in s.ids]
    said = [i for s in record.spans if s.source == "sampled" for i in s.ids]
    # What stands for a picture here, marks of tiles included, is one token again and again.
    assert len(given) == inputs["input_ids"].shape[1]
    assert said == theirs[0, len(given) :].tolist()[: len(said)]


def test_a_conversation_a_batch_and_a_picture_in_the_middle() -> None:
    net, processor = tiny_llava()
    agent = PerceptionAgent.from_stock(net, processor, ToolRegistry([mirror]))
    limits = Limits(new_tokens=400)
    options: dict[str, Any] = {"tool_choice": "mirror", "temperature": 1.0, "limits": limits}
    alone = [agent.run("What?", picture(n), seed=n, **options) for n in range(3)]
    questions = [Question("What?", picture(n), seed=n) for n in range(3)]
    together = agent.run_batch(questions, **options)
    for one, other in zip(alone, together, strict=True):
        assert one.trace.record().ids == other.trace.record().ids
    assert any(result.views for answer in alone for result in answer.results)
    chat = agent.conversation(picture())
    chat.ask("First?", limits=Limits(new_tokens=5))
    again = chat.ask("Second?", picture(1), limits=Limits(new_tokens=5))
    assert again.usage.encoder_calls + again.usage.reused_features == 1


def test_a_checkpoint_that_speaks_calls_its_tool(tmp_path: Path) -> None:
    folder = save_speaking(tmp_path / "speaking", CALL, "A cat.")
    agent = PerceptionAgent.from_pretrained(
        folder, device="cpu", tools=ToolRegistry([where]), constrained=False
    )
    answer = agent.run("What is there?", picture())
    assert answer.text == "A cat."
    assert answer.results[0].text == "image_1: [0, 0, 30, 40]"
    assert answer.results[0].views[0].size == (30, 40)
    with pytest.raises(UserError, match=r"max_pixels is for models whose pictures.*qwen2_vl"):
        PerceptionAgent.from_pretrained(folder, device="cpu", max_pixels=9999)
    with pytest.raises(UserError, match=r"how this model's pictures are resized is not known"):
        PerceptionAgent.from_pretrained(folder, device="cpu", coordinates="shown")


def test_a_model_that_computes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, processor = tiny_llava()
    with pytest.raises(UserError, match="needs its processor"):
        stock_parts(net, processor.tokenizer)
    model = StockPlain(net, processor, "<image>")
    with pytest.raises(CheckpointError, match="has no patches of its own"):
        model.encode_images(torch.zeros(1, 1), torch.zeros(1, 3))
    layout = plain_parts(net, processor).layout
    plain = StockPlain.compute_logits
    monkeypatch.setattr(StockPlain, "compute_logits", lambda self, h: plain(self, h).tanh())
    with pytest.raises(CheckpointError, match=r"not compute as a plain decoder.*off by.*server"):
        model.check(layout)
    monkeypatch.setattr(StockPlain, "compute_logits", lambda self, h: plain(self, h)[:, 1:])
    with pytest.raises(CheckpointError, match=r"plain decoder.*tokens for"):
        model.check(layout)
