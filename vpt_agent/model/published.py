"""Reads the configs of published VPT checkpoints: flat, with training settings, without tokens.

What lies on the hub under ``rp-yu/``: ``model_type`` ``vrt_qwen2_vl`` or ``qwen2_vl_vpt``, the
language model's sizes at the top level, ids of some perception tokens by prefix, no encoder
shapes. The rest of the ids is looked up in the tokenizer that lies beside the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpt_agent.errors import CheckpointError
from vpt_agent.model.tokenizer import load_tokenizer, token_ids
from vpt_agent.tokens.table import PUBLISHED, PerceptionKind, PerceptionTable

PUBLISHED_MODEL_TYPES = ("qwen2_vl_vpt", "vrt_qwen2_vl")

PUBLISHED_IMAGES: Mapping[str, Any] = {"kind": "published", "longest": 512}
"""Image policy of every published checkpoint."""

PUBLISHED_ENCODERS: Mapping[str, Mapping[str, Any]] = {
    # DINOv2-large and the vision encoder of SAM ViT-L: no published config says so.
    "detection": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_ratio": 4,
        "image_size": 518, "patch_size": 14, "layer_norm_eps": 1e-6,
    },
    "seg": {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_dim": 4096,
        "output_channels": 256, "image_size": 1024, "patch_size": 16, "window_size": 14,
        "global_attn_indexes": [5, 11, 17, 23], "layer_norm_eps": 1e-6,
    },
}  # fmt: skip

_TEXT_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "num_key_value_heads")  # fmt: skip
_TEXT_OPTIONAL = ("hidden_act", "max_position_embeddings", "rms_norm_eps", "use_sliding_window",
                  "sliding_window", "max_window_layers", "attention_dropout", "initializer_range",
                  "rope_theta", "rope_scaling", "rope_parameters", "bos_token_id", "eos_token_id",
                  "use_cache")  # fmt: skip
_VISION = ("depth", "embed_dim", "hidden_size", "hidden_act", "mlp_ratio", "num_heads",
           "in_channels", "patch_size", "spatial_merge_size", "temporal_patch_size",
           "initializer_range")  # fmt: skip
_VISION_RENAMED = {"in_chans": "in_channels", "spatial_patch_size": "patch_size"}
_KEPT = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
         "tie_word_embeddings", "num_inner_forward_run", "para_start_id", "para_end_id",
         "torch_dtype", "dtype")  # fmt: skip


def from_published(
    data: Mapping[str, Any], source: str | Path | None, **hub: Any
) -> dict[str, Any]:
    """The config dict of ours that says the same as the published ``data``.

    ``source`` is the directory or hub name it came from (the tokenizer lies there, and the name
    tells whether the model needs its trigger phrase); ``hub`` are download options. Training masks
    go to ``training`` and do not act.
    """
    if not source:
        raise CheckpointError(
            "a published config does not hold its token ids",
            got="a config without the place it came from",
            fix="load it from its directory or hub name, where the tokenizer lies",
        )
    source = str(source)
    table = PerceptionTable.published(
        published_encoders(data), controls=int(data.get("projector_scale", 1))
    )
    tokenizer, added = load_tokenizer(source, table, **hub)
    ids = token_ids(tokenizer, table)
    _check_ids(data, table, ids, source)
    untrained = [k.name for k in table.kinds if k.start in added]
    config: dict[str, Any] = {k: data[k] for k in _KEPT if data.get(k) is not None}
    config |= {
        "model_type": "vpt_qwen2_vl",
        "text_config": text_sizes(data, source),
        "vision_config": vision_sizes(data, source),
        "encoders": {
            k.config_prefix: dict(
                data.get(f"{k.config_prefix}_config") or PUBLISHED_ENCODERS[k.config_prefix]
            )
            for k in table.kinds
            if k.config_prefix is not None and k.config_prefix in PUBLISHED_ENCODERS
        },
        "perception": {
            "table": table.to_manifest(),
            "ids": ids,
            "images": dict(PUBLISHED_IMAGES),
            "regions": "published",
            "trigger": "free" if _chooses_freely(source) else "phrase",
            "untrained": untrained,
            "domain": "",
            "tools": {},
        },
        "positions": "published",
        "gradients": "published",
        "control": "published",
        "training": {
            k: data[k] for k in ("para_mask_id", "para_mask_ratio") if data.get(k) is not None
        },
    }
    return config


def _chooses_freely(source: str) -> bool:
    # Two checkpoints have equal configs: only their names tell which one needs no phrase.
    parts = Path(source).parts
    names = [*parts[-1:], *(part for part in parts if part.startswith("models--"))]
    return any(name.endswith("NoPrompt") for name in names)


def published_encoders(data: Mapping[str, Any]) -> list[str]:
    """Names of the re-encoding kinds that a published config sets ids for, or lists."""
    rows = [k for k in PUBLISHED.values() if k.config_prefix]
    with_ids = [k.name for k in rows if data.get(f"{k.config_prefix}_image_token_id") is not None]
    listed = data.get("vision_encoder_ls") or []
    return with_ids or [k.name for k in rows if k.name in listed]


def text_sizes(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The language model's fields of a flat config; a missing size is an error, never a default."""
    inner = data.get("text_config") or data
    missing = [name for name in _TEXT_NEEDED if inner.get(name) is None]
    if missing:
        raise CheckpointError(
            "the config does not say the language model's sizes",
            where=source,
            got=f"no {', '.join(missing)}",
            fix="take config.json from the checkpoint's own repository",
        )
    names = (*_TEXT_NEEDED, *_TEXT_OPTIONAL)
    return {k: inner[k] for k in names if inner.get(k) is not None}


def vision_sizes(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The vision tower's fields; old names are translated."""
    given = data.get("vision_config")
    if not given:
        raise CheckpointError(
            "the config has no vision_config",
            where=source,
            fix="take config.json from the checkpoint's own repository",
        )
    renamed = {new: given[old] for old, new in _VISION_RENAMED.items() if old in given}
    sizes = renamed | {k: given[k] for k in _VISION if given.get(k) is not None}
    sizes.setdefault("hidden_size", text_sizes(data, source)["hidden_size"])
    return sizes


def _check_ids(
    data: Mapping[str, Any], table: PerceptionTable, ids: Mapping[str, int], source: str
) -> None:
    def said(kind: PerceptionKind, field: str, token: str | None) -> None:
        value = data.get(f"{kind.config_prefix}_{field}")
        if value is not None and token is not None and value != ids[token]:
            raise CheckpointError(
                "the config and the tokenizer disagree about a perception token",
                where=source,
                got=f"{token} is {ids[token]} in the tokenizer, {value} in config.json",
                fix="take both files from the same checkpoint",
            )

    for kind in table.kinds:
        if kind.config_prefix:
            said(kind, "image_token_id", kind.placeholder)
            said(kind, "action_start_id", kind.start)
            said(kind, "action_id", kind.control)
