"""A fresh VPT model from a plain Qwen2-VL checkpoint: config, new tokens, new parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Model, SamModel

from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model.configuration import VPTConfig, perception_manifest
from vpt_agent.model.published import PUBLISHED_ENCODERS, text_sizes, vision_sizes
from vpt_agent.model.tokenizer import load_tokenizer, token_ids
from vpt_agent.tokens.table import IM_END, IM_START, PerceptionTable
from vpt_agent.vision.policy import DEFAULT_POLICY

if TYPE_CHECKING:
    from vpt_agent.model.modeling import VPTForConditionalGeneration

EMBEDDING_MULTIPLE = 64
"""Embedding rows are a multiple of this after a resize, as published."""


@dataclass(frozen=True)
class FromScratch:
    """How a plain Qwen2-VL becomes a VPT model; see ``from_pretrained``. None is not said."""

    encoders: tuple[str, ...] | None = None
    controls: int | None = None
    grid: int | None = None
    weights: Mapping[str, str | Path] | None = None


@dataclass(frozen=True)
class Fresh:
    """New parts of a model (prefixes of their keys), and the tokens it needs rows for."""

    parts: tuple[str, ...]
    tokens: int


def fresh_config(folder: Path, wanted: FromScratch) -> tuple[VPTConfig, Fresh]:
    """The config that makes a VPT model of the plain Qwen2-VL in ``folder``."""
    data: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    table = PerceptionTable.published(
        wanted.encoders or (),
        grid=8 if wanted.grid is None else wanted.grid,
        controls=1 if wanted.controls is None else wanted.controls,
    )
    tokenizer, _ = load_tokenizer(str(folder), table)
    vocabulary = tokenizer.get_vocab()
    kinds = [k for k in table.kinds if k.payload == "control"]
    encoders = _encoder_shapes(table, wanted.weights or {})
    keep = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
            "tie_word_embeddings", "torch_dtype", "dtype")  # fmt: skip
    text = data.get("text_config") or {}
    values = {k: data[k] for k in keep if data.get(k) is not None}
    if text.get("tie_word_embeddings"):
        values["tie_word_embeddings"] = True
    config = VPTConfig(
        text_config=text_sizes(data, str(folder)),
        vision_config=vision_sizes(data, str(folder)),
        encoders=encoders,
        para_start_id=vocabulary[IM_START],
        para_end_id=vocabulary[IM_END],
        perception=perception_manifest(
            table,
            token_ids(tokenizer, table),
            images=DEFAULT_POLICY.to_manifest(),
            untrained=[k.name for k in table.kinds],
        ),
        **values,
    )
    parts = [f"{k.projector}." for k in kinds]
    parts += [f"{k.config_prefix}_model." for k in kinds if k.encoder != "base"]
    return config, Fresh(tuple(parts), len(tokenizer))


def _encoder_shapes(
    table: PerceptionTable, weights: Mapping[str, str | Path]
) -> dict[str, dict[str, Any]]:
    """Shapes by config prefix: those of the given weights, or the published ones."""
    shapes = {}
    unknown = sorted(set(weights) - {k.name for k in table.kinds if k.encoder in _LOADERS})
    if unknown:
        raise UserError(
            "encoder weights for a kind that has no encoder of its own",
            where="encoder_weights",
            got=unknown,
            expected="any of dino, sam that stand in encoders",
        )
    for kind in table.kinds:
        if kind.encoder not in _LOADERS or kind.config_prefix is None:
            continue
        known = PUBLISHED_ENCODERS[kind.config_prefix]
        shapes[kind.config_prefix] = dict(known)
        if kind.name in weights:
            given = _encoder_config(Path(weights[kind.name]), known)
            shapes[kind.config_prefix] |= given
    return shapes


def _encoder_config(folder: Path, known: Iterable[str]) -> dict[str, Any]:
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the encoder's config cannot be read",
            where=folder,
            expected="a directory of a DINOv2 or SAM model that transformers wrote",
        ) from error
    data = data.get("vision_config") or data
    return {k: data[k] for k in known if data.get(k) is not None}


def _load_dino(folder: Path) -> nn.Module:
    model: nn.Module = Dinov2Model.from_pretrained(folder, dtype=torch.float32)
    return model


def _load_sam(folder: Path) -> nn.Module:
    model: nn.Module = SamModel.from_pretrained(folder, dtype=torch.float32).vision_encoder
    return model


_LOADERS = {"dino": _load_dino, "sam": _load_sam}


def initialise_fresh(
    model: VPTForConditionalGeneration, fresh: Fresh, weights: Mapping[str, str | Path]
) -> None:
    """Rows for the new tokens, and the weights of encoders that were given.

    transformers has given the new parts their random weights. Embeddings grow only if the tokens
    do not fit.
    """
    if fresh.tokens > model.config.text_config.vocab_size:
        grow_embeddings(model, fresh.tokens)
    for name, source in weights.items():
        target = model.encoder(name)
        if target is not None:
            loaded = _LOADERS[model.table[name].kind.encoder](Path(source))
            target.load_state_dict(loaded.state_dict())


def grow_embeddings(model: VPTForConditionalGeneration, tokens: int) -> None:
    """Rows for ``tokens`` tokens, a multiple of 64; as published, for input and output alike.

    Added rows are the mean of the old ones plus normal noise of deviation 1/sqrt(D).
    """
    old = model.config.text_config.vocab_size
    model.resize_token_embeddings(
        tokens, pad_to_multiple_of=EMBEDDING_MULTIPLE, mean_resizing=False
    )
    tables: list[Tensor] = [model.model.embed_tokens.weight, model.lm_head.weight]
    with torch.no_grad():
        for table in tables[: 1 if tables[0] is tables[1] else 2]:
            noise = torch.randn_like(table[old:]) / table.shape[1] ** 0.5
            table[old:] = table[:old].mean(0) + noise
