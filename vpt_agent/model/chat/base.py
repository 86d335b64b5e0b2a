"""What all stock models of transformers have in common behind the engine's protocol.

Shapes: B rows, L new tokens, S cached ones, V visual tokens, D the language model's width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model.attention import ready_mask
from vpt_agent.tokens.table import ResolvedTable


class StockModel:
    """A stock model as the engine needs it; ``net`` is transformers' own. It has no perception
    kinds: its tools are called as JSON."""

    def __init__(self, net: Any) -> None:
        self.net = net
        self.config: Any = net.config
        text = self.config.get_text_config()
        self.layer_types: list[str] | None = getattr(text, "layer_types", None)
        sliding = [kind for kind in self.layer_types or () if "full" not in kind]
        if sliding:
            raise CheckpointError(
                "layers that see a window of the conversation only are not supported",
                where=type(net).__name__,
                got=f"{len(sliding)} of {text.num_hidden_layers} layers: {sliding[0]}",
                fix="set use_sliding_window to false in its config, if the window is longer than "
                "your conversations",
            )
        self.attention: str | None = getattr(text, "_attn_implementation", None)
        if self.attention not in ("sdpa", "eager", None):
            raise UserError(
                "this attention takes no masks, which batches of unequal rows need",
                where=type(net).__name__,
                got=self.attention,
                expected="sdpa, eager",
                fix="load the model with attn_implementation='sdpa'",
            )
        self.width: int = text.hidden_size
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

    def mask(self, embeds: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor | None:
        """The mask that the decoder is given for bool [B, 1, L, S], or for None: plain causal
        attention over rows of one length. Never none, since transformers would then build one by
        the longest row of the cache."""
        whole = causal_mask(embeds, cache) if mask is None else mask
        return ready_mask(whole, embeds, self.attention)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., D]."""
        logits: Tensor = self.net.get_output_embeddings()(hidden)
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


def causal_mask(embeds: Tensor, cache: Cache | None) -> Tensor:
    """Plain causal attention as a mask, bool [B, 1, L, S], for rows of one length."""
    batch, length = embeds.shape[:2]
    width = length if cache is None else cache.get_mask_sizes(length, 0)[0]
    allowed = torch.ones(length, width, dtype=torch.bool, device=embeds.device)
    return allowed.tril(width - length).expand(batch, 1, length, width)


def _no_kind(kind: str) -> UserError:
    return UserError(
        "a stock model has no perception kinds",
        got=kind,
        fix="make a VPT model of it: PerceptionAgent.from_pretrained(..., encoders=[...])",
    )
