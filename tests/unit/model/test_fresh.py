"""A plain Qwen2-VL checkpoint becomes a fresh VPT model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.goldens import ROOT
from tests.unit.model.directories import assert_same_weights, load, plain_qwen
from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model import VPTConfig, VPTProcessor
from vpt_agent.model.published import PUBLISHED_ENCODERS


@pytest.fixture
def large_encoders_are_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published encoders are too large for a test."""
    from vpt_agent.model import fresh

    small = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    shapes = {k: {**v, **small} for k, v in PUBLISHED_ENCODERS.items()}
    shapes["seg"] |= {"mlp_dim": 64, "global_attn_indexes": [0]}
    monkeypatch.setattr(fresh, "PUBLISHED_ENCODERS", shapes)


@pytest.mark.usefixtures("large_encoders_are_tiny")
@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_gets_kinds(tmp_path: Path, tied: bool) -> None:
    path = plain_qwen(tmp_path / "plain", tied=tied)
    torch.manual_seed(0)
    model = load(path, encoders=["clip", "dino", "sam"], controls=2, grid=16)
    stored = load_file(path / "model.safetensors")
    old = stored["model.embed_tokens.weight"]
    rows = model.model.embed_tokens.weight
    assert len(rows) % 64 == 0
    assert len(rows) >= len(VPTProcessor.from_pretrained(path, config=model.config).tokenizer)
    assert torch.equal(rows[: len(old)], old)
    new = rows[len(old) :].detach()
    assert torch.allclose(new.mean(0), old.mean(0), atol=0.1)
    assert new.std(0).mean() == pytest.approx(64**-0.5, rel=0.2)
    assert (model.lm_head.weight is rows) == tied
    assert model.lm_head.weight.shape == rows.shape
    assert [r.name for r in model.table.rows] == ["region", "clip", "dino", "sam"]
    assert model.config.perception["untrained"] == ["region", "clip", "dino", "sam"]
    assert (model.config.projector_scale, model.table["region"].kind.grid) == (2, 16)
    assert model.config.positions == "mrope"
    for kind in ("clip", "dino", "sam"):
        projector = model.projector(kind)
        assert float(projector.linear_condition.bias.detach().abs().max()) == 0
        bound = (6 / (64 + 128)) ** 0.5  # xavier-uniform
        assert float(projector.linear_condition.weight.detach().abs().max()) <= bound
        assert float(projector.linear_condition.weight.detach().std()) > bound / 3
    model.save_pretrained(tmp_path / "own")
    VPTProcessor.from_pretrained(path, config=model.config).save_pretrained(tmp_path / "own")
    assert_same_weights(load(tmp_path / "own"), model)


def test_transformers_new_layout_of_a_plain_model(tmp_path: Path) -> None:
    """Some Qwen2-VL checkpoints were saved with ``model.language_model`` and ``model.visual``."""
    path = plain_qwen(tmp_path)
    weights = load_file(path / "model.safetensors")
    renamed = {
        f"model.{k}" if k.startswith("visual.") else k.replace("model.", "model.language_model."): v
        for k, v in weights.items()
    }
    before = load(path, encoders=[])
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    after = load(path, encoders=[])
    stored = [k for k in before.state_dict() if "embed_tokens" not in k and k != "lm_head.weight"]
    assert all(torch.equal(before.state_dict()[k], after.state_dict()[k]) for k in stored)


def test_a_plain_model_without_kinds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"plain Qwen-VL.*encoders=\[\"clip\"\]"):
        load(plain_qwen(tmp_path))


def test_unknown_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown encoder.*siglip"):
        load(plain_qwen(tmp_path), encoders=["siglip"])


def test_what_is_said_about_a_vpt_checkpoint_must_be_so() -> None:
    path = ROOT / "clip_tied"
    assert load(path, encoders=["clip"], controls=1, grid=8).table["clip"]
    for said, has in (
        ({"encoders": ["dino"]}, r"encoders=\['dino'\].*encoders=\['clip'\]"),
        ({"controls": 2}, r"controls=2.*controls=1"),
        ({"grid": 16}, r"grid=16.*grid=8"),
        ({"encoder_weights": {"dino": path}}, r"encoder_weights=.*its own"),
    ):
        with pytest.raises(UserError, match=rf"another one than asked for.*{has}"):
            load(path, **said)


def test_a_plain_model_takes_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gets its VPT config here, and takes none"):
        load(plain_qwen(tmp_path), encoders=[], config=VPTConfig())


@pytest.mark.usefixtures("large_encoders_are_tiny")
@pytest.mark.parametrize(("kind", "prefix"), [("dino", "detection"), ("sam", "seg")])
def test_encoder_weights_from_their_own_checkpoints(tmp_path: Path, kind: str, prefix: str) -> None:
    from transformers import Dinov2Config, Dinov2Model, SamConfig, SamModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "dino":
        source = Dinov2Model(Dinov2Config(**sizes, image_size=224, patch_size=14, mlp_ratio=2))
        encoder = source
    else:
        vision = {**sizes, "mlp_dim": 64, "output_channels": 256, "num_pos_feats": 128,
                  "global_attn_indexes": [0], "initializer_range": 0.02}  # fmt: skip
        source = SamModel(SamConfig(vision_config=vision))
        encoder = source.vision_encoder
    source.save_pretrained(tmp_path / kind)
    model = load(
        plain_qwen(tmp_path / "plain"), encoders=[kind], encoder_weights={kind: tmp_path / kind}
    )
    assert model.config.encoders[prefix]["hidden_size"] == 48
    loaded = model.encoder(kind)
    assert loaded is not None
    assert_same_weights(loaded, encoder)


def test_encoder_weights_must_fit_the_kinds(tmp_path: Path) -> None:
    path = plain_qwen(tmp_path / "plain")
    with pytest.raises(UserError, match=r"no encoder of its own.*\['clip'\]"):
        load(path, encoders=["clip"], encoder_weights={"clip": tmp_path})
    with pytest.raises(CheckpointError, match="encoder's config cannot be read"):
        load(path, encoders=["dino"], encoder_weights={"dino": tmp_path / "nowhere"})
