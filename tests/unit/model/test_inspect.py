"""Inspecting checkpoints of every layout, whole and broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.parity.goldens import ROOT
from vpt_agent.errors import CheckpointError
from vpt_agent.model.inspect import inspect_checkpoint
from vpt_agent.model.testing import tiny_model


def copy(tmp_path: Path, variant: str = "dino_tied") -> Path:
    target = tmp_path / "checkpoint"
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        shutil.copy(ROOT / variant / name, target)
    return target


@pytest.mark.parametrize("variant", ["clip_tied", "clip_untied", "dino_tied", "sam_tied"])
def test_published_layout(variant: str) -> None:
    report = inspect_checkpoint(ROOT / variant)
    weights = load_file(ROOT / variant / "model.safetensors")
    assert report.parameters == sum(t.numel() for t in weights.values())
    assert ("output head" in report.parts) == variant.endswith("untied")
    assert report.trigger == "phrase"
    assert report.training == {"para_mask_id": 0, "para_mask_ratio": 1.0}
    assert [k.name for k in report.kinds] == ["region", variant.split("_")[0]]
    action = report.kinds[1]
    assert (action.start, action.control, action.end, action.placeholder) == (409, 410, 411, 390)
    assert report.missing == ()
    text = report.to_text()
    assert "published (qwen2_vl_vpt)" in text
    assert "only after the trigger phrase" in text
    assert json.loads(json.dumps(report.to_dict()))["parameters"] == report.parameters


def test_our_layout(tmp_path: Path) -> None:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    report = inspect_checkpoint(tmp_path)
    assert report.form == "vpt_agent"
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.images["kind"] == "fit"
    assert report.trigger == "free"


def test_shards_of_the_old_form_and_a_lost_one(tmp_path: Path) -> None:
    target = copy(tmp_path)
    weights = load_file(ROOT / "dino_tied" / "model.safetensors")
    keys = sorted(weights)
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    halves = dict(zip(names, (keys[::2], keys[1::2]), strict=True))
    for name, part in halves.items():
        torch.save({k: weights[k] for k in part}, target / name)
    index = {"weight_map": {k: name for name, part in halves.items() for k in part}}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    whole = inspect_checkpoint(target)
    assert whole.parameters == sum(t.numel() for t in weights.values())
    assert whole.dtype == "float32"
    (target / names[1]).unlink()
    assert inspect_checkpoint(target).missing == (f"the shard {names[1]}",)


def test_missing_weights_and_missing_parts_are_told(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    target = copy(tmp_path)
    assert "weights (looked for" in inspect_checkpoint(target).missing[0]
    weights = load_file(ROOT / "dino_tied" / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("detection_projector")}
    save_file(kept, target / "model.safetensors")
    report = inspect_checkpoint(target)
    assert report.missing == ("weights of detection_projector",)
    assert "missing: weights of detection_projector" in report.to_text()


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        inspect_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        inspect_checkpoint("/no/such/place at all")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON"):
        inspect_checkpoint(tmp_path)
