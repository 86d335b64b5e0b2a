"""VPTProcessor: the published pixels and layout, files, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from tests.parity.goldens import ROOT, golden
from tests.unit.model.batches import picture
from tests.unit.model.directories import plain_qwen, published
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.testing import tiny_model
from vpt_agent.prompt.vpt import SYSTEM
from vpt_agent.tokens.table import IM_END, IM_START, IMAGE_TAG, VISION_END, VISION_START


def pictures(variant: str) -> dict[str, Image.Image]:
    about = golden(variant).meta["images"]
    return {name: Image.open(ROOT / variant / v["file"]) for name, v in about.items()}


@pytest.mark.parametrize("variant", ["clip_tied", "dino_tied", "sam_tied"])
def test_published_pixels(variant: str) -> None:
    processor = VPTProcessor.from_pretrained(ROOT / variant)
    compared = 0
    for image in pictures(variant).values():
        made = processor(images=image, text=IMAGE_TAG)
        _, rows, columns = made["image_grid_thw"][0].tolist()
        name = f"px/{rows}x{columns}_"
        stored = [v for k, v in golden(variant).stored.items() if k.startswith(name)]
        if stored:  # one of that size may be of a crop
            apart = min(float((made["pixel_values"] - value).abs().max()) for value in stored)
            assert apart < 1e-5
            compared += 1
    assert compared == (3 if variant.startswith("clip") else 1)


def test_a_call_gives_the_golden_prompt() -> None:
    """Text with tags to ids, placeholders widened: the ids of the release's collator."""
    processor = VPTProcessor.from_pretrained(ROOT / "clip_tied")
    gold = golden("clip_tied")
    ids = gold.inputs("gen_r2")["input_ids"][0]
    text = processor.tokenizer.decode(ids)
    for pad in (processor.table["region"].placeholder, processor.table["clip"].placeholder):
        text = pad.join(part for part in text.split(pad) if part)
    image = pictures("clip_tied")["a"]
    made = processor(images=image, text=text, again={"clip": image})
    assert torch.equal(made["input_ids"][0], ids)
    assert torch.equal(made["pixel_values"], made["clip_pixel_values"])
    assert torch.allclose(made["pixel_values"], gold.inputs("gen_r2")["pixel_values"], atol=1e-5)
    pads = ids == processor.tokenizer.convert_tokens_to_ids(processor.table["region"].placeholder)
    assert torch.equal(made["mm_token_type_ids"][0].bool(), pads)


def test_the_chat_template_is_the_published_layout() -> None:
    _, processor = tiny_model()
    clip = processor.table["clip"]
    call = f"{clip.start}{clip.control}{clip.end}"
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": call},
        {"role": "user", "content": [{"type": "clip_image"}]},
    ]
    said = processor.apply_chat_template(messages, add_generation_prompt=True)
    slots = [
        f"{VISION_START}{k.placeholder}{VISION_END}" for k in (processor.table["region"], clip)
    ]
    assert said == (
        f"{IM_START}system\n{SYSTEM}{IM_END}\n"
        f"{IM_START}user\n{slots[0]}What?{IM_END}\n{IM_START}assistant\n{call}{IM_END}\n"
        f"{IM_START}user\n{slots[1]}{IM_END}\n{IM_START}assistant\n"
    )
    with_system = [{"role": "system", "content": "Be short."}, *messages]
    assert f"{IM_START}system\nBe short.{IM_END}\n" in processor.apply_chat_template(with_system)
    assert not processor.apply_chat_template(messages[:1]).endswith("\n")


def test_another_models_chat_template_is_not_taken_over(tmp_path: Path) -> None:
    path = plain_qwen(tmp_path / "plain")
    (path / "chat_template.jinja").write_text("theirs")
    model = VPTForConditionalGeneration.from_pretrained(path, encoders=[])
    processor = VPTProcessor.from_pretrained(path, config=model.config)
    assert processor.chat_template != "theirs"
    processor.chat_template = "ours, changed"
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    assert VPTProcessor.from_pretrained(tmp_path / "own").chat_template == "ours, changed"


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, processor = tiny_model(grid=4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for again in (VPTProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(again) is VPTProcessor
        assert again.perception == processor.perception
        assert again.chat_template == processor.chat_template
        assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    text = processor.table["dino"].start + " hello"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode(text) == processor.tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_hub_preprocessor_files_are_read(tmp_path: Path) -> None:
    path = published(tmp_path)
    data = {
        "min_pixels": 3136,
        "max_pixels": 100352,
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    (path / "preprocessor_config.json").write_text(json.dumps(data))
    processor = VPTProcessor.from_pretrained(path)
    assert processor.image_processor.size["longest_edge"] == 100352


def test_batches_are_padded_on_either_side() -> None:
    model, processor = tiny_model()
    texts = [f"{IMAGE_TAG}a", f"{IMAGE_TAG}a longer one {model.table['dino'].kind.tag}"]
    images, again = [picture(1), [picture(2, 84, 84)]], {"dino": [picture(2)]}
    for side in ("left", "right"):
        made = processor(images=images, text=texts, again=again, padding=True, padding_side=side)
        assert made["input_ids"].shape == made["attention_mask"].shape
        assert bool(made["attention_mask"][0, 0]) == (side == "right")
    assert made["image_grid_thw"].shape == (2, 3)
    assert made["detection_images"].shape == (1, 3, 56, 56)
    placeholder = model.table["dino"].placeholder
    assert (made["input_ids"] == placeholder).sum(1).tolist() == [0, 16]


PLACES = {
    "no text": ({"images": None}, "a processor call needs text"),
    "numpy": ({"text": "a", "return_tensors": "np"}, r"only torch tensors are made.*np"),
    "no picture": ({"text": IMAGE_TAG}, r"place for a picture that was not given.*image_pad"),
    "no place": ({"text": "a", "images": picture(1)}, r"more pictures than places.*image_pad"),
    "no kind": ({"text": "a", "again": {"depth": picture(1)}}, r"no such perception kind.*depth"),
}


@pytest.mark.parametrize("case", PLACES)
def test_refused(case: str) -> None:
    _, processor = tiny_model()
    arguments, message = PLACES[case]
    with pytest.raises(UserError, match=message):
        processor(**arguments)


def test_every_name_of_a_call_is_an_argument_of_forward() -> None:
    model, processor = tiny_model()
    again = {name: picture(3) for name in ("clip", "dino", "sam")}
    tags = "".join(model.table[name].kind.tag for name in again)
    made = processor(images=picture(1), text=f"{IMAGE_TAG}{tags}", again=again)
    model.config.num_inner_forward_run = 1
    with torch.no_grad():
        assert model(**made).logits.shape[1] == made["input_ids"].shape[1]
    assert set(processor.model_input_names) <= set(made)
    assert int(made["mm_token_type_ids"].sum()) == int(made["image_grid_thw"].prod()) // 4
