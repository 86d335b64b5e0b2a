"""Stock Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense) of transformers behind the engine's protocol.

The engine gives positions, masks and a pooled cache, so sessions, batches and pictures in the
middle of a conversation work as for VPT models; transformers' classes compute.

Shapes: B rows, L new tokens, V visual tokens, D the language model's width, W the width of rows
with deeper levels (:mod:`vpt_agent.model.deepstack`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vpt_agent.errors import CheckpointError
from vpt_agent.model.chat.base import StockModel
from vpt_agent.model.deepstack import joined, split


class StockQwen(StockModel):
    """A stock model whose pictures have positions of their own (M-RoPE)."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        deep = getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ()
        self.deep = len(deep)

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        """Patches [P, C*T*p*p] and grids [N, 3] to N blocks of visual tokens [V, W]."""
        output = self.net.model.get_image_features(pixel_values, grid_thw, return_dict=True)
        main = output.pooler_output  # N of [V, D]
        deep = list(getattr(output, "deepstack_features", None) or ())
        if len(deep) != self.deep:
            raise CheckpointError(
                "the vision tower gives other features than its config says",
                where=type(self.net).__name__,
                got=f"{len(deep)} deep features",
                expected=self.deep,
            )
        # By picture, as the main features; transformers 5.17 leaves the pictures together.
        counts = [len(tokens) for tokens in main]
        levels = [torch.split(d, counts) if isinstance(d, Tensor) else d for d in deep]
        return tuple(joined(tokens, list(own)) for tokens, *own in zip(main, *levels, strict=True))

    def run_language_model(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Final-norm hidden states [B, L, D] of ``inputs_embeds`` [B, L, W].

        ``position_ids`` [3, B, L]; ``attention_mask`` bool [B, 1, L, S], or None where plain
        causal attention is the same (one query a row, or a block at the start).
        """
        more: dict[str, Any] = {}
        inputs_embeds, levels = split(inputs_embeds, self.width)
        if levels:
            seen = torch.stack(levels).ne(0).any(-1).any(0)  # [B, L]
            more["visual_pos_masks"] = seen
            more["deepstack_visual_embeds"] = [level[seen] for level in levels]
        mask: Any = None
        unmasked = attention_mask is None and self.attention != "eager"
        if unmasked and self.layer_types is not None and not self.deep:
            # Ready masks, of which there are none: cheaper, where the class takes them by layer.
            mask = dict.fromkeys(self.layer_types)
        else:
            mask = self.mask(inputs_embeds, attention_mask, past_key_values)
        output = self.net.model.language_model(
            inputs_embeds=inputs_embeds.contiguous(),
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            **more,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden
