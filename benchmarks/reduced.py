"""The reduced domain of `ablations.py`: small enough to learn in minutes, and impossible blind.

A scene of 448 x 448 pixels shows four discs of different colours, and in each a mark too small for
the whole view. The question names a colour (one letter), the answer is the mark (one letter). The
background grows brighter to the right and bluer downwards, so that a patch says where it lies:
finding the place then takes minutes, not hours, to learn.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from vpt_agent.evaluation import Item
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.configuration import VPTConfig, perception_manifest
from vpt_agent.model.testing import byte_tokenizer
from vpt_agent.model.tokenizer import extend, token_ids
from vpt_agent.tokens.grid import box_to_region, region_to_box
from vpt_agent.tokens.table import (
    DINO,
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    IMAGE_TAG,
    REGION,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    PerceptionKind,
    PerceptionTable,
    own_kind,
)
from vpt_agent.types import Box

SIDE = 448
VIEW, CROP, LOOK = 112, 168, 196
"""Longest side, in pixels, of the whole view, of a crop, and of a re-encoded picture."""
MARK = 14
"""Pixels a side: 3.5 in the whole view, 7 in a re-encoded picture, 5 to 28 in a crop."""
COLOURS = {
    "R": (220, 30, 30),
    "G": (20, 170, 40),
    "Y": (240, 220, 20),
    "P": (150, 40, 190),
    "O": (250, 130, 20),
    "K": (15, 15, 15),
}
MARKS = "ABCDEF"
SMALLEST, LARGEST = 15, 46
"""Radius of a disc in pixels; one of 28 covers 1/64 of the scene."""
TEXT_BOX = own_kind(
    "box",
    payload="text",
    tool="look_at_box",
    pattern=r"\d{2},\d{2},\d{2},\d{2}",
    argument="box",
)
"""A region written as text: left, top, right, bottom in hundredths of the picture, 00 to 99."""


@dataclass(frozen=True)
class Disc:
    """One object: colour and mark by letter, its box in pixels."""

    colour: str
    mark: str
    box: tuple[int, int, int, int]


def make_discs(seed: int) -> list[Disc]:
    """Four discs of different colours that do not touch; the same seed, the same."""
    rng = random.Random(f"reduced-{seed}")
    while True:
        placed: list[tuple[int, int, int]] = []
        for _ in range(60):
            r = round(SMALLEST * (LARGEST / SMALLEST) ** rng.random())
            x, y = (rng.randint(32 + r, SIDE - 32 - r) for _ in "xy")
            if all((x - a) ** 2 + (y - b) ** 2 > (r + c + 20) ** 2 for a, b, c in placed):
                placed.append((x, y, r))
            if len(placed) == 4:
                colours = rng.sample(list(COLOURS), 4)
                return [
                    Disc(colour, rng.choice(MARKS), (x - r, y - r, x + r, y + r))
                    for colour, (x, y, r) in zip(colours, placed, strict=True)
                ]


def draw(discs: Sequence[Disc], seed: int) -> Image.Image:
    """The scene of ``discs``; ``seed`` decides its noise."""
    noise = np.random.default_rng(seed).normal(0, 6, (SIDE, SIDE, 1))
    along = np.linspace(0, 1, SIDE)
    base = np.zeros((SIDE, SIDE, 3))
    base[..., 0] = base[..., 1] = 90 + 120 * along[None, :]
    base[..., 2] = 90 + 120 * along[:, None]
    image = Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for disc in discs:
        pen.ellipse(disc.box, fill=COLOURS[disc.colour], outline=(255, 255, 255), width=1)
        _draw_mark(pen, disc)
    return image


def _draw_mark(pen: ImageDraw.ImageDraw, disc: Disc) -> None:
    """A mark of one size, whatever the disc's; all have about as much ink."""
    left, top, right, bottom = disc.box
    x, y, h = (left + right) / 2, (top + bottom) / 2, MARK / 2
    ink, w = (255, 255, 255), 3
    if disc.mark in "AC":
        pen.line((x - h, y, x + h, y), fill=ink, width=w)
    if disc.mark in "BC":
        pen.line((x, y - h, x, y + h), fill=ink, width=w)
    if disc.mark == "D":
        pen.ellipse((x - h, y - h, x + h, y + h), outline=ink, width=w)
    if disc.mark == "E":
        pen.line((x - h, y - h, x + h, y + h), fill=ink, width=w)
    if disc.mark == "F":
        pen.line((x - h, y + h, x + h, y - h), fill=ink, width=w)


# --- rows and items ------------------------------------------------------------------------------


