"""Tiny real models, built once, and conversations that use every kind."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Part, Tokens, Unconditioned, Visual
from vpt_agent.model.testing import tiny_model
from vpt_agent.types import Box, View
from vpt_agent.vision.policy import ImagePolicy

DEVICE = os.environ.get("VPT_TEST_DEVICE", "cpu")
"""Where the models of these tests lie; benchmarks/gpu.py sets it on a machine with a GPU."""
ENCODERS = ("clip", "dino", "sam")
KINDS = ("text", "region", *ENCODERS)


def picture(seed: int, width: int = 84, height: int = 56) -> View:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    size = (width, height)
    return View(f"image_{seed}", image, f"image_{seed}", Box(0, 0, width, height), size)


def crop(seed: int) -> View:
    whole = picture(seed)
    image = whole.image.crop((14, 0, 70, 56))
    return View("c", image, whole.id, Box(14, 0, 70, 56), whole.size, whole.id, "crop_region")


@dataclass
class Kit:
    """A model with what makes conversations for it."""

    model: torch.nn.Module
    tokenizer: object
    engine: Engine
    policy: ImagePolicy

    def fresh(self) -> Engine:
        return Engine(self.model, self.policy)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def look(self, view: View) -> Visual:
        (found,) = self.engine.look("base", [view])
        return Visual(self.ids("<|image_pad|>")[0], found.tokens, found.grid, view.id)

    def again(self, kind: str, view: View) -> Unconditioned:
        row = self.engine.table[kind]
        (found,) = self.engine.look(kind, [view])
        return Unconditioned(row.placeholder, found.tokens, kind, view.id)

    def call(self, kind: str) -> str:
        row = self.engine.table[kind].kind
        if row.payload == "grid":
            middle = "".join(
                (row.x_token(1), row.y_token(0), row.x_token(2), row.y_token(3 % row.grid))
            )
        else:
            middle = str(row.control) * self.engine.controls
        return row.start + middle + row.end

    def conversation(self, kind: str, seed: int = 1) -> list[Part]:
        """Picture, question, and (but for ``text``) a call of ``kind`` with its result."""
        before = self.ids("<|im_start|>user\n<|vision_start|>")
        parts: list[Part] = [Tokens(before)]
        if kind != "text":
            parts.append(self.look(picture(seed)))
        parts.append(Tokens(self.ids("<|vision_end|>\nWhat is it?<|im_end|>\n<|im_start|>")))
        if kind == "text":
            return parts
        parts.append(Tokens(self.ids(f"assistant\n{self.call(kind)}<|im_end|>\n<|vision_start|>")))
        parts.append(self.look(crop(seed)) if kind == "region" else self.again(kind, picture(seed)))
        parts.append(Tokens(self.ids("<|vision_end|><|im_end|>\n<|im_start|>assistant\nA cat.")))
        return parts


@pytest.fixture(scope="session", params=[1, 2], ids=["1_control", "2_controls"])
def kit(request: pytest.FixtureRequest) -> Kit:
    return make_kit(request.param)


@pytest.fixture(scope="session")
def one(request: pytest.FixtureRequest) -> Kit:
    return make_kit(1)


_KITS: dict[int, Kit] = {}


def make_kit(controls: int) -> Kit:
    if controls not in _KITS:
        model, processor = tiny_model(encoders=ENCODERS, controls=controls, seed=controls)
        policy = ImagePolicy(kind="fit", longest=84, crop_longest=56)
        model.to(DEVICE).eval()
        _KITS[controls] = Kit(model, processor.tokenizer, Engine(model, policy), policy)
    return _KITS[controls]
