"""Builds small checkpoint directories of every layout that is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tests.parity.goldens import ROOT
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.model.bases import BASES
from vpt_agent.model.testing import byte_tokenizer, tiny_config, tiny_table
from vpt_agent.model.tokenizer import extend

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")


def published(
    target: Path,
    variant: str = "clip_tied",
    *,
    shards: int = 2,
    weights: dict[str, Tensor] | None = None,
    drop: tuple[str, ...] = (),
    **config: Any,
) -> Path:
    """A golden checkpoint as it would lie on the hub: ``.bin`` shards with an index."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copy(ROOT / variant / name, target)
    data = json.loads((ROOT / variant / "config.json").read_text()) | config
    data = {k: v for k, v in data.items() if k not in drop}
    (target / "config.json").write_text(json.dumps(data))
    tensors = golden_weights(variant) if weights is None else weights
    keys = sorted(tensors)
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    where = {}
    for shard in range(shards):
        name = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        part = keys[shard::shards]
        torch.save({k: tensors[k] for k in part}, target / name)
        where |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return target


def forget_tokens(path: Path, *, after: int) -> None:
    """Take every token with an id above ``after`` out of the tokenizer's files."""
    (path / "added_tokens.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = json.loads((path / name).read_text())
        if name == "tokenizer.json":
            data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] <= after]
        else:
            data["added_tokens_decoder"] = {
                k: v for k, v in data["added_tokens_decoder"].items() if int(k) <= after
            }
        (path / name).write_text(json.dumps(data))


def golden_weights(variant: str) -> dict[str, Tensor]:
    """The weights of a golden checkpoint in float32, by published key."""
    return {k: v.float() for k, v in load_file(ROOT / variant / "model.safetensors").items()}


def plain_model(*, tied: bool = True, seed: int = 0, base: str = "qwen2_vl") -> PreTrainedModel:
    """transformers' own model of a base, in tiny, with random weights, for ``byte_tokenizer``."""
    tokenizer = byte_tokenizer()
    table = tiny_table(())
    extend(tokenizer, table)  # only to fill in a config
    data = tiny_config(tokenizer, table, tied=tied, base=base).to_dict()
    data["text_config"] |= {"vocab_size": len(byte_tokenizer())}
    keep = ("text_config", "vision_config", "image_token_id", "video_token_id",
            "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")  # fmt: skip
    config = BASES[base].part("config")(**{k: data[k] for k in keep})
    torch.manual_seed(seed)
    made: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    return made


def plain_qwen(target: Path, *, tied: bool = True, seed: int = 0, base: str = "qwen2_vl") -> Path:
    """A plain Qwen-VL checkpoint with its tokenizer, in tiny, as transformers writes it."""
    plain_model(tied=tied, seed=seed, base=base).save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    return target


def load(path: Path | str, **options: Any) -> VPTForConditionalGeneration:
    return VPTForConditionalGeneration.from_pretrained(path, dtype=torch.float32, **options)


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert [k for k in left if not torch.equal(left[k], right[k])] == []