def box_text(box: Sequence[float]) -> str:
    """A box of the scene as the text of a call."""
    low = (int(100 * v / SIDE) for v in box[:2])
    high = (min(99, -int(-100 * v // SIDE)) for v in box[2:])
    return ",".join(f"{v:02d}" for v in (*low, *high))


def text_box(text: str) -> Box | None:
    """The box that a text of a call means, in pixels; None if it is none."""
    try:
        left, top, right, bottom = (int(v) for v in text.split(","))
    except ValueError:
        return None
    if left >= right or top >= bottom:
        return None
    return Box(*(v * SIDE // 100 for v in (left, top, right, bottom)))


def row_of(kind: PerceptionKind, disc: Disc, name: str, controls: int) -> dict[str, Any]:
    """The row that teaches to ask for ``kind`` about ``disc``, and to answer."""
    crop: tuple[int, ...] = ()
    if kind.payload == "grid":
        cells = box_to_region(disc.box, (SIDE, SIDE), kind.grid)
        call = kind.call_text(region=cells)
        crop = tuple(int(v) for v in region_to_box(cells, (SIDE, SIDE), kind.grid, "published"))
    elif kind.payload == "text":
        call = kind.call_text(text=box_text(disc.box))
        crop = tuple(int(v) for v in text_box(box_text(disc.box)) or disc.box)
    else:
        call = kind.call_text(controls=controls)
    said = [f"{IMAGE_TAG}\n{disc.colour}", call, kind.tag, disc.mark]
    row: dict[str, Any] = {
        "messages": [
            {"role": "assistant" if i % 2 else "user", "content": text}
            for i, text in enumerate(said)
        ],
        "images": [name],
    }
    if crop:
        row["images"].append(f"{name}_{','.join(map(str, crop))}")
    else:
        row[kind.tag.strip("<>") + "s"] = [name]
    return row


def draw_scenes(folder: Path, count: int) -> None:
    """Pictures of the training scenes 0 to ``count``; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        path = folder / f"{seed}.png"
        if not path.is_file():
            part = path.with_suffix(".part")
            draw(make_discs(seed), seed).save(part, format="PNG", compress_level=1)
            part.replace(path)


def write_rows(path: Path, kind: PerceptionKind, *, scenes: int, controls: int = 1) -> None:
    """Four rows of every scene, shuffled, for pictures in ``scenes/`` beside ``path``."""
    rows = [
        row_of(kind, disc, f"scenes/{seed}.png", controls)
        for seed in range(scenes)
        for disc in make_discs(seed)
    ]
    random.Random(0).shuffle(rows)
    path.write_text(json.dumps(rows), encoding="utf-8")


def test_item(seed: int) -> Item:
    """The question about the first disc of an unseen scene."""
    discs = make_discs(seed)
    disc = discs[0]
    return Item(
        id=str(seed),
        question=disc.colour,
        answer=disc.mark,
        picture=partial(draw, discs, seed),
        type="small" if disc.box[2] - disc.box[0] < SIDE / 8 else "large",
        boxes=(Box(*disc.box),),
    )


# --- the model -----------------------------------------------------------------------------------


def make_table(kind: str, *, grid: int = 8, controls: int = 1) -> PerceptionTable:
    """The one kind of a run: ``region`` on a grid, ``box`` as text, or ``dino``."""
    rows = {
        "region": replace(REGION, grid=grid, answer_prefix=""),
        "box": TEXT_BOX,
        "dino": replace(DINO, visual_tokens=(LOOK // 14) ** 2, input_size=LOOK),
    }
    return PerceptionTable((rows[kind],), controls)


def make_model(folder: Path, table: PerceptionTable, *, seed: int) -> int:
    """Write a fresh model of ``table`` with its tokenizer; gives its number of parameters."""
    tokenizer = byte_tokenizer()
    extend(tokenizer, table)
    torch.manual_seed(seed)
    model = VPTForConditionalGeneration(_config(tokenizer, table))
    model.save_pretrained(folder)
    VPTProcessor.for_model(model.config, tokenizer).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _config(tokenizer: Any, table: PerceptionTable) -> VPTConfig:
    ids = tokenizer.get_vocab()
    policy = {"kind": "fit", "longest": VIEW, "crop_longest": CROP, "min_pixels": 28 * 28}
    return VPTConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "initializer_range": 0.06,
            "bos_token_id": None,
            "eos_token_id": ids[IM_END],
            "pad_token_id": ids[END_OF_TEXT],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "mrope_section": [4, 6, 6],
            },
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "embed_dim": 96,
            "hidden_size": 128,
            "num_heads": 3,
            "mlp_ratio": 2,
            "initializer_range": 0.06,
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
        para_start_id=ids[IM_START],
        para_end_id=ids[IM_END],
        positions="mrope",
        perception=perception_manifest(
            table, token_ids(tokenizer, table), images=policy, regions="published"
        ),
        encoders={
            "detection": {
                "hidden_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 3,
                "mlp_ratio": 2,
                "patch_size": 14,
                "image_size": LOOK,
                "initializer_range": 0.06,
            }
        },
    )
