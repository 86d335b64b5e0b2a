"""Tiny models of other families, with pictures cut in tiles: Idefics3 and LLaVA-Next."""

from __future__ import annotations

from typing import Any

from vpt_agent.model.testing import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}:{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
)
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "initializer_range": 0.1,
}
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


def idefics3() -> tuple[Any, Any]:
    """Tiles with marks of their rows and columns, and the whole picture behind them."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    places = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    tokenizer = byte_tokenizer()
    marks = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, *places]})
    config = Idefics3Config(
        vision_config=VISION | {"image_size": 56},
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer)},
        image_token_id=tokenizer.get_vocab()["<image>"],
        scale_factor=2,
    )
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": 112}, max_image_size={"longest_edge": 56}
    )
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
    return Idefics3ForConditionalGeneration(config).eval(), processor


def llava_next() -> tuple[Any, Any]:
    """Tiles put together, with a learnt vector at the end of each row."""
    from transformers import (
        CLIPVisionConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        Qwen2Config,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    grids = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=28),
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.get_vocab()["<image>"],
        image_grid_pinpoints=grids,
    )
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=grids,
    )
    processor = LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return LlavaNextForConditionalGeneration(config).eval(), processor
