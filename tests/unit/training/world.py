"""A tiny checkpoint and rows of every kind, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpt_agent.model.testing import tiny_model
from vpt_agent.tokens.table import IMAGE_TAG, PUBLISHED, REGION
from vpt_agent.training import TrainConfig, make_config

KINDS = ("clip", "dino", "sam")


def save_model(folder: Path, *, tied: bool = True, encoders: tuple[str, ...] = KINDS) -> Path:
    model, processor = tiny_model(encoders, tied=tied)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(folder: Path, number: int) -> str:
    sizes = ((84, 84), (84, 56), (56, 84), (70, 84))
    width, height = sizes[number % len(sizes)]
    pixels = np.random.default_rng(number).integers(0, 255, (height, width, 3), dtype=np.uint8)
    name = f"p{number}.png"
    Image.fromarray(pixels).save(folder / name)
    return name


def direct_row(name: str, answer: str = "A cat.") -> dict[str, Any]:
    ask = f"{IMAGE_TAG}What is it?"
    return {"messages": _turns(ask, answer), "images": [name]}


def region_row(name: str) -> dict[str, Any]:
    call = f"{REGION.start}{REGION.x_token(0)}{REGION.y_token(1)}{REGION.x_token(3)}"
    call += f"{REGION.y_token(4)}{REGION.end}"
    turns = _turns(f"{IMAGE_TAG}What is there?", call, IMAGE_TAG, "A dog in the grass.")
    return {"messages": turns, "images": [name, f"{name}_8,8,48,48"]}


def action_row(name: str, kind: str, *, calls: int = 1) -> dict[str, Any]:
    row = PUBLISHED[kind]
    call = f"{row.start}{row.control}{row.end}"
    turns = [f"{IMAGE_TAG}Which bird?"]
    for _ in range(calls):
        turns += [call, row.tag]
    column = row.tag.strip("<>") + "s"
    return {"messages": _turns(*turns, "A wren."), "images": [name], column: [name] * calls}


def _turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)
    ]


def save_rows(folder: Path, count: int = 24) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        name = picture(folder, number)
        rows.append(
            [
                direct_row(name, "Cat. " * (1 + number % 3)),
                region_row(name),
                *(action_row(name, kind) for kind in KINDS),
                action_row(name, "clip", calls=2),
            ][number % 6]
        )
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def config(tmp: Path, **changes: Any) -> TrainConfig:
    """A run of a few steps on the tiny model; ``changes`` are parts to replace or to add to."""
    data: dict[str, Any] = {
        "out": str(tmp / "out"),
        "stage": "instruction",
        "device": "cpu",
        "steps": 4,
        "model": {"path": str(tmp / "model")},
        "data": {
            "sources": [{"path": str(tmp / "rows" / "rows.json")}],
            "rows": 3,
            "window": 2,
            "shuffle": 8,
            "workers": 0,
            "hold_out": 4,
        },
        "optim": {"learning_rate": 1e-3},
        "log_every": 1,
    }
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(name), dict):
            data[name] |= value
        else:
            data[name] = value
    return make_config(data)
