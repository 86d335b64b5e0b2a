"""The base models that VPT is built on: one row each.

All have a vision tower with a merger, a language model with M-RoPE, and the tokens of the Qwen-VL
conversation layout. What differs stands here, or is read from the config's fields.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vpt_agent.vision.policy import CLIP_MEAN, CLIP_STD

Triple = tuple[float, float, float]

_TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads")  # fmt: skip
_VISION = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")


@dataclass(frozen=True)
class Base:
    """One family of base models: transformers' names, and what its configs must say.

    ``name`` is its ``model_type`` and its module, the next three are classes there.
    ``text_fields`` and ``vision_fields`` are the sizes that a plain checkpoint's config has to
    give; ``mean`` and ``std`` normalise pictures where no preprocessor file says it.
    """

    name: str
    config: str
    vision: str
    text: str
    text_fields: tuple[str, ...]
    vision_fields: tuple[str, ...]
    mean: Triple = CLIP_MEAN
    std: Triple = CLIP_STD

    def part(self, name: str) -> Any:
        """A class of this family, by the name of the field that holds its name."""
        kind = "configuration" if name == "config" else "modeling"
        folder = f"transformers.models.{self.name}"
        module = importlib.import_module(f"{folder}.{kind}_{self.name}")
        return getattr(module, getattr(self, name))


BASES: Mapping[str, Base] = {
    base.name: base
    for base in (
        Base(
            "qwen2_vl",
            "Qwen2VLConfig",
            "Qwen2VisionTransformerPretrainedModel",
            "Qwen2VLTextModel",
            _TEXT,
            ("depth", "embed_dim", "num_heads"),
        ),
        Base(
            "qwen2_5_vl",
            "Qwen2_5_VLConfig",
            "Qwen2_5_VisionTransformerPretrainedModel",
            "Qwen2_5_VLTextModel",
            _TEXT,
            (*_VISION, "window_size", "fullatt_block_indexes"),
        ),
        Base(
            "qwen3_vl",
            "Qwen3VLConfig",
            "Qwen3VLVisionModel",
            "Qwen3VLTextModel",
            (*_TEXT, "head_dim"),
            (*_VISION, "deepstack_visual_indexes", "num_position_embeddings", "patch_size"),
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
    )
}
"""Base models by transformers' ``model_type``."""


def build_parts_of(base: str, config: Any) -> tuple[Any, Any]:
    """The vision tower and the language model of ``config``, a VPT config of that base."""
    row = BASES[base]
    vision = row.part("vision")._from_config(config.vision_config)
    return vision, row.part("text")._from_config(config.text_config)
