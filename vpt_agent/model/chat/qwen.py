"""Stock Qwen2-VL, Qwen2.5-VL and Qwen3-VL (dense) of transformers behind the engine's protocol.

The engine gives positions, masks and a pooled cache, so sessions, batches and pictures in the
middle of a conversation work as for VPT models; transformers' classes compute.

Shapes: B rows, L new tokens, V visual tokens, D the language model's width, W the width of rows
with deeper levels (:mod:`vpt_agent.model.deepstack`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model.deepstack import joined, split
from vpt_agent.tokens.table import ResolvedTable


class StockQwen:
    """A stock model as the engine needs it; ``net`` is transformers' own. It has no perception
    kinds: its tools are called as JSON."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.config: Any = self.net.config
        text = self.config.get_text_config()
        sliding = [kind for kind in getattr(text, "layer_types", None) or () if "full" not in kind]
        if sliding:
            raise CheckpointError(
                "layers that see a window of the conversation only are not supported",
                where=type(net).__name__,
                got=f"{len(sliding)} of {text.num_hidden_layers} layers: {sliding[0]}",
                fix="set use_sliding_window to false in its config, if the window is longer than "
                "your conversations",
            )
        self.width: int = text.hidden_size
        deep = getattr(self.config.vision_config, "deepstack_visual_indexes", None) or ()
        self.deep = len(deep)
        self._layer_types = getattr(text, "layer_types", None)
        self._table = ResolvedTable(())

    @property
    def table(self) -> ResolvedTable:
        """No kinds."""
        return self._table

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        found: torch.dtype = self.net.dtype
        return found

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        found: torch.device = self.net.device
        return found

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        """The embedding: ids [B, L] to [B, L, D]."""
        found: Callable[[Tensor], Tensor] = self.net.get_input_embeddings()
        return found

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
        mask: Any = attention_mask
        inputs_embeds, levels = split(inputs_embeds, self.width)
        if levels:
            seen = torch.stack(levels).ne(0).any(-1).any(0)  # [B, L]
            more["visual_pos_masks"] = seen
            more["deepstack_visual_embeds"] = [level[seen] for level in levels]
        if attention_mask is None and past_key_values is not None:
            mask = self._plain_mask(inputs_embeds, past_key_values)
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

    def _plain_mask(self, embeds: Tensor, cache: Cache) -> Any:
        """Plain causal attention, said so that transformers builds no mask of its own: it would
        take the length of the longest row for every row's."""
        if self._layer_types is not None and not self.deep:
            return dict.fromkeys(self._layer_types)
        batch, length = embeds.shape[:2]
        width, _ = cache.get_mask_sizes(length, 0)
        allowed = torch.ones(length, width, dtype=torch.bool, device=embeds.device)
        return allowed.tril(width - length).expand(batch, 1, length, width)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., D]."""
        logits: Tensor = self.net.lm_head(hidden)
        return logits

    def encode(self, kind: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        """No kinds: raises :class:`UserError`."""
        raise _no_kind(kind)

    def features_from_base(self, kind: str, tower_tokens: Tensor) -> Tensor:
        """No kinds: raises :class:`UserError`."""
        raise _no_kind(kind)

    def condition(self, kind: str, features: Tensor, control: Tensor) -> Tensor:
        """No kinds: raises :class:`UserError`."""
        raise _no_kind(kind)


def _no_kind(kind: str) -> UserError:
    return UserError(
        "a stock model has no perception kinds",
        got=kind,
        fix="make a VPT model of it: PerceptionAgent.from_pretrained(..., encoders=[...])",
    )
