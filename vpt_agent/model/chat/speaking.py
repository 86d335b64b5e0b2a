"""A tiny LLaVA that says what it was made to say: a real checkpoint, served by real servers.

Its words depend on the token before them alone: the decoder's layers add nothing to an embedding
that is one direction per token, and the output head is a table from each token to the next. What it
says in a turn is one token, chosen by the last token of the prompt, which its chat template makes
another one behind a tool's result. (LLaVA, since its processor needs no torchvision.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vpt_agent.model.testing import byte_tokenizer
from vpt_agent.tokens.table import END_OF_TEXT, IM_END, IM_START, IMAGE_TAG, RESPONSE_START

_TOLD = "{%- set state.told = true -%}{%- endif -%}"
_TEMPLATE = (
    # Told of the tools is not told of a result: both name the tag.
    "{%- set state = namespace(told=false) -%}"
    "{%- for m in messages -%}"
    f"{IM_START}{{{{ m.role }}}}:"
    "{%- if m.content is string -%}{{ m.content }}"
    f"{{%- if m.role != 'system' and '{RESPONSE_START}' in m.content -%}}" + _TOLD + "{%- else -%}"
    "{%- for part in m.content -%}"
    "{%- if part.type == 'image' -%}" + IMAGE_TAG + "{%- else -%}{{ part.text }}"
    f"{{%- if m.role != 'system' and '{RESPONSE_START}' in part.text -%}}"
    + _TOLD
    + "{%- endif -%}{%- endfor -%}{%- endif -%}"
    f"{IM_END}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{IM_START}"
    "{%- if state.told -%}assistant!{%- else -%}assistant?{%- endif -%}{%- endif -%}"
)


def tiny_llava(words: Sequence[str] = ()) -> tuple[Any, Any]:
    """A LLaVA of random weights and its processor, whose tokenizer has ``words`` besides bytes."""
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2Config,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TAG]})
    tokenizer.add_tokens(list(words))
    vocabulary = tokenizer.get_vocab()
    size = len(tokenizer)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            initializer_range=0.1,
        ),
        text_config=Qwen2Config(
            vocab_size=size,
            hidden_size=size + -size % 8,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.1,
        ),
        image_token_id=vocabulary[IMAGE_TAG],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = vocabulary[IM_END]
    model.generation_config.pad_token_id = vocabulary[END_OF_TEXT]
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor = LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )
    return model, processor


def save_speaking(folder: str | Path, first: str, then: str) -> Path:
    """Write the checkpoint: it answers ``first``, and ``then`` once a result was told."""
    model, processor = tiny_llava([first, then])
    vocabulary = processor.tokenizer.get_vocab()
    pairs = [("?", first), ("!", then), (first, IM_END), (then, IM_END)]
    _speak(model, [(vocabulary[a], vocabulary[b]) for a, b in pairs])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _speak(model: Any, following: Sequence[tuple[int, int]]) -> None:
    """Weights by which each token of a pair is followed by the other, and all else by chance."""
    text = model.model.language_model
    with torch.no_grad():
        for layer in text.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        text.embed_tokens.weight.zero_()
        text.embed_tokens.weight.fill_diagonal_(1.0)
        model.lm_head.weight.zero_()
        for token, after in following:
            model.lm_head.weight[after, token] = 1.0
