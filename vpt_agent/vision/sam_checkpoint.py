"""Original SAM checkpoints (`.pth`): read safely, their sizes, and transformers' names for them.

The names on both sides are those of segment-anything 1.0 and of transformers' ``SamModel``; the
tensors are the same, only renamed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpt_agent.errors import CheckpointError

ENCODER = "vision_encoder."
"""Prefix of the vision encoder's keys in transformers' ``SamModel``."""

SUFFIXES = (".pth", ".pt")
"""File names that mean an original checkpoint; transformers writes folders."""

_GAUSSIAN = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_NECK = {"0": "conv1", "1": "layer_norm1", "2": "conv2", "3": "layer_norm2"}
_MASK = {"0": "conv1", "1": "layer_norm1", "3": "conv2", "4": "layer_norm2", "6": "conv3"}
_UPSCALE = {"0": "upscale_conv1", "1": "upscale_layer_norm", "3": "upscale_conv2"}
_BLOCK = re.compile(r"image_encoder\.blocks\.(\d+)\.")
_NORM = re.compile(r"\.norm(\d)\.")
_FINAL = "mask_decoder.transformer.norm_final_attn."
_HEAD = re.compile(r"^(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))"
                   r"\.layers\.(\d+)\.")  # fmt: skip


class SamSizes(NamedTuple):
    """What the tensors of an original checkpoint say of the model, by transformers' names.

    Not in them, and the same in every released one: 8 heads in the mask decoder, whose attention
    is half as wide, GELU, and an epsilon of 1e-6.
    """

    vision: dict[str, Any]
    prompt: dict[str, Any]
    decoder: dict[str, Any]


def is_original(path: Path) -> bool:
    """Whether ``path`` names an original checkpoint: a file, where transformers has a folder."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def read_sam(path: Path) -> dict[str, Tensor]:
    """The tensors of an original checkpoint on the CPU, float32; nothing in the file is run.

    Raises :class:`CheckpointError` for what is no such checkpoint.
    """
    if not path.is_file():
        raise CheckpointError("there is no such SAM checkpoint", where=path, fix="check the path")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        raise CheckpointError(
            "this SAM checkpoint cannot be read",
            where=path,
            got=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
            expected="a file of tensors by name, such as sam_vit_b_01ec64.pth",
            fix="take it from its own source again; files that hold code are not loaded",
        ) from error
    names = data if isinstance(data, Mapping) else {}
    state = {k: v.float() for k, v in names.items() if isinstance(v, Tensor)}
    if "image_encoder.patch_embed.proj.weight" not in state or len(state) != len(names):
        raise CheckpointError(
            "this is no checkpoint of the original SAM",
            where=path,
            got=", ".join(sorted(map(str, names))[:3]) or type(data).__name__,
            expected="tensors named image_encoder.*, prompt_encoder.* and mask_decoder.*",
        )
    return state


def sam_sizes(state: Mapping[str, Tensor], where: object = None) -> SamSizes:
    """Sizes of the model whose tensors these are. Raises :class:`CheckpointError`."""
    try:
        vision = _vision(state)
        out = vision["output_channels"]
        sides = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
        head = [
            k for k in state if re.match(r"mask_decoder\.iou_prediction_head\.layers\.\d+\.b", k)
        ]
        layers = {int(k.split(".")[3]) for k in state
                  if k.startswith("mask_decoder.transformer.layers.")}  # fmt: skip
        decoder = {
            "hidden_size": out,
            "mlp_dim": len(state["mask_decoder.transformer.layers.0.mlp.lin1.bias"]),
            "num_hidden_layers": len(layers),
            "num_attention_heads": 8,
            "attention_downsample_rate": 2,
            "num_multimask_outputs": len(state["mask_decoder.mask_tokens.weight"]) - 1,
            "iou_head_depth": len(head),
            "iou_head_hidden_dim": len(state["mask_decoder.iou_prediction_head.layers.0.bias"]),
        }
        channels = len(state["prompt_encoder.mask_downscaling.3.bias"])
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            "tensors are missing from this SAM checkpoint", where=where, got=f"no {error}"
        ) from error
    prompt = {"hidden_size": out, "mask_input_channels": channels, **sides}
    return SamSizes(vision, prompt, decoder)


def _vision(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The vision encoder's sizes; windows and heads from the relative positions' tables."""
    patch = state["image_encoder.patch_embed.proj.weight"]  # [D, 3, p, p]
    side = state["image_encoder.pos_embed"].shape[1]  # [1, side, side, D]
    count = len({m[1] for k in state if (m := _BLOCK.match(k))})
    tables = [state[f"image_encoder.blocks.{i}.attn.rel_pos_h"] for i in range(count)]
    spans = [(len(table) + 1) // 2 for table in tables]  # [2 * window - 1, D / heads]
    windows = [span for span in spans if span != side]
    out = len(state["image_encoder.neck.0.weight"])
    return {
        "hidden_size": len(patch),
        "num_hidden_layers": count,
        "num_attention_heads": len(patch) // tables[0].shape[1],
        "mlp_dim": len(state["image_encoder.blocks.0.mlp.lin1.bias"]),
        "image_size": side * patch.shape[2],
        "patch_size": patch.shape[2],
        "output_channels": out,
        "num_pos_feats": out // 2,
        "window_size": windows[0] if windows else 0,
        "global_attn_indexes": [i for i, span in enumerate(spans) if span == side],
        "layer_norm_eps": 1e-6,
    }


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names of transformers' ``SamModel``."""
    depths: dict[str, int] = {}
    for key in state:
        if found := _HEAD.match(key):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]))
    result = {_renamed(key, depths): value for key, value in state.items()}
    if _GAUSSIAN in state:
        result["shared_image_embedding.positional_embedding"] = state[_GAUSSIAN]
        result["prompt_encoder.shared_embedding.positional_embedding"] = state[_GAUSSIAN]
    return result


def converted_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision encoder's tensors alone, by the names of transformers' ``SamVisionEncoder``."""
    every = converted({k: v for k, v in state.items() if k.startswith("image_encoder.")})
    return {key.removeprefix(ENCODER): value for key, value in every.items()}


def _renamed(key: str, depths: Mapping[str, int]) -> str:
    """One key; ``depths`` gives the last layer of each small head."""
    if key == _GAUSSIAN:
        return "prompt_encoder.shared_embedding.positional_embedding"
    if key.startswith("image_encoder."):
        key = key.replace("image_encoder.", ENCODER, 1)
        key = key.replace("patch_embed.proj.", "patch_embed.projection.")
        key = re.sub(r"\.neck\.(\d)\.", lambda m: f".neck.{_NECK[m[1]]}.", key)
        key = key.replace("vision_encoder.blocks.", "vision_encoder.layers.")
    elif key.startswith("prompt_encoder."):
        key = key.replace("point_embeddings.", "point_embed.")
        key = re.sub(r"mask_downscaling\.(\d)\.", lambda m: f"mask_embed.{_MASK[m[1]]}.", key)
    elif found := _HEAD.match(key):
        number = int(found[2])
        last = number == depths[found[1]]
        place = "proj_in" if not number else "proj_out" if last else f"layers.{number - 1}"
        return f"{found[1]}.{place}.{key[found.end() :]}"
    else:
        key = re.sub(r"output_upscaling\.(\d)\.", lambda m: f"{_UPSCALE[m[1]]}.", key)
        key = key.replace(_FINAL, "mask_decoder.transformer.layer_norm_final_attn.")
    return _NORM.sub(r".layer_norm\1.", key)
