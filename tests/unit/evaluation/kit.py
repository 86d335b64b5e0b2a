"""A tiny agent with every kind, and items to ask it."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from vpt_agent.agent import PerceptionAgent
from vpt_agent.evaluation import Item
from vpt_agent.model.testing import tiny_model
from vpt_agent.types import Box


def picture(seed: int, width: int = 84, height: int = 56) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def item(number: int, *, type: str = "", boxes: tuple[Box, ...] = (), answer: str = "x") -> Item:
    return Item(
        id=f"i{number}",
        question=f"What is number {number}?",
        answer=answer,
        picture=lambda: picture(number),
        type=type or f"t{number % 2}",
        needs=(("region",),),
        boxes=boxes or (Box(10, 10, 30, 24),),
    )


_AGENTS: list[PerceptionAgent] = []


def tiny_agent() -> PerceptionAgent:
    """Random weights, made to end every turn as soon as it may: answers are empty, what it
    computes is real."""
    if not _AGENTS:
        model, processor = tiny_model(seed=3)
        agent = PerceptionAgent.from_model(model, processor.tokenizer)
        for kind in ("clip", "dino", "sam"):
            # A fresh projector has no bias, so that its condition of a zero state would be zero.
            torch.nn.init.normal_(model.projector(kind).linear_condition.bias, std=0.3)
        real = model.compute_logits

        def ending(hidden: torch.Tensor) -> torch.Tensor:
            logits = real(hidden)
            logits[..., agent.layout.end] += 50
            return logits

        model.compute_logits = ending  # type: ignore[method-assign]
        _AGENTS.append(agent)
    return _AGENTS[0]
