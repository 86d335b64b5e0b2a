"""Ready attention masks in the form that the attention at work takes."""

from __future__ import annotations

import torch
from torch import Tensor


def ready_mask(mask: Tensor | None, embeds: Tensor, implementation: str | None) -> Tensor | None:
    """``mask`` bool [B, 1, Q, S] (None: plain causal over Q = S) for ``implementation``.

    Attention in one fused call takes it as it is. Transformers' ``eager`` adds what it is given to
    the scores, and knows of no causality: there it becomes 0 and the lowest number of the dtype of
    ``embeds`` [B, Q, W].
    """
    if implementation != "eager":
        return mask
    lowest = torch.finfo(embeds.dtype).min
    if mask is None:
        q = embeds.shape[1]
        whole = torch.full((1, 1, q, q), lowest, device=embeds.device, dtype=embeds.dtype)
        return whole.triu(1)
    return torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, lowest)
