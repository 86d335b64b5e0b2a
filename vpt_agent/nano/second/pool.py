"""Drawn domain scenes with all their views in shards, for the second version's training."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from vpt_agent.nano.alphabet import Split
from vpt_agent.nano.domain.ask import TYPES, ask
from vpt_agent.nano.domain.scene import DomainScene, make_domain_scene
from vpt_agent.nano.domain.sight import AGAIN, again_view, place_in
from vpt_agent.nano.pool import Pixels, SceneRecord, TagRecord, _Bytes, record_scene
from vpt_agent.nano.scene import Scene

SHARD: Final = 40
_ASKED_EACH: Final = 2


@dataclass
class MarkRecord:
    """A tag's mark (name or None), colour, shape, box (scene pixels), and the mark's middle in

    pixels of each kind's view.
    """

    mark: str | None
    colour: str
    shape: str
    box: tuple[int, int, int, int]
    at: dict[str, tuple[float, float]]


@dataclass
class AskedRecord:
    """A question; ``tags`` are numbers of marks, ``reads`` of the scene record's tags."""

    type: str
    question: str
    answer: str
    tags: list[int]
    reads: list[int]


@dataclass
class DomainRecord:
    """One scene: what the first version knows of it, its marks, questions, re-encoding views."""

    scene: SceneRecord
    marks: list[MarkRecord]
    asked: list[AskedRecord]
    again: dict[str, list[int]]


def record_domain(drawn: DomainScene, store: _Bytes) -> DomainRecord:
    """Put a scene's views into ``store`` and say where they are, and what can be asked."""
    tags = tuple(t.tag for t in drawn.tags)
    scene = Scene(drawn.image, drawn.size, tags, drawn.texts)
    record = record_scene(scene, drawn.seed, store)
    marks = []
    for tag in drawn.tags:
        style, at = tag.tag.style, {}
        if tag.mark_box is not None:
            x = (tag.mark_box[0] + tag.mark_box[2]) / 2
            y = (tag.mark_box[1] + tag.mark_box[3]) / 2
            at = {kind: place_in(kind, drawn.size, x, y) for kind in AGAIN}
        marks.append(MarkRecord(tag.mark, style.colour, style.shape, tag.tag.box, at))
    order = [q.tag for q in drawn.texts]
    asked = []
    for name in TYPES:
        found = [ask(drawn, name, seed=i) for i in range(_ASKED_EACH)]
        for a in dict.fromkeys(found):
            if a is None:
                continue
            reads = [tags[i] for i in a.tags]
            known = [order.index(t) for t in reads if t in order]
            asked.append(AskedRecord(name, a.question, a.answer, list(a.tags), known))
    again = {k: store.add(np.asarray(again_view(drawn.image, k))) for k in AGAIN}
    return DomainRecord(record, marks, asked, again)


def draw_domain_shard(directory: Path, index: int, split: Split = "train") -> None:
    """Draw the scenes of one shard; an existing shard is kept."""
    target = directory / f"{index:05d}.json"
    if target.exists():
        return
    store, records = _Bytes(), []
    for seed in range(index * SHARD, (index + 1) * SHARD):
        records.append(asdict(record_domain(make_domain_scene(seed, split=split), store)))
    np.save(directory / f"{index:05d}.npy", np.concatenate(store.parts))
    part = target.with_suffix(".part")
    part.write_text(json.dumps(records))
    part.rename(target)


def _job(item: tuple[Path, int]) -> None:
    os.nice(5)
    draw_domain_shard(*item)


def draw_domain_pool(directory: Path, shards: range, workers: int = 2) -> None:
    """Draw training shards with worker processes."""
    directory.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        jobs = [(directory, index) for index in shards]
        for done, _ in enumerate(pool.imap_unordered(_job, jobs), start=1):
            print(f"pool: {done}/{len(shards)} shards", file=sys.stderr)


class DomainPool:
    """The shards that exist in a directory, read through memory maps."""

    def __init__(self, directory: Path) -> None:
        self.records: list[tuple[int, DomainRecord]] = []
        self.maps: dict[int, Pixels] = {}
        for path in sorted(directory.glob("*.json")):
            index = int(path.stem)
            self.maps[index] = np.load(path.with_suffix(".npy"), mmap_mode="r")
            self.records += [(index, _record(item)) for item in json.loads(path.read_text())]

    def view(self, shard: int, place: list[int]) -> Pixels:
        """The uint8 RGB view (height, width, 3) at a place of a shard."""
        start, height, width = place
        flat = self.maps[shard][start : start + height * width * 3]
        return np.array(flat).reshape(height, width, 3)


def _record(item: dict[str, Any]) -> DomainRecord:
    scene = dict(item["scene"])
    tags = [TagRecord(**tag) for tag in scene.pop("tags")]
    return DomainRecord(
        SceneRecord(**scene, tags=tags),
        [MarkRecord(**mark) for mark in item["marks"]],
        [AskedRecord(**asked) for asked in item["asked"]],
        item["again"],
    )
