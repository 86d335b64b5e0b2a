"""Tiny stock models of each family, made once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Part, Tokens, Visual
from vpt_agent.model.chat.qwen import StockQwen
from vpt_agent.model.chat.testing import STOCK, tiny_stock
from vpt_agent.tokens.table import IMAGE_PAD
from vpt_agent.types import Box, View
from vpt_agent.vision.patches import look
from vpt_agent.vision.policy import ImagePolicy


def picture(seed: int, width: int = 90, height: int = 60) -> View:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    name = f"image_{seed}"
    box = Box(0, 0, width, height)
    return View(name, Image.fromarray(pixels), name, box, (width, height))


@dataclass
class Stock:
    """A stock model, and the same behind the engine."""

    net: Any
    tokenizer: Any
    policy: ImagePolicy

    def engine(self) -> Engine:
        return Engine(StockQwen(self.net), self.policy)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def conversation(self, engine: Engine, seed: int, pictures: int) -> list[Part]:
        """Text and pictures in turn."""
        parts: list[Part] = [Tokens(self.ids("<|im_start|>user\n"))]
        for number in range(pictures):
            (found,) = engine.look("base", [picture(seed + number, 90 + 40 * number)])
            parts.append(Tokens(self.ids("<|vision_start|>")))
            parts.append(Visual(self.ids(IMAGE_PAD)[0], found.tokens, found.grid, "v"))
            parts.append(Tokens(self.ids(f"<|vision_end|> number {number}?<|im_end|>\n")))
        parts.append(Tokens(self.ids("<|im_start|>assistant\n" + "A cat. " * seed)))
        return parts

    def inputs(self, parts: list[Part], seed: int) -> dict[str, Any]:
        """What transformers' own forward takes for the same conversation."""
        import torch

        ids: list[int] = []
        types: list[int] = []
        for part in parts:
            new = list(part.ids) if isinstance(part, Tokens) else [part.placeholder] * len(
                part.features
            )  # fmt: skip
            ids += new
            types += [int(isinstance(part, Visual))] * len(new)
        tensor = torch.tensor([ids])
        given: dict[str, Any] = {
            "input_ids": tensor,
            "attention_mask": torch.ones_like(tensor),
            "mm_token_type_ids": torch.tensor([types]),
        }
        count = sum(isinstance(part, Visual) for part in parts)
        if count:
            views = [picture(seed + n, 90 + 40 * n) for n in range(count)]
            patches = look(views, self.policy)
            given |= {"pixel_values": patches.pixel_values, "image_grid_thw": patches.grid_thw}
        return given


@cache
def made(model_type: str) -> Stock:
    net, tokenizer = tiny_stock(model_type)
    patch = 16 if model_type == "qwen3_vl" else 14
    policy = ImagePolicy(kind="native", patch=patch, min_pixels=3136, max_pixels=8192)
    return Stock(net, tokenizer, policy)


@pytest.fixture(params=STOCK)
def stock(request: pytest.FixtureRequest) -> Stock:
    return made(request.param)
