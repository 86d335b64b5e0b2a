"""Batches of short conversations with calls, for tiny models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.tokens.table import IM_END, IM_START, IMAGE_TAG

NO_PICTURE = "without its picture"


def picture(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def call_text(model: VPTForConditionalGeneration, kind: str) -> str:
    """The tokens of one call of a re-encoding kind."""
    row = model.table[kind].kind
    return row.start + str(row.control) * model.table.controls + row.end


def row_text(model: VPTForConditionalGeneration, calls: Sequence[tuple[str, str]]) -> str:
    """A picture, a question, one round for each call of (kind, note), and an answer."""
    text = f"{IM_START}user\n{IMAGE_TAG}What is it?{IM_END}\n{IM_START}assistant\n"
    for kind, note in calls:
        tag = "" if note == NO_PICTURE else model.table[kind].kind.tag
        text += f"{call_text(model, kind)}{IM_END}\n{IM_START}user\n{tag}{IM_END}\n"
        text += f"{IM_START}assistant\n"
    return f"{text}A cat.{IM_END}"


def batch(
    model: VPTForConditionalGeneration,
    processor: VPTProcessor,
    *rows: Sequence[tuple[str, str]],
    **options: Any,
) -> dict[str, torch.Tensor]:
    """``forward``'s arguments for ``rows`` of calls; every token is a label."""
    again: dict[str, list[Image.Image]] = {}
    for row, calls in enumerate(rows):
        for number, (kind, note) in enumerate(calls):
            if note != NO_PICTURE:
                again.setdefault(kind, []).append(picture(10 * row + number + 1, 84, 56))
    made = dict(
        processor(
            images=[picture(100 + row) for row in range(len(rows))],
            text=[row_text(model, calls) for calls in rows],
            again=again,
            padding=True,
            **options,
        )
    )
    made["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    return made
