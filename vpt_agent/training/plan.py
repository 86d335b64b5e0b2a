"""What a run will be, before anything is loaded: parameters, tokens a step, memory.

The model is built on torch's meta device, where tensors have shapes and no memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vpt_agent.config import shipped_model
from vpt_agent.errors import UserError
from vpt_agent.model import VPTConfig, VPTForConditionalGeneration, perception_manifest
from vpt_agent.model.bases import BASES
from vpt_agent.model.checkpoint import read_config
from vpt_agent.model.configuration import CONFIGS
from vpt_agent.model.fresh import FromScratch, fresh_config
from vpt_agent.model.published import PUBLISHED_ENCODERS, PUBLISHED_IMAGES
from vpt_agent.model.tokenizer import kind_tokens
from vpt_agent.tokens.table import PerceptionTable
from vpt_agent.training.config import TrainConfig
from vpt_agent.training.freeze import freeze
from vpt_agent.training.run import stage_lists

_VISION: dict[str, Any] = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_ROPE3 = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
          "mrope_interleaved": True}  # fmt: skip

SIZES: Mapping[str, Mapping[str, Any]] = {
    "qwen2-vl-2b": {
        "text": {
            "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
            "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
            "rope_parameters": _ROPE,
        },
        "vision": _VISION | {"hidden_size": 1536},
        "tied": True,
        "tokens": 151657,
    },
    "qwen2-vl-7b": {
        "text": {
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
            "rope_parameters": _ROPE,
        },
        "vision": _VISION | {"hidden_size": 3584},
        "tied": False,
        "tokens": 151657,
    },
    "qwen2.5-vl-3b": {
        "base": "qwen2_5_vl",
        "text": {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008,
            "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "rope_parameters": _ROPE,
        },
        "vision": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "tied": True,
        "tokens": 151665,
    },
    "qwen3-vl-4b": {
        "base": "qwen3_vl",
        "text": {
            "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728,
            "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "rope_parameters": _ROPE3,
        },
        "vision": {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
            "out_hidden_size": 2560, "patch_size": 16, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tied": True,
        "tokens": 151669,
    },
}  # fmt: skip
"""Shapes of the base models, as their public configs give them, for runs without their files.
``tokens`` is the length of the tokenizer before perception tokens are added."""


@dataclass(frozen=True)
class Part:
    """Parameters of one part of the model, by the first part of their names."""

    name: str
    parameters: int
    trainable: int


@dataclass(frozen=True)
class Plan:
    """What a run will be; bytes of memory are for one process without sharding.

    ``tokens_per_step`` is at most: batches are shorter where rows are. ``activations`` is a rough
    estimate of one micro-batch at full length.
    """

    parts: tuple[Part, ...]
    rows_per_step: int | None
    tokens_per_step: int
    steps: int | None
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(part.parameters for part in self.parts)

    @property
    def trainable(self) -> int:
        """Those that learn."""
        return sum(part.trainable for part in self.parts)

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, for JSON."""
        sums = {n: getattr(self, n) for n in ("parameters", "trainable", "memory")}
        return sums | asdict(self)

    def lines(self) -> list[str]:
        """As text."""
        wide = max(len(part.name) for part in self.parts)
        rows = [f"{'part':{wide}}  {'parameters':>15}  {'trainable':>15}"]
        everything = (*self.parts, Part("all", self.parameters, self.trainable))
        rows += [f"{p.name:{wide}}  {p.parameters:15,}  {p.trainable:15,}" for p in everything]
        per = "" if self.rows_per_step is None else f" ({self.rows_per_step} rows)"
        rows.append(f"tokens per step and process: at most {self.tokens_per_step:,}{per}")
        rows.append(f"optimiser steps: {self.steps if self.steps is not None else 'by epochs'}")
        pieces = ("weights", "gradients", "optimizer", "activations")
        told = ", ".join(f"{name} {_size(getattr(self, name))}" for name in pieces)
        rows.append(f"memory, about: {_size(self.memory)} ({told})")
        return rows


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"


