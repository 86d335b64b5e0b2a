"""VPT on each base: the base's own function, layouts of files, configs, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tests.unit.model.batches import picture
from tests.unit.model.directories import assert_same_weights, load, plain_model, plain_qwen
from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model import (
    VPTConfig,
    VPTForConditionalGeneration,
    VPTProcessor,
    config_on_base,
)
from vpt_agent.model.attention import ready_mask
from vpt_agent.model.bases import BASES
from vpt_agent.model.configuration import CONFIGS
from vpt_agent.model.inspect import inspect_checkpoint
from vpt_agent.model.testing import DINO, byte_tokenizer, tiny_model
from vpt_agent.tokens.table import IM_END, IM_START, IMAGE_TAG
from vpt_agent.vision.policy import DEFAULT_POLICY, ImagePolicy

NEWER = ("qwen2_5_vl", "qwen3_vl")


def asked(processor: VPTProcessor) -> dict[str, torch.Tensor]:
    """Two rows of unlike length with pictures of unlike size, padded on the right."""
    made = processor(
        images=[picture(1, 84, 120), picture(2, 96, 64), picture(3, 70, 70)],
        text=[
            f"{IM_START}user\n{IMAGE_TAG}and{IMAGE_TAG}What is it?",
            f"{IM_START}user\n{IMAGE_TAG}Why?{IM_END}",
        ],
        padding=True,
        padding_side="right",
    )
    return dict(made)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("base", BASES)
def test_without_calls_it_is_the_base(tmp_path: Path, base: str, tied: bool) -> None:
    path = plain_qwen(tmp_path / "plain", base=base, tied=tied)
    model = load(path, encoders=["clip"])
    processor = VPTProcessor.from_pretrained(path, config=model.config)
    inputs = asked(processor)
    plain = plain_model(base=base, tied=tied)
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = model(**inputs).logits, plain(**inputs).logits
    known = theirs.shape[-1]
    torch.testing.assert_close(ours[seen][:, :known], theirs[seen], atol=1e-5, rtol=0)
    assert theirs[seen].std() > 0.1  # not all the same

    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    config = AutoConfig.from_pretrained(tmp_path / "own")
    assert type(config) is type(VPTConfig.from_pretrained(tmp_path / "own")) is CONFIGS[base]
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "own", dtype=torch.float32)
    assert isinstance(again, VPTForConditionalGeneration)
    assert_same_weights(again, model)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "own"), VPTProcessor)
    report = inspect_checkpoint(tmp_path / "own")
    assert (report.base, report.form, report.missing) == (base, "vpt_agent", ())
    assert f"vpt_agent on {base}" in report.to_text()
    assert set(report.parts) >= {"vision tower", "language model", "clip_projector"}


@pytest.mark.parametrize("base", BASES)
def test_both_layouts_of_a_base_are_read(tmp_path: Path, base: str) -> None:
    """On the hub Qwen3-VL lies as ``model.language_model``, the older ones as ``model`` alone."""
    path = plain_qwen(tmp_path, base=base)
    weights = load_file(path / "model.safetensors")
    newer = any(k.startswith("model.language_model.") for k in weights)
    assert newer == (base == "qwen3_vl")
    before = load(path, encoders=[])

    def other(key: str) -> str:
        if newer:
            return key.replace("model.language_model.", "model.").replace("model.visual", "visual")
        return "model." + (key if "visual." in key else key.replace("model.", "language_model.", 1))

    renamed = {k if k == "lm_head.weight" else other(k): v for k, v in weights.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    after = load(path, encoders=[])
    stored = [k for k in before.state_dict() if "embed_tokens" not in k and k != "lm_head.weight"]
    assert all(torch.equal(before.state_dict()[k], after.state_dict()[k]) for k in stored)


def test_a_flat_config_of_the_hub(tmp_path: Path) -> None:
    """Qwen2.5-VL's config on the hub has the language model's sizes at its top level."""
    path = plain_qwen(tmp_path, base="qwen2_5_vl")
    before = load(path, encoders=[])
    data = json.loads((path / "config.json").read_text())
    text = data.pop("text_config")
    rope = text.pop("rope_parameters")
    rope["type"] = rope.pop("rope_type")
    data |= {k: v for k, v in text.items() if k not in ("model_type", "layer_types")}
    data |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope | {"type": "mrope"}}
    data["vision_config"] |= {"model_type": "qwen2_5_vl", "in_chans": 3, "spatial_patch_size": 14}
    (path / "config.json").write_text(json.dumps(data))
    after = load(path, encoders=[])
    inputs = asked(VPTProcessor.from_pretrained(path, config=after.config))
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        a, b = before(**inputs).logits[seen], after(**inputs).logits[seen]
    torch.testing.assert_close(a[:, :200], b[:, :200], atol=1e-6, rtol=0)


def test_pictures_are_cut_for_the_base(tmp_path: Path) -> None:
    for base in ("qwen2_vl", "qwen2_5_vl"):
        model = load(plain_qwen(tmp_path / base, base=base), encoders=[])
        assert ImagePolicy.from_manifest(model.config.perception["images"]) == DEFAULT_POLICY
    path = plain_qwen(tmp_path / "qwen3_vl", base="qwen3_vl")
    policy = ImagePolicy.from_manifest(load(path, encoders=[]).config.perception["images"])
    assert (policy.patch, policy.longest, policy.crop_longest) == (16, 1024, 768)
    assert (
        policy.plan((2000, 2000)).visual_tokens == DEFAULT_POLICY.plan((2000, 2000)).visual_tokens
    )
    assert policy.mean == policy.std == (0.5, 0.5, 0.5)
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    policy = ImagePolicy.from_manifest(load(path, encoders=[]).config.perception["images"])
    assert (policy.mean, policy.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    (path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is no JSON"):
        load(path, encoders=[])


@pytest.mark.parametrize("base", BASES)
def test_from_a_config_alone(base: str) -> None:
    tokenizer = byte_tokenizer()
    plain = plain_model(base=base).config
    shapes = {"dino": DINO | {"image_size": 224, "hidden_size": 32}}
    config = config_on_base(
        plain, tokenizer, encoders=["clip", "dino"], grid=4, encoder_shapes=shapes
    )
    assert config.base == base
    assert config.text_config.vocab_size % 64 == 0
    assert config.text_config.vocab_size >= len(tokenizer)
    torch.manual_seed(0)
    model = VPTForConditionalGeneration(config).eval()
    with torch.no_grad():
        out = model(**asked(VPTProcessor.for_model(config, tokenizer)))
    assert out.logits.shape[-1] == config.text_config.vocab_size
    assert config.perception["untrained"] == ["region", "clip", "dino"]
    same = config_on_base(plain.to_dict(), byte_tokenizer(), encoders=[], controls=2)
    assert (same.base, same.table.controls) == (base, 2)


def test_other_models_are_no_base() -> None:
    with pytest.raises(UserError, match=r"not built on this kind of model.*'llama'.*qwen3_vl"):
        config_on_base({"model_type": "llama"}, byte_tokenizer(), encoders=[])


@pytest.mark.parametrize("base", NEWER)
def test_sizes_are_said_never_assumed(base: str) -> None:
    whole = plain_model(base=base).config.to_dict()

    def without(part: str, name: str) -> dict[str, Any]:
        return whole | {part: {k: v for k, v in whole[part].items() if k != name}}

    for part, name, whose in (
        ("text_config", "num_key_value_heads", "language model's"),
        ("vision_config", "out_hidden_size", "vision tower's"),
    ):
        with pytest.raises(CheckpointError, match=rf"does not say the {whose} sizes.*no {name}"):
            config_on_base(without(part, name), byte_tokenizer(), encoders=[])
    wide = whole | {"vision_config": whole["vision_config"] | {"out_hidden_size": 32}}
    with pytest.raises(CheckpointError, match=r"do not fit each other.*width 32.*width 64"):
        config_on_base(wide, byte_tokenizer(), encoders=[])


@pytest.mark.parametrize("base", BASES)
def test_layers_that_stay_whole_are_layers_of_the_model(base: str) -> None:
    """FSDP refuses a model that names a class it does not have."""
    model, _ = tiny_model(("dino", "sam"), base=base)
    classes = {type(module).__name__ for module in model.modules()}
    whole = set(model._no_split_modules)
    assert type(model.model.layers[0]).__name__ in whole
    assert type(model.visual.blocks[0]).__name__ in whole
    assert {name for name in whole if name.startswith("Qwen")} <= classes


def test_patches_of_another_base_are_refused() -> None:
    model, _ = tiny_model(("clip",), base="qwen3_vl")
    with pytest.raises(UserError, match=r"another size.*1176 values.*1536: patches of 16 x 16"):
        model.encode_images(torch.zeros(16, 1176), torch.tensor([[1, 4, 4]]))


@pytest.mark.parametrize("base", NEWER)
def test_the_tower_sees_each_picture_alone(base: str) -> None:
    """Windows and positions are a picture's own: a batch of pictures is as many single ones."""
    model, processor = tiny_model(("clip",), base=base)
    shapes = [(84, 84), (28, 120), (96, 40)]
    many = processor(
        images=[picture(i, *shape) for i, shape in enumerate(shapes)], text=f"{IMAGE_TAG}" * 3
    )
    grids = many["image_grid_thw"]
    pieces = many["pixel_values"].split(grids.prod(-1).tolist())
    with torch.no_grad():
        together = model.encode_images(many["pixel_values"], grids)
        for i, pixels in enumerate(pieces):
            (alone,) = model.encode_images(pixels, grids[i : i + 1])
            torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=0)
    levels = 2 if base == "qwen3_vl" else 0
    assert together[0].shape[-1] == 64 * (1 + levels)


