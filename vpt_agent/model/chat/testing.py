"""Tiny stock models with random weights, and tokenizers with chat templates: tests without files.

The templates are written in the shape of the families' own: a section of tools and results in
``<tool_response>`` where the family has them, neither where it has not.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vpt_agent.model.testing import byte_tokenizer
from vpt_agent.tokens.table import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Qwen2Tokenizer

STOCK = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Model types that :func:`tiny_stock` makes."""

_PICTURE = f"{VISION_START}{IMAGE_PAD}{VISION_END}"
_PARTS = (
    "{%- macro said(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part.type == 'image' -%}" + _PICTURE + "{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
_PLAIN = (
    _PARTS + "{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    f"{IM_START}system\\nYou are a helpful assistant.{IM_END}\\n"
    "{%- endif -%}"
    f"{IM_START}{{{{ message.role }}}}\\n{{{{ said(message.content) }}}}{IM_END}\\n"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{IM_START}assistant\\n{{%- endif -%}}"
)
_WITH_TOOLS = (
    _PARTS + "{%- set first = messages[0] -%}"
    "{%- if tools -%}"
    f"{IM_START}system\\n"
    "{%- if first.role == 'system' -%}{{ said(first.content) }}\\n\\n{%- endif -%}"
    "Tools:\\n<tools>{%- for tool in tools -%}\\n{{ tool | tojson }}{%- endfor -%}\\n</tools>\\n"
    'Call them so:\\n<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>'
    f"{IM_END}\\n"
    "{%- elif first.role == 'system' -%}"
    f"{IM_START}system\\n{{{{ said(first.content) }}}}{IM_END}\\n"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'tool' -%}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}"
    f"{IM_START}user{{%- endif -%}}"
    "\\n<tool_response>\\n{{ said(message.content) }}\\n</tool_response>"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}"
    f"{IM_END}\\n{{%- endif -%}}"
    "{%- elif message.role != 'system' -%}"
    f"{IM_START}{{{{ message.role }}}}\\n{{{{ said(message.content) }}}}{IM_END}\\n"
    "{%- endif -%}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{IM_START}assistant\\n{{%- endif -%}}"
)
# Whitespace control would eat a line break that stands between two tags: they are spelled.
TEMPLATES = {name: text.replace("\\n", "{{ '\\n' }}") for name, text in
             {"plain": _PLAIN, "tools": _WITH_TOOLS}.items()}  # fmt: skip
"""Chat templates without tools (as Qwen2-VL and Qwen2.5-VL) and with them (as Qwen3-VL)."""


def chat_tokenizer(template: str = "plain", *, call_tokens: bool = False) -> Qwen2Tokenizer:
    """A tokenizer of single bytes with a chat template of :data:`TEMPLATES`. ``call_tokens``: the
    tags of calls are tokens of their own, as since Qwen2.5."""
    tokenizer = byte_tokenizer()
    if call_tokens:
        tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def tiny_stock(
    model_type: str = "qwen2_vl",
    *,
    template: str | None = None,
    call_tokens: bool | None = None,
    seed: int = 0,
    **text: Any,
) -> tuple[PreTrainedModel, Qwen2Tokenizer]:
    """A stock model of two layers with random weights (float32, eval mode) and its tokenizer. The
    template and tokens are as the family has them; ``text`` changes the text config."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    newer = model_type == "qwen3_vl"
    tokenizer = chat_tokenizer(
        template or ("tools" if newer else "plain"),
        call_tokens=model_type != "qwen2_vl" if call_tokens is None else call_tokens,
    )
    vocabulary = tokenizer.get_vocab()
    ids = {
        "image_token_id": vocabulary[IMAGE_PAD],
        "video_token_id": vocabulary[VIDEO_PAD],
        "vision_start_token_id": vocabulary[VISION_START],
        "vision_end_token_id": vocabulary[VISION_END],
    }
    config = AutoConfig.for_model(
        model_type,
        text_config=_text(len(tokenizer), vocabulary, newer) | text,
        vision_config=_vision(model_type),
        tie_word_embeddings=False,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    made.generation_config.eos_token_id = vocabulary[IM_END]
    return made.float().eval(), tokenizer


def _text(size: int, vocabulary: dict[str, int], newer: bool) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return {
        "vocab_size": size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        # Wide enough that random logits differ from token to token.
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": vocabulary[IM_END],
        "rope_parameters": rope | ({"mrope_interleaved": True} if newer else {}),
        "tie_word_embeddings": False,
    } | ({"head_dim": 16} if newer else {})


def _vision(model_type: str) -> dict[str, Any]:
    shared: dict[str, Any] = {"num_heads": 2, "initializer_range": 0.1}
    if model_type == "qwen2_vl":
        return shared | {"depth": 1, "embed_dim": 32, "hidden_size": 64}
    shared |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
    if model_type == "qwen2_5_vl":
        return shared | {"depth": 2, "window_size": 56, "fullatt_block_indexes": [1]}
    return shared | {
        "depth": 3,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }


def save_stock(folder: str | Path, model_type: str = "qwen2_vl", **options: Any) -> Path:
    """:func:`tiny_stock` as a checkpoint directory, with its image processor's file."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, tokenizer = tiny_stock(model_type, **options)
    patch = 16 if model_type == "qwen3_vl" else 14
    size = {"shortest_edge": 4 * patch * patch, "longest_edge": 36 * patch * patch}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if patch == 16 else {}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=patch, size=size, **half).save_pretrained(folder)
    return Path(folder)
