"""Models of random weights to measure on: the 40 M shape, and any checkpoint's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.fresh import config_on_base
from vpt_agent.model.testing import byte_tokenizer
from vpt_agent.tokens.table import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)

ENCODER_SHAPES: dict[str, dict[str, Any]] = {
    "dino": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
    "sam": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "mlp_dim": 1024,
        "global_attn_indexes": [1, 3],
    },
}
"""Small encoders of the published architectures, at the published input sizes."""


@dataclass(frozen=True)
class TextShape:
    """A language model's sizes; ``sections`` are those of M-RoPE and sum to half a head."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    sections: tuple[int, int, int]
    tied: bool = True


@dataclass(frozen=True)
class VisionShape:
    """A base tower's sizes."""

    depth: int
    width: int
    heads: int


FORTY_M = (
    TextShape(512, 8, 8, 2, 2048, 8000, (8, 12, 12)),
    VisionShape(4, 256, 4),
)
"""About 40 M parameters: the shape of the aims for one answer."""

THREE_HUNDRED_M = (
    TextShape(1024, 20, 16, 4, 4096, 8000, (8, 12, 12)),
    VisionShape(4, 256, 4),
)
"""About 300 M parameters: more than the caches of most processors hold."""

TWO_B = (
    TextShape(1536, 28, 12, 2, 8960, 151936, (16, 24, 24)),
    VisionShape(32, 1280, 16),
)
"""Qwen2-VL-2B's."""

SHAPES = {"40m": FORTY_M, "300m": THREE_HUNDRED_M, "2b": TWO_B}


def random_model(
    text: TextShape,
    vision: VisionShape,
    *,
    encoders: Iterable[str] = ("clip",),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """A Qwen2-VL of these sizes with perception kinds, random weights, and its processor.

    The same seed gives the same weights on the same kind of device. Its tokenizer has single
    bytes; the vocabulary is as large as the shape says.
    """
    tokenizer = byte_tokenizer()
    ids = tokenizer.get_vocab()
    # Wide enough that logits of random weights differ, whatever the width.
    spread = {"initializer_range": 0.02 * (1536 / text.hidden) ** 0.5}
    base = {
        "model_type": "qwen2_vl",
        "vocab_size": text.vocabulary,
        "hidden_size": text.hidden,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "intermediate_size": text.intermediate,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.sections)},
        "tie_word_embeddings": text.tied,
        "bos_token_id": ids[END_OF_TEXT],
        "eos_token_id": ids[IM_END],
        **spread,
        "vision_config": {
            "depth": vision.depth,
            "embed_dim": vision.width,
            "hidden_size": text.hidden,
            "num_heads": vision.heads,
            **spread,
        },
        "image_token_id": ids[IMAGE_PAD],
        "video_token_id": ids[VIDEO_PAD],
        "vision_start_token_id": ids[VISION_START],
        "vision_end_token_id": ids[VISION_END],
    }
    names = tuple(encoders)
    shapes = {name: ENCODER_SHAPES[name] for name in names if name in ENCODER_SHAPES}
    config = config_on_base(base, tokenizer, encoders=names, encoder_shapes=shapes)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = VPTForConditionalGeneration(config).to(dtype).eval()
    return model, VPTProcessor.for_model(config, tokenizer)


def load_model(
    path: str | Path, *, device: torch.device, dtype: torch.dtype
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """A checkpoint's model and processor."""
    model = VPTForConditionalGeneration.from_pretrained(path, dtype=dtype)
    processor = VPTProcessor.from_pretrained(path, config=model.config)
    return model.to(device).eval(), processor
