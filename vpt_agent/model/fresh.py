"""A fresh VPT model from a base (a checkpoint or a config): config, new tokens, new parts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Model, PreTrainedTokenizerBase, SamModel

from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model.bases import BASES, Base
from vpt_agent.model.configuration import CONFIGS, VPTConfig, perception_manifest
from vpt_agent.model.published import PUBLISHED_ENCODERS, text_sizes, vision_sizes
from vpt_agent.model.sam_checkpoint import original_encoder
from vpt_agent.model.tokenizer import extend, load_tokenizer, token_ids
from vpt_agent.tokens.table import IM_END, IM_START, PerceptionTable
from vpt_agent.vision.policy import DEFAULT_POLICY, ImagePolicy
from vpt_agent.vision.sam_checkpoint import is_original, read_sam, sam_sizes

if TYPE_CHECKING:
    from vpt_agent.model.modeling import VPTForConditionalGeneration

EMBEDDING_MULTIPLE = 64
"""Embedding rows are a multiple of this after a resize, as published."""


@dataclass(frozen=True)
class FromScratch:
    """How a plain Qwen-VL becomes a VPT model; see ``from_pretrained``. None is not said."""

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
    """The config that makes a VPT model of the plain Qwen-VL in ``folder``."""
    data: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    table = _table(wanted.encoders or (), controls=wanted.controls, grid=wanted.grid)
    tokenizer, _ = load_tokenizer(str(folder), table)
    sizes = base_sizes(data, str(folder))
    images = image_policy(data["model_type"], sizes["vision_config"], folder)
    shapes = _encoder_shapes(table, wanted.weights or {})
    config = _config(data, sizes, tokenizer, table, images=images, encoders=shapes)
    kinds = [k for k in table.kinds if k.payload == "control"]
    parts = [f"{k.projector}." for k in kinds]
    parts += [f"{k.config_prefix}_model." for k in kinds if k.encoder != "base"]
    return config, Fresh(tuple(parts), len(tokenizer))


def config_on_base(
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoders: Iterable[str],
    controls: int = 1,
    grid: int = 8,
    encoder_shapes: Mapping[str, Mapping[str, Any]] | None = None,
) -> VPTConfig:
    """The config of a VPT model on ``base``, for random weights: no files are read.

    ``base`` is a config of transformers (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) or its dict.
    ``tokenizer`` gets the tokens of the kinds (changed in place). ``encoder_shapes`` by kind
    replace values of the published encoders' shapes. To begin from weights there is
    ``VPTForConditionalGeneration.from_pretrained(folder, encoders=[...])``.
    """
    data = dict(base if isinstance(base, Mapping) else base.to_dict())
    if data.get("model_type") not in BASES:
        raise UserError(
            "VPT is not built on this kind of model",
            where="config_on_base",
            got=f"model_type {data.get('model_type')!r}",
            expected=", ".join(BASES),
        )
    table = _table(tuple(encoders), controls=controls, grid=grid)
    extend(tokenizer, table)
    sizes = base_sizes(data, "config_on_base")
    rows = max(sizes["text_config"]["vocab_size"], len(tokenizer))
    if rows > sizes["text_config"]["vocab_size"]:
        sizes["text_config"]["vocab_size"] = -(-rows // EMBEDDING_MULTIPLE) * EMBEDDING_MULTIPLE
    images = image_policy(data["model_type"], sizes["vision_config"])
    shapes = _encoder_shapes(table, {})
    for name, given in (encoder_shapes or {}).items():
        shapes.setdefault(str(table[name].config_prefix), {}).update(given)
    return _config(data, sizes, tokenizer, table, images=images, encoders=shapes)


def _table(encoders: Iterable[str], *, controls: int | None, grid: int | None) -> PerceptionTable:
    return PerceptionTable.published(
        encoders,
        grid=8 if grid is None else grid,
        controls=1 if controls is None else controls,
    )


def _config(
    data: Mapping[str, Any],
    sizes: Mapping[str, Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    table: PerceptionTable,
    *,
    images: ImagePolicy,
    encoders: Mapping[str, Mapping[str, Any]],
) -> VPTConfig:
    vocabulary = tokenizer.get_vocab()
    keep = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
            "tie_word_embeddings", "torch_dtype", "dtype")  # fmt: skip
    text = data.get("text_config") or {}
    values = {k: data[k] for k in keep if data.get(k) is not None}
    if text.get("tie_word_embeddings"):
        values["tie_word_embeddings"] = True
    return CONFIGS[data["model_type"]](
        **sizes,
        encoders=encoders,
        para_start_id=vocabulary[IM_START],
        para_end_id=vocabulary[IM_END],
        perception=perception_manifest(
            table,
            token_ids(tokenizer, table),
            images=images.to_manifest(),
            untrained=[k.name for k in table.kinds],
        ),
        **values,
    )


def base_sizes(data: Mapping[str, Any], source: str) -> dict[str, dict[str, Any]]:
    """``text_config`` and ``vision_config`` of a base's config ``data``, flat ones included.

    A missing size is a :class:`CheckpointError`, never transformers' default.
    """
    base = BASES[data["model_type"]]
    if base.name == "qwen2_vl":
        text, vision = text_sizes(data, source), vision_sizes(data, source)
        return {"text_config": text, "vision_config": vision}
    _require(base.text_fields, data.get("text_config") or data, "the language model's", source)
    _require(base.vision_fields, data.get("vision_config") or {}, "the vision tower's", source)
    read = base.part("config").from_dict(copy.deepcopy(dict(data)))
    text, vision = read.text_config.to_dict(), read.vision_config.to_dict()
    _check_widths(base, text, vision, source)
    return {"text_config": text, "vision_config": vision}


def _require(names: Iterable[str], data: Mapping[str, Any], whose: str, source: str) -> None:
    missing = [name for name in names if data.get(name) is None]
    if missing:
        raise CheckpointError(
            f"the config does not say {whose} sizes",
            where=source,
            got=f"no {', '.join(missing)}",
            fix="take config.json from the checkpoint's own repository",
        )


def _check_widths(
    base: Base, text: Mapping[str, Any], vision: Mapping[str, Any], source: str
) -> None:
    levels = len(vision.get("deepstack_visual_indexes") or ())
    if vision["out_hidden_size"] != text["hidden_size"] or levels > text["num_hidden_layers"]:
        raise CheckpointError(
            "the vision tower and the language model do not fit each other",
            where=source,
            got=f"{levels} levels of visual tokens of width {vision['out_hidden_size']} for "
            f"{text['num_hidden_layers']} layers of width {text['hidden_size']}",
            fix=f"take config.json from the {base.name} checkpoint's own repository",
        )


def image_policy(base: str, vision: Mapping[str, Any], folder: Path | None = None) -> ImagePolicy:
    """The image policy of a fresh model: the default one, in visual tokens of this tower.

    Mean and std are those of the folder's ``preprocessor_config.json``, or else the base's.
    """
    default, row = DEFAULT_POLICY, BASES[base]
    patch, merge = int(vision.get("patch_size", 14)), int(vision.get("spatial_merge_size", 2))
    step = patch * merge
    said = _preprocessor(folder)
    return replace(
        default,
        longest=default.longest // default.step * step,
        crop_longest=(default.crop_longest or default.longest) // default.step * step,
        min_pixels=default.min_pixels // default.step**2 * step**2,
        max_pixels=default.max_pixels // default.step**2 * step**2,
        mean=tuple(said.get("image_mean") or row.mean),
        std=tuple(said.get("image_std") or row.std),
        patch=patch,
        merge=merge,
        temporal=int(vision.get("temporal_patch_size", 2)),
    )


def _preprocessor(folder: Path | None) -> dict[str, Any]:
    file = None if folder is None else folder / "preprocessor_config.json"
    if file is None or not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            "preprocessor_config.json is no JSON", where=file, got=str(error)
        ) from error
    return found


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
            source = Path(weights[kind.name])
            if kind.encoder == "sam" and is_original(source):
                vision = sam_sizes(read_sam(source), source).vision
                given = {k: vision[k] for k in known}
            else:
                given = _encoder_config(source, known)
            shapes[kind.config_prefix] |= given
    return shapes


def _encoder_config(folder: Path, known: Iterable[str]) -> dict[str, Any]:
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the encoder's config cannot be read",
            where=folder,
            expected="a directory of a DINOv2 or SAM model that transformers wrote, or an original "
            "SAM checkpoint (.pth) for the kind sam",
        ) from error
    data = data.get("vision_config") or data
    return {k: data[k] for k in known if data.get(k) is not None}


def _load_dino(folder: Path) -> nn.Module:
    model: nn.Module = Dinov2Model.from_pretrained(folder, dtype=torch.float32)
    return model


def _load_sam(source: Path) -> nn.Module:
    if is_original(source):
        return original_encoder(source)
    model: nn.Module = SamModel.from_pretrained(source, dtype=torch.float32).vision_encoder
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
