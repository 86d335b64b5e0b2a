"""Tiny models with random weights, and a tokenizer made on the spot: tests without files.

They ship with the package, since people who write tools and recipes need them for their tests too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vpt_agent.model.bases import BASES
from vpt_agent.model.configuration import CONFIGS, VPTConfig, perception_manifest
from vpt_agent.model.modeling import VPTForConditionalGeneration
from vpt_agent.model.tokenizer import extend, token_ids
from vpt_agent.tokens.table import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    PerceptionTable,
)

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

    from vpt_agent.model.processing import VPTProcessor

WIDTH = 64
DINO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 14,
    "image_size": 56,
}
SAM: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mlp_dim": 64,
    "patch_size": 4,
    "image_size": 64,
    "output_channels": 16,
    "window_size": 0,
    "global_attn_indexes": [0],
}
SIDES = {"dino": (16, 56), "sam": (16, 64)}
"""Visual tokens and input size (pixels a side) of the tiny encoders."""
_TOWER: dict[str, Any] = {"num_heads": 2, "initializer_range": 0.1}
TOWERS: dict[str, dict[str, Any]] = {
    "qwen2_vl": _TOWER | {"depth": 1, "embed_dim": 32, "hidden_size": WIDTH},
    # Windows of 2 x 2 visual tokens, so that tiny pictures hold several; the last layer sees all.
    "qwen2_5_vl": _TOWER | {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": WIDTH,
        "window_size": 56, "fullatt_block_indexes": [1],
    },
    # Two inner layers feed the first two of three layers of the language model.
    "qwen3_vl": _TOWER | {
        "depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": WIDTH,
        "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    },
}  # fmt: skip
"""Shapes of the tiny vision towers, by base."""
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TEXTS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"num_hidden_layers": 2, "rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
    "qwen2_5_vl": {"num_hidden_layers": 2, "rope_parameters": _ROPE | {"mrope_section": [2, 3, 3]}},
    "qwen3_vl": {
        "num_hidden_layers": 3,
        "head_dim": 24,  # not width / heads, as in some of the real ones
        "rope_parameters": _ROPE | {"mrope_section": [4, 4, 4], "mrope_interleaved": True},
    },
}
"""What the tiny language models of the bases do not share."""


def byte_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2 tokenizer of single bytes, with the tokens of the conversation layout."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=None)
    special = [END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.eos_token, tokenizer.pad_token = IM_END, END_OF_TEXT
    return tokenizer


def tiny_table(encoders: Iterable[str], *, controls: int = 1, grid: int = 8) -> PerceptionTable:
    """The published rows, with the tiny encoders' sizes."""
    table = PerceptionTable.published(encoders, grid=grid, controls=controls)
    rows = []
    for kind in table.kinds:
        if kind.name in SIDES:
            count, side = SIDES[kind.name]
            kind = replace(kind, visual_tokens=count, input_size=side)
        rows.append(kind)
    return PerceptionTable(tuple(rows), controls)


def tiny_config(
    tokenizer: Qwen2Tokenizer,
    table: PerceptionTable,
    *,
    tied: bool = True,
    base: str = "qwen2_vl",
) -> VPTConfig:
    """Two layers of width 64, a one-layer tower (three and three for Qwen3-VL); ids from
    ``tokenizer``, which must have them. ``base`` is a row of ``vpt_agent.model.bases``."""
    vocabulary = tokenizer.get_vocab()
    return CONFIGS[base](
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            # Wide enough that random logits differ from token to token.
            "initializer_range": 0.1,
            "bos_token_id": None,
            "eos_token_id": vocabulary[IM_END],
            "pad_token_id": vocabulary[END_OF_TEXT],
            "tie_word_embeddings": tied,
            **TEXTS[base],
        },
        vision_config=dict(TOWERS[base]),
        image_token_id=vocabulary[IMAGE_PAD],
        video_token_id=vocabulary[VIDEO_PAD],
        vision_start_token_id=vocabulary[VISION_START],
        vision_end_token_id=vocabulary[VISION_END],
        tie_word_embeddings=tied,
        para_start_id=vocabulary[IM_START],
        para_end_id=vocabulary[IM_END],
        perception=perception_manifest(
            table,
            token_ids(tokenizer, table),
            images=tiny_images(base),
        ),
        encoders={"detection": DINO, "seg": SAM},
    )


def tiny_images(base: str = "qwen2_vl") -> dict[str, Any]:
    """The tiny models' image policy: whole pictures up to 3 x 3 visual tokens, crops to 2 x 2."""
    policy: dict[str, Any] = {"kind": "fit", "longest": 84, "crop_longest": 56}
    if base == "qwen3_vl":
        row = BASES[base]
        policy |= {"longest": 96, "crop_longest": 64, "patch": 16}
        policy |= {"mean": list(row.mean), "std": list(row.std), "min_pixels": 4096}
    return policy


def tiny_model(
    encoders: Iterable[str] = ("clip", "dino", "sam"),
    *,
    tied: bool = True,
    controls: int = 1,
    grid: int = 8,
    seed: int = 0,
    base: str = "qwen2_vl",
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """A model of random weights (float32, eval mode) and its processor; the same seed, the same."""
    from vpt_agent.model.processing import VPTProcessor

    tokenizer = byte_tokenizer()
    table = tiny_table(encoders, controls=controls, grid=grid)
    extend(tokenizer, table)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VPTForConditionalGeneration(
            tiny_config(tokenizer, table, tied=tied, base=base)
        ).eval()
    return model, VPTProcessor.for_model(model.config, tokenizer)
