"""Stands where an engine wants a model, for an agent whose model is on another machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from vpt_agent.errors import InternalError
from vpt_agent.tokens.table import ResolvedTable


@dataclass(frozen=True)
class NoConfig:
    """The least that a KV pool is described by; none is ever allocated."""

    num_hidden_layers: int = 1
    num_key_value_heads: int = 1
    num_attention_heads: int = 1
    hidden_size: int = 1
    head_dim: int = 1

    def get_text_config(self) -> NoConfig:
        """Itself."""
        return self


class Elsewhere:
    """A model that computes nothing here: tools that want its features are refused before."""

    config = NoConfig()
    dtype, device = torch.float32, torch.device("cpu")

    @property
    def table(self) -> ResolvedTable:
        """No kinds."""
        return ResolvedTable(())

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        """Rows of no width: no visual features fit."""
        return lambda ids: torch.zeros(*ids.shape, 0)

    def _nothing(self, *_: object, **__: object) -> NoReturn:
        raise InternalError("this model is on another machine", where="Elsewhere")

    encode_images = encode = features_from_base = condition = _nothing
    run_language_model = compute_logits = _nothing