def plan(config: TrainConfig) -> Plan:
    """Build the model of ``config`` on the meta device, and count. Downloads and reads no weights.

    Its shapes are those of ``model.sizes``, or of the config in the directory ``model.path``: of a
    VPT checkpoint, or of a base with its tokenizer.
    """
    own = _config(config)
    own.num_inner_forward_run = 1 if config.stage == "alignment" else 2
    with torch.device("meta"):
        model = VPTForConditionalGeneration(own)
    extra = 0
    if config.lora is None:
        freeze(model, **stage_lists(config, model.table))
    else:
        extra = _lora(model, config)
    parts = _parts(model, extra)
    weights = sum(p.parameters for p in parts) * 4
    learning = sum(p.trainable for p in parts)
    longest = config.data.max_length
    rows = None if config.data.tokens else config.data.rows
    batch = config.data.tokens or config.data.rows * longest
    return Plan(
        tuple(parts),
        None if rows is None else rows * config.optim.accumulate,
        batch * config.optim.accumulate,
        config.steps,
        weights,
        learning * 4,
        learning * 8,
        _activations(own, config, batch),
    )


def _config(config: TrainConfig) -> VPTConfig:
    part = config.model
    folder = Path(shipped_model() if part.path == "shipped" else part.path)
    if (folder / "config.json").is_file():
        if read_config(folder)["model_type"] in BASES and part.encoders is not None:
            wanted = FromScratch(part.encoders, part.controls, part.grid, part.encoder_weights)
            return fresh_config(folder, wanted)[0]
        found: VPTConfig = VPTConfig.from_pretrained(folder)
        if found.perception is not None:
            return found
    if part.sizes is None or part.sizes not in SIZES:
        raise UserError(
            "a dry run needs the model's shapes",
            where="model.sizes",
            got=part.sizes,
            expected=" or ".join(SIZES) + ", or a checkpoint's directory in model.path",
        )
    sizes = SIZES[part.sizes]
    table = PerceptionTable.published(
        part.encoders or (), grid=part.grid or 8, controls=part.controls or 1
    )
    # Counting needs no tokenizer: any free ids will do.
    ids = {token: sizes["tokens"] + i for i, token in enumerate(kind_tokens(table))}
    return CONFIGS[sizes.get("base", "qwen2_vl")](
        text_config=dict(sizes["text"]) | {"tie_word_embeddings": sizes["tied"]},
        vision_config=dict(sizes["vision"]),
        tie_word_embeddings=sizes["tied"],
        encoders={k: dict(v) for k, v in PUBLISHED_ENCODERS.items()},
        perception=perception_manifest(table, ids, images=PUBLISHED_IMAGES),
    )


def _parts(model: nn.Module, extra: int) -> list[Part]:
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        first = "embed_tokens" if "embed_tokens" in name else first
        row = counts.setdefault(first, [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    parts = [Part(name, *row) for name, row in counts.items()]
    return [*parts, Part("lora", extra, extra)] if extra else parts


def _lora(model: VPTForConditionalGeneration, config: TrainConfig) -> int:
    """Freeze as the LoRA stage does; how many weights LoRA adds."""
    import re

    part = config.lora
    assert part is not None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(one in name for one in part.also))
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(part.targets, name)
    ]
    return sum(part.rank * (layer.in_features + layer.out_features) for layer in layers)


def _activations(own: VPTConfig, config: TrainConfig, tokens: int) -> int:
    """Bytes kept for one micro-batch of ``tokens``: a rule of thumb, not a measurement.

    A layer keeps some 34 numbers of width D a token without checkpointing (and the MLP's width),
    one with it, besides one layer at work; logits are float32, of labels only (a quarter).
    """
    text = own.text_config
    size = 2 if config.precision == "bfloat16" else 4
    layer = tokens * (16 * text.hidden_size + 3 * text.intermediate_size) * size
    if config.gradient_checkpointing:
        kept = layer + text.num_hidden_layers * tokens * text.hidden_size * size
    else:
        kept = layer * text.num_hidden_layers
    return int(kept) + math.ceil(tokens / 4) * int(text.vocab_size) * 4 * 2
