"""Checkpoints of every layout load, and broken ones say what is wrong with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tests.parity.goldens import ROOT, VARIANTS, golden
from tests.unit.model.batches import batch
from tests.unit.model.directories import (
    assert_same_weights,
    forget_tokens,
    golden_weights,
    load,
    published,
)
from vpt_agent.errors import CheckpointError
from vpt_agent.model import VPTConfig, VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.published import PUBLISHED_ENCODERS
from vpt_agent.model.testing import tiny_model

Model = VPTForConditionalGeneration


def logits(model: VPTForConditionalGeneration, variant: str, case: str = "train_b1") -> Tensor:
    with torch.no_grad():
        result = model(**golden(variant).inputs(case)).logits
    assert isinstance(result, Tensor)
    return result


# --- published layouts ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_shards_as_on_the_hub(tmp_path: Path, variant: str, shards: int) -> None:
    model = load(published(tmp_path, variant, shards=shards))
    assert_same_weights(model, load(ROOT / variant))


def test_the_first_clip_checkpoint(tmp_path: Path) -> None:
    """Another model type, the projector under its old name, training masks in the config."""
    weights = {
        k.replace("clip_projector.", "depth_projector."): v
        for k, v in golden_weights("clip_tied").items()
    }
    path = published(
        tmp_path,
        weights=weights,
        model_type="vrt_qwen2_vl",
        architectures=["VRT_Qwen2VLForConditionalGeneration"],
        para_mask_id=1,
        para_mask_ratio=0.5,
    )
    model = load(path)
    assert_same_weights(model, load(ROOT / "clip_tied"))
    assert (model.config.para_mask_id, model.config.training["para_mask_id"]) == (0, 1)
    assert model.config.training["para_mask_ratio"] == 0.5
    assert torch.equal(logits(model, "clip_tied"), logits(load(ROOT / "clip_tied"), "clip_tied"))


def test_training_masks_come_back_for_training_only(tmp_path: Path) -> None:
    path = published(tmp_path / "hub", para_mask_id=2, para_mask_ratio=0.25)
    trained = load(path, for_training=True)
    assert (trained.config.para_mask_id, trained.config.para_mask_ratio) == (2, 0.25)
    trained.save_pretrained(tmp_path / "own")
    again = load(tmp_path / "own")
    assert (again.config.para_mask_id, again.config.training["para_mask_id"]) == (0, 2)
    assert load(tmp_path / "own", for_training=True).config.para_mask_ratio == 0.25


def test_the_head_of_a_tied_checkpoint_may_be_stored(tmp_path: Path) -> None:
    weights = golden_weights("clip_tied")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model = load(published(tmp_path, weights=weights))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("variant", "prefix", "parameters"),
    # DINOv2-large at 518 px; the image encoder of SAM ViT-L.
    [("dino_tied", "detection", 304_368_640), ("sam_tied", "seg", 308_278_272)],
)
def test_encoders_without_shapes_are_the_large_ones(
    tmp_path: Path, variant: str, prefix: str, parameters: int
) -> None:
    path = published(tmp_path, variant, drop=(f"{prefix}_config",))
    config = VPTConfig.from_pretrained(path)
    assert config.encoders == {prefix: dict(PUBLISHED_ENCODERS[prefix])}
    assert config.encoders[prefix]["num_hidden_layers"] == 24
    with torch.device("meta"):
        model = Model(config)
    encoder = model.encoder(variant.removesuffix("_tied"))
    assert sum(p.numel() for p in encoder.parameters()) == parameters


def test_an_alignment_checkpoint_has_no_call_tokens_yet(tmp_path: Path) -> None:
    """Its tokenizer knows the placeholder only: the rest is added, and said to be untrained."""
    path = published(
        tmp_path,
        "dino_tied",
        num_inner_forward_run=1,
        detection_action_id=None,
        detection_action_start_id=None,
    )
    forget_tokens(path, after=390)
    model = load(path)
    rows = model.model.embed_tokens.weight
    assert len(rows) == 480, "the spare rows of the checkpoint are enough"
    dino = model.table["dino"]
    assert (dino.placeholder, dino.start, dino.control, dino.end) == (390, 409, 410, 411)
    assert model.config.perception["untrained"] == ["region", "dino"]
    assert model.config.num_inner_forward_run == 1
    processor = VPTProcessor.from_pretrained(path)
    assert processor.tokenizer.convert_tokens_to_ids(dino.kind.start) == 409


@pytest.mark.parametrize(
    ("folder", "trigger"),
    [
        ("Qwen2-VL-2b-VPT-Det", "phrase"),
        ("Qwen2-VL-2b-VPT-Det-NoPrompt", "free"),
        ("models--rp-yu--Qwen2-VL-2b-VPT-Det-NoPrompt/snapshots/abc", "free"),
        ("NoPrompt/Qwen2-VL-2b-VPT-Det", "phrase"),
    ],
)
def test_the_name_says_whether_a_phrase_is_needed(
    tmp_path: Path, folder: str, trigger: str
) -> None:
    config = VPTConfig.from_pretrained(published(tmp_path / folder, "dino_tied"))
    assert config.perception["trigger"] == trigger


def test_a_hub_name_is_read_from_the_cache_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--rp-yu--Qwen2-VL-2b-VPT-Det-NoPrompt"
    published(repository / "snapshots" / ("a" * 40), "dino_tied")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    name = "rp-yu/Qwen2-VL-2b-VPT-Det-NoPrompt"
    options = {"cache_dir": tmp_path, "local_files_only": True}
    model = load(name, **options)
    assert_same_weights(model, load(ROOT / "dino_tied"))
    assert model.config.perception["trigger"] == "free"
    assert model.config.name_or_path == name
    processor = VPTProcessor.from_pretrained(name, **options)
    assert processor.perception["ids"] == model.config.perception["ids"]


def test_a_hub_name_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="neither a directory nor to be had from the hub"):
        load("rp-yu/nothing", cache_dir=tmp_path, local_files_only=True)


# --- our own layout -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"tied": True}, {"tied": False, "controls": 2, "grid": 16}])
def test_saved_and_loaded_are_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    model, processor = tiny_model(**options)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_weights(model, again)
    assert again.config.perception == model.config.perception
    assert again.table == model.table
    assert again.config.projector_scale == options.get("controls", 1)
    auto = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(auto) is Model
    assert type(AutoConfig.from_pretrained(tmp_path)) is VPTConfig
    assert type(AutoProcessor.from_pretrained(tmp_path)) is VPTProcessor


def test_what_is_saved_has_the_published_names(tmp_path: Path) -> None:
    for variant in VARIANTS:
        target = tmp_path / variant
        load(ROOT / variant).save_pretrained(target)
        saved, stored = load_file(target / "model.safetensors"), golden_weights(variant)
        assert saved.keys() == stored.keys()
        assert all(torch.equal(saved[k], stored[k]) for k in stored)


def test_a_renamed_projector_is_saved_under_its_right_name(tmp_path: Path) -> None:
    weights = {
        k.replace("clip_projector.", "depth_projector."): v
        for k, v in golden_weights("clip_tied").items()
    }
    load(published(tmp_path / "hub", weights=weights)).save_pretrained(tmp_path / "own")
    keys = load_file(tmp_path / "own" / "model.safetensors").keys()
    assert any(k.startswith("clip_projector.") for k in keys)
    assert not any(k.startswith("depth_projector.") for k in keys)


def test_saved_in_shards_and_half_precision(tmp_path: Path) -> None:
    model, _ = tiny_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = Model.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert_same_weights(model, again)
    wide = load(tmp_path, device="cpu")
    assert wide.dtype == torch.float32
    assert not wide.training


def test_a_given_config_is_left_as_it_is(tmp_path: Path) -> None:
    model, _ = tiny_model(encoders=("clip",))
    model.save_pretrained(tmp_path)
    config = VPTConfig.from_pretrained(tmp_path)
    config.para_mask_id, config.positions = 1, "published"
    again = load(tmp_path, config=config)
    assert (again.config.para_mask_id, again.config.positions) == (0, "published")
    assert config.para_mask_id == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype: torch.dtype) -> None:
    model, processor = tiny_model()
    inputs = batch(model, processor, [("clip", "")], [("dino", ""), ("sam", "")])
    with torch.no_grad():
        full = model(**inputs)
        half = model.to(dtype)(**inputs)
    assert half.logits.dtype == torch.float32
    assert float(half.loss) == pytest.approx(float(full.loss), rel=0.1)


def test_device_map_and_the_loading_report(tmp_path: Path) -> None:
    model, _ = tiny_model(encoders=("clip",))
    model.save_pretrained(tmp_path)
    again, info = load(tmp_path, device_map="cpu", output_loading_info=True)
    assert_same_weights(model, again)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_published_types_are_known_to_the_auto_classes() -> None:
    path = ROOT / "clip_tied"
    assert type(AutoConfig.from_pretrained(path)) is VPTConfig
    assert_same_weights(AutoModelForImageTextToText.from_pretrained(path), load(path))


def test_a_state_dict_in_memory(tmp_path: Path) -> None:
    model, _ = tiny_model(encoders=("clip",))
    again = Model.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_same_weights(model, again)


def test_push_to_hub_sends_all_that_loading_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without network: the upload itself is replaced, what would be uploaded is looked at."""
    sent: dict[str, set[str]] = {}

    def take(self: object, folder: Any, repo_id: str, *args: object, **kwargs: object) -> None:
        sent.setdefault(repo_id, set()).update(f.name for f in Path(folder).iterdir())

    for owner in (Model, VPTProcessor):
        monkeypatch.setattr(owner, "_upload_modified_files", take)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", _repo)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", _card)
    model, processor = tiny_model(encoders=("clip",))
    model.push_to_hub("me/mine")
    processor.push_to_hub("me/mine")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= sent["me/mine"]
    assert "chat_template.jinja" in sent["me/mine"]


def _repo(self: object, repo_id: str, **_: object) -> Any:
    return type("Repo", (), {"repo_id": repo_id})()


def _card(*_: object, **__: object) -> Any:
    return type("Card", (), {"save": lambda self, path: None})()


def test_the_processor_needs_no_file_of_its_own(tmp_path: Path) -> None:
    path = published(tmp_path)
    assert not (path / "preprocessor_config.json").exists()
    processor = VPTProcessor.from_pretrained(path)
    assert processor.image_processor.size == {"shortest_edge": 3136, "longest_edge": 12845056}
    shutil.copy(ROOT / "images" / "a.png", tmp_path)
    made = processor(images=tmp_path / "a.png", text="<image>What?")
    assert made["image_grid_thw"].tolist() == [[1, 6, 8]]