def test_re_encoded_pictures_enter_at_the_input_alone() -> None:
    """Deepstack (docs/decisions/re-encoded-depth.md): a picture at its own place has features for
    deeper layers; one that was re-encoded, by the same tower even, has none."""
    model, processor = tiny_model(("clip",), base="qwen3_vl")
    row = model.table["clip"]
    call = f"{row.kind.start}{row.kind.control}{row.kind.end}"
    inputs = dict(
        processor(
            images=[picture(1)],
            text=f"{IMAGE_TAG}{call}{row.kind.tag}",
            again={"clip": [picture(1)]},
        )
    )
    seen: list[tuple[torch.Tensor, ...]] = []

    def watch(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shape = kwargs["inputs_embeds"].shape
        seen.append(tuple(d.view(shape) for d in kwargs["deepstack_visual_embeds"]))

    with torch.no_grad():
        (tower,) = model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
        (clip,) = model.encode(
            "clip", pixel_values=inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]
        )
        handle = model.model.register_forward_pre_hook(watch, with_kwargs=True)
        model(**inputs)
        handle.remove()
    assert torch.equal(clip, tower[:, :64])
    shown = inputs["input_ids"][0] == model.config.image_token_id
    again = inputs["input_ids"][0] == row.placeholder
    assert shown.sum() == again.sum() == len(tower)
    for level, deep in enumerate(seen[-1]):
        assert torch.equal(deep[0, shown], tower[:, 64 * (1 + level) : 64 * (2 + level)])
        assert deep[0, shown].abs().min(-1).values.max() > 0
        assert not deep[0, ~shown].any()


def test_masks_for_attention_that_adds_them() -> None:
    embeds = torch.zeros(1, 3, 8)
    assert ready_mask(None, embeds, "sdpa") is None
    lowest = torch.finfo(torch.float32).min
    causal = ready_mask(None, embeds, "eager")
    assert causal is not None
    assert torch.equal(causal[0, 0] == 0, torch.ones(3, 3, dtype=torch.bool).tril())
    seen = torch.tensor([[[[True, False]]]])
    assert torch.equal(ready_mask(seen, embeds, "eager"), torch.tensor([[[[0.0, lowest]]]]))
