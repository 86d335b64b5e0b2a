"""The reduced domain of `ablations.py`: small enough to learn in minutes, and impossible blind.

A scene of 448 x 448 pixels shows four discs of different colours, each filled with waves too fine
for the whole view: how they run is its mark. The question names a colour (one letter), the answer
is the mark (one letter). The background grows brighter to the right and bluer downwards, so that a
patch says where it lies: finding the place then takes minutes, not hours, to learn.
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
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import load_file

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
CONDITION_START = 0.15
VIEW, CROP, LOOK = 112, 168, 196
"""Longest side, in pixels, of the whole view, of a crop, and of a re-encoded picture."""
ALONG, ACROSS = 0.19, 0.17
"""Waves a pixel along an axis, and along each axis of a slanted one. In the whole view that is 0.7
a pixel, more than a picture can show; in a re-encoded one 0.4, in a crop 0.03 to 0.25."""
COLOURS = {
    "R": (220, 30, 30),
    "G": (20, 170, 40),
    "Y": (240, 220, 20),
    "P": (150, 40, 190),
    "O": (250, 130, 20),
    "K": (15, 15, 15),
}
MARKS = {"A": "-", "B": "|", "C": "/", "D": "\\", "E": "+", "F": "x"}
"""How the waves of a disc run."""
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
                    Disc(colour, rng.choice(list(MARKS)), (x - r, y - r, x + r, y + r))
                    for colour, (x, y, r) in zip(colours, placed, strict=True)
                ]


def draw(discs: Sequence[Disc], seed: int) -> Image.Image:
    """The scene of ``discs``; ``seed`` decides its noise."""
    noise = np.random.default_rng(seed).normal(0, 6, (SIDE, SIDE, 1))
    along = np.linspace(0, 1, SIDE)
    base = np.zeros((SIDE, SIDE, 3))
    base[..., 0] = base[..., 1] = 90 + 120 * along[None, :]
    base[..., 2] = 90 + 120 * along[:, None]
    for disc in discs:
        _fill(base, disc, seed)
    return Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))


def _fill(scene: npt.NDArray[np.float64], disc: Disc, seed: int) -> None:
    """Draw a disc: waves of its colour and white. Its mark is how they run; all marks have as much
    white, so that what cannot tell the waves apart sees the same."""
    left, top, right, bottom = disc.box
    part = scene[top:bottom, left:right]
    x, y = np.meshgrid(np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
    far = np.hypot(x - (left + right) / 2, y - (top + bottom) / 2) - (right - left) / 2
    phase = random.Random(f"phase-{seed}-{left}-{top}").uniform(0, 2 * np.pi)
    along, across = 2 * np.pi * ALONG, 2 * np.pi * ACROSS
    wave = {
        "-": np.sin(along * y + phase),
        "|": np.sin(along * x + phase),
        "/": np.sin(across * (x + y) + phase),
        "\\": np.sin(across * (x - y) + phase),
        "+": (np.sin(along * x + phase) + np.sin(along * y)) / 2**0.5,
        "x": np.sin(across * x + phase) * np.sin(across * y) * 2**0.5,
    }[MARKS[disc.mark]].clip(-1, 1)
    white = (0.35 + 0.35 * wave)[..., None]
    fill = (1 - white) * np.array(COLOURS[disc.colour]) + white * 255
    inside = (far < 0)[..., None]
    part[...] = np.where(inside, np.where((far > -2)[..., None], 255, fill), part)


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


def make_model(folder: Path, table: PerceptionTable, *, seed: int, base: Path | None = None) -> int:
    """Write a model of ``table`` with its tokenizer; gives its number of parameters.

    It has the weights in ``base`` (see `reduced_base.py`); what is not in there is fresh, and so is
    everything without it. A condition starts small: as published it starts so long that
    f + (f . c) c is c many times over, and what the encoder saw would be lost.
    """
    tokenizer = byte_tokenizer()
    extend(tokenizer, table)
    torch.manual_seed(seed)
    model = VPTForConditionalGeneration(_config(tokenizer, table))
    with torch.no_grad():
        for kind in table.kinds:
            if kind.payload == "control":
                model.projector(kind.name).linear_condition.weight.mul_(CONDITION_START)
    if base is not None:
        _take(model, load_file(base))
    model.save_pretrained(folder)
    VPTProcessor.for_model(model.config, tokenizer).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def _take(model: VPTForConditionalGeneration, state: dict[str, torch.Tensor]) -> None:
    """Put these weights into a model; what they lack stays as it is, new tokens among it."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            if name in own:
                own[name][: len(value)] = value


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
