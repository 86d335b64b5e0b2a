"""Checkpoints that are incomplete, broken or of another kind say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.model.directories import forget_tokens, golden_weights, load, published
from vpt_agent.errors import CheckpointError
from vpt_agent.model import VPTConfig
from vpt_agent.model.testing import tiny_model


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


@pytest.mark.parametrize("trained", [True, False])
def test_tokens_beyond_the_embedding_rows(tmp_path: Path, trained: bool) -> None:
    """Tokens that were added on loading get rows; trained ones cannot be without."""
    weights = golden_weights("clip_tied")
    name = "model.embed_tokens.weight"
    weights[name] = weights[name][: 411 if trained else 391].clone()
    path = published(tmp_path, weights=weights, vocab_size=len(weights[name]))
    if trained:
        with pytest.raises(CheckpointError, match=r"ids beyond the embedding rows.*action_end"):
            load(path)
        return
    forget_tokens(path, after=390)
    data = json.loads((path / "config.json").read_text())
    data["clip_action_id"] = data["clip_action_start_id"] = None
    (path / "config.json").write_text(json.dumps(data))
    model = load(path)
    rows = model.model.embed_tokens.weight
    assert rows.shape == (448, 64)
    assert torch.equal(rows[:391], weights[name])
    assert model.lm_head.weight is rows


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
