"""Checkpoints of every layout load, and broken ones say what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tests.parity.goldens import ROOT, VARIANTS, golden
from tests.unit.model.directories import golden_weights, plain_qwen, published
from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model import VPTConfig, VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.published import PUBLISHED_ENCODERS
from vpt_agent.model.testing import tiny_model

Model = VPTForConditionalGeneration


def load(path: Path | str, **options: Any) -> VPTForConditionalGeneration:
    return Model.from_pretrained(path, dtype=torch.float32, **options)


def logits(model: VPTForConditionalGeneration, variant: str, case: str = "train_b1") -> Tensor:
    with torch.no_grad():
        result = model(**golden(variant).inputs(case)).logits
    assert isinstance(result, Tensor)
    return result


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []


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
    (path / "added_tokens.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = json.loads((path / name).read_text())
        if name == "tokenizer.json":
            data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] <= 390]
        else:
            data["added_tokens_decoder"] = {
                k: v for k, v in data["added_tokens_decoder"].items() if int(k) <= 390
            }
        (path / name).write_text(json.dumps(data))
    model = load(path)
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


# --- broken ones ----------------------------------------------------------------------------


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    weights = golden_weights("clip_tied")
    gone = [k for k in weights if k.startswith("clip_projector.linear_condition")]
    for key in gone:
        del weights[key]
    with pytest.raises(
        CheckpointError, match=r"2 tensors are missing.*clip_projector\.linear_condition\.bias"
    ):
        load(published(tmp_path, weights=weights))


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    weights = {k: v for k, v in golden_weights("clip_tied").items() if not k.startswith("visual")}
    with pytest.raises(CheckpointError, match=r"tensors are missing.*visual.*and \d+ more"):
        load(published(tmp_path, weights=weights))


def test_unexpected_tensors_are_named(tmp_path: Path) -> None:
    weights = golden_weights("clip_tied") | {"teacher.weight": torch.zeros(2)}
    with pytest.raises(
        CheckpointError, match=r"1 tensors of the checkpoint have no place.*teacher\.weight"
    ):
        load(published(tmp_path, weights=weights))


def test_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path = published(tmp_path, intermediate_size=96)
    with pytest.raises(
        CheckpointError, match=r"have another shape.*mlp\.down_proj.*\[64, 128\].*\[64, 96\]"
    ):
        load(path)


def test_a_lost_shard_is_named(tmp_path: Path) -> None:
    path = published(tmp_path, shards=3)
    (path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing.*00002-of-00003"):
        load(path)


@pytest.mark.parametrize("keep", [0, 2000])
def test_a_shard_that_was_cut_short_is_named(tmp_path: Path, keep: int) -> None:
    path = published(tmp_path)
    shard = path / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"not written to its end.*00002-of-00002\.bin"):
        load(path)


def test_safetensors_that_were_cut_short(tmp_path: Path) -> None:
    model, _ = tiny_model(encoders=())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"not written to its end.*model\.safetensors"):
        load(tmp_path)


class _Bomb:
    """Would run code if it were unpickled without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("boom",))


def test_pickled_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = published(tmp_path, shards=1)
    torch.save({"x": _Bomb()}, path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"weights cannot be read.*UnpicklingError"):
        load(path)
    assert "boom" not in capsys.readouterr().out


def test_a_broken_index(tmp_path: Path) -> None:
    path = published(tmp_path)
    (path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="index of the shards is broken"):
        load(path)


def test_no_weights(tmp_path: Path) -> None:
    path = published(tmp_path, shards=1)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        load(path)


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"not a checkpoint directory.*no config\.json"):
        load(tmp_path)


def test_config_that_is_no_json(tmp_path: Path) -> None:
    (published(tmp_path) / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON"):
        load(tmp_path)


def test_another_kind_of_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot become a VPT model.*'llama'"):
        load(published(tmp_path, model_type="llama"))


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers"])
def test_sizes_are_never_guessed(tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=f"does not say the language model's.*no {field}"):
        load(published(tmp_path, drop=(field,)))


def test_a_config_without_its_vision_tower(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no vision_config"):
        load(published(tmp_path, drop=("vision_config",)))


def test_config_and_tokenizer_disagree(tmp_path: Path) -> None:
    path = published(tmp_path, clip_action_id=400)
    with pytest.raises(CheckpointError, match=r"disagree.*is 410 in the tokenizer, 400 in config"):
        load(path)


def test_a_published_config_needs_its_tokenizer(tmp_path: Path) -> None:
    path = published(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (path / file).unlink()
    with pytest.raises(CheckpointError, match="tokenizer cannot be read"):
        load(path)
    data = json.loads((path / "config.json").read_text())
    with pytest.raises(CheckpointError, match="does not hold its token ids"):
        VPTConfig.from_dict(data)


# --- a plain Qwen2-VL becomes a VPT model ---------------------------------------------------


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
    with pytest.raises(CheckpointError, match=r"plain Qwen2-VL.*encoders=\[\"clip\"\]"):
        load(plain_qwen(tmp_path))


def test_unknown_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown encoder.*siglip"):
        load(plain_qwen(tmp_path), encoders=["siglip"])


def test_kinds_of_a_vpt_checkpoint_cannot_be_changed_in_passing() -> None:
    assert load(ROOT / "clip_tied", encoders=["clip"]).table["clip"]
    with pytest.raises(UserError, match=r"other kinds than asked for.*\['dino'\].*\['clip'\]"):
        load(ROOT / "clip_tied", encoders=["dino"])


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


def test_the_processor_needs_no_file_of_its_own(tmp_path: Path) -> None:
    path = published(tmp_path)
    assert not (path / "preprocessor_config.json").exists()
    processor = VPTProcessor.from_pretrained(path)
    assert processor.image_processor.size == {"shortest_edge": 3136, "longest_edge": 12845056}
    shutil.copy(ROOT / "images" / "a.png", tmp_path)
    made = processor(images=tmp_path / "a.png", text="<image>What?")
    assert made["image_grid_thw"].tolist() == [[1, 6, 8]]
