"""Draw scenes ahead of time in worker processes and keep their views in shards on disk."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vpt_agent.nano.alphabet import Split
from vpt_agent.nano.scene import PlacedTag, Scene, make_scene
from vpt_agent.nano.views import (
    CROP_LONGEST,
    GLOBAL_LONGEST,
    GRID,
    asked_cells,
    cells_of,
    crop_box,
    fit_size,
    fit_view,
)

# The larger global view of the second baseline: as many visual tokens as view plus crop.
LARGE_LONGEST: Final = 336
SHARD: Final = 100
Pixels = NDArray[np.uint8]
Cells = tuple[int, int, int, int]


@dataclass
class TagRecord:
    """One askable tag: `crop` is its view's place in the shard, `chars` each character's

    centre and half width and height (x, y, rx, ry) in pixels of the crop view, `box` the
    tag in pixels of the scene and `cells` the region to ask for.
    """

    question: str
    answer: str
    colour: str
    shape: str
    box: tuple[int, int, int, int]
    cells: Cells
    crop: list[int]
    chars: list[list[float]]


@dataclass
class SceneRecord:
    """One scene's views (start, height, width in the shard) and tags; `size` in pixels."""

    seed: int
    size: tuple[int, int]
    whole: list[int]
    large: list[int]
    tags: list[TagRecord] = field(default_factory=list)


class _Bytes:
    """Views put one after another into a flat array."""

    def __init__(self) -> None:
        self.parts: list[Pixels] = []
        self.end = 0

    def add(self, view: Pixels) -> list[int]:
        place = [self.end, view.shape[0], view.shape[1]]
        self.parts.append(view.reshape(-1))
        self.end += view.size
        return place


def jittered(rng: random.Random, cells: Cells, text: Cells) -> Cells:
    """Cells moved by at most one on each side, as a slightly wrong localisation would be.

    Never into the cells of the `text`: what is cut off cannot be read by anybody.
    """
    if rng.random() < 0.65:
        return cells
    x0, y0, x1, y1 = (c + rng.choice((-1, 0, 0, 0, 1)) for c in cells)
    return (
        max(0, min(x0, text[0])),
        max(0, min(y0, text[1])),
        min(GRID - 1, max(x1, text[2])),
        min(GRID - 1, max(y1, text[3])),
    )


def _text_cells(tag: PlacedTag, size: tuple[int, int]) -> Cells:
    """The grid cells that the string itself touches."""
    x, y = zip(*(point for quad in tag.quads for point in quad), strict=True)
    box = (max(0, int(min(x))), max(0, int(min(y))), math.ceil(max(x)), math.ceil(max(y)))
    return cells_of(box, *size)


def _chars(tag: PlacedTag, box: Cells, view: tuple[int, int]) -> list[list[float]]:
    """Characters of a tag as (x, y, rx, ry) in a crop `box` resized to `view` (width, height)."""
    sx, sy = view[0] / (box[2] - box[0]), view[1] / (box[3] - box[1])
    result = []
    for quad in tag.quads:
        points = np.array(quad)
        x, y = points.mean(axis=0)
        rx = float(np.linalg.norm(points[1] - points[0])) / 2 * sx
        ry = float(np.linalg.norm(points[3] - points[0])) / 2 * sy
        place = ((float(x) - box[0]) * sx, (float(y) - box[1]) * sy, rx, ry)
        result.append([round(value, 1) for value in place])
    return result


def record_scene(scene: Scene, seed: int, store: _Bytes) -> SceneRecord:
    """Put a scene's views into `store` and say where they are."""
    rng = random.Random(f"crop-{seed}")
    record = SceneRecord(
        seed,
        scene.size,
        store.add(np.asarray(fit_view(scene.image, GLOBAL_LONGEST))),
        store.add(np.asarray(fit_view(scene.image, LARGE_LONGEST))),
    )
    for question in scene.questions:
        cells = asked_cells(question.regions[0], *scene.size)
        text = _text_cells(question.tag, scene.size)
        box = crop_box(jittered(rng, cells, text), *scene.size)
        view = fit_size(box[2] - box[0], box[3] - box[1], CROP_LONGEST)
        record.tags.append(
            TagRecord(
                question.question,
                question.answer,
                question.tag.style.colour,
                question.tag.style.shape,
                question.regions[0],
                cells,
                store.add(np.asarray(fit_view(scene.image, CROP_LONGEST, box))),
                _chars(question.tag, box, view),
            )
        )
    return record


def draw_shard(directory: Path, index: int, split: Split = "train") -> None:
    """Draw scenes `index * 100` to `index * 100 + 99`; an existing shard is kept."""
    target = directory / f"{index:05d}.json"
    if target.exists():
        return
    store = _Bytes()
    records = []
    for seed in range(index * SHARD, (index + 1) * SHARD):
        records.append(asdict(record_scene(make_scene(seed, split=split), seed, store)))
    np.save(directory / f"{index:05d}.npy", np.concatenate(store.parts))
    # The JSON file is renamed into place last, so it marks a whole shard.
    part = target.with_suffix(".part")
    part.write_text(json.dumps(records))
    part.rename(target)


def _job(item: tuple[Path, int]) -> None:
    os.nice(5)
    draw_shard(*item)


def draw_pool(directory: Path, shards: range, workers: int = 2) -> None:
    """Draw training shards with worker processes."""
    directory.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=None) as pool:
        for done, _ in enumerate(
            pool.imap_unordered(_job, [(directory, index) for index in shards]), start=1
        ):
            print(f"pool: {done}/{len(shards)} shards", file=sys.stderr)


class Pool:
    """The shards that exist in a directory, read through memory maps."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records: list[tuple[int, SceneRecord]] = []
        self.maps: dict[int, Pixels] = {}
        for path in sorted(directory.glob("*.json")):
            index = int(path.stem)
            self.maps[index] = np.load(path.with_suffix(".npy"), mmap_mode="r")
            self.records += [(index, _scene_record(item)) for item in json.loads(path.read_text())]

    def view(self, shard: int, place: list[int]) -> Pixels:
        """The uint8 RGB view (height, width, 3) at a place of a shard."""
        start, height, width = place
        flat = self.maps[shard][start : start + height * width * 3]
        return np.array(flat).reshape(height, width, 3)


def _scene_record(item: dict[str, Any]) -> SceneRecord:
    tags = [TagRecord(**tag) for tag in item.pop("tags")]
    return SceneRecord(**item, tags=tags)
