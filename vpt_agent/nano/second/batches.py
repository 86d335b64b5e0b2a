"""Training batches of the second version: dense labels, looks, direct answers, re-encoding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset

from vpt_agent.errors import UserError
from vpt_agent.nano.alphabet import COLOURS, SHAPES
from vpt_agent.nano.batches import (
    Labels,
    _Images,
    asked_tags,
    collate,
    crop_labels,
    token_grid,
    whole_labels,
    window,
)
from vpt_agent.nano.conversation import Encoded
from vpt_agent.nano.domain.ask import TYPES
from vpt_agent.nano.domain.marks import MARKS
from vpt_agent.nano.domain.sight import AGAIN
from vpt_agent.nano.domain.table import TABLE, VISUAL_TOKENS
from vpt_agent.nano.pool import Pixels, Pool
from vpt_agent.nano.questions import every_name
from vpt_agent.nano.second.labels import (
    CELL,
    again_labels,
    in_block_order,
    middles,
    on_tags,
    spots,
)
from vpt_agent.nano.second.model import token_labels
from vpt_agent.nano.second.pool import AskedRecord, DomainPool, DomainRecord
from vpt_agent.nano.second.stickers import Stickers
from vpt_agent.nano.second.text import (
    END,
    SecondEncoder,
    again_call,
    again_turn,
    opening,
    regions_call,
    regions_turn,
)
from vpt_agent.nano.tokenizer import token_id
from vpt_agent.nano.views import MERGE, PATCH
from vpt_agent.tokens.table import END_OF_TEXT

Stage = Literal["see", "talk"]
Batch = dict[str, Any]
# Kinds of batches in turn. See: characters, then marks by each encoder. Talk: "see" shows the
# projectors of clip and sam a view full of stickers. A visual token of theirs is many cells, and
# the few marks of real scenes took them hundreds of batches to learn, those of dino's 25.
PLAN: Final[dict[Stage, tuple[str, ...]]] = {
    "see": ("chars", "clip", "chars", "clip", "dino", "chars", "clip", "sam"),
    "talk": (
        "clip",
        "none",
        "see sam",
        "dino",
        "region",
        "sam",
        "none",
        "see clip",
        "two_looks",
        "dino",
        "clip",
        "sam",
        "none",
        "read",
    ),
}
TRIES: Final = 1000
"""So many scenes are tried until one has a question of a kind."""
WINDOW: Final = 168
"""Side of the windows cut out of the clip view: 12 patches around a mark."""
MORE: Final = 180
"""So many stickers are put into a view in the stage see, where there is room for them."""
SHIFT: Final = 20
"""Whole views are moved by up to so many pixels in the stage see."""
COUNTED: Final = ("count_tags", "count_marks")
ANCHOR: Final = 0
"""Where n things are counted, they and the row's first token are to be looked at alike: the share
that the first token gets, 1 / (n + 1), says how many they are."""
HIDE: Final = 0.3
"""Share of re-encoding rows whose question is masked after its control state was taken."""


class SecondBatches(IterableDataset[Batch]):
    """Endless whole batches of a stage; batch number i depends only on the pool and i."""

    def __init__(
        self,
        stage: Stage,
        pool: Path,
        encoder: SecondEncoder,
        size: int = 16,
        start: int = 0,
        plan: Sequence[str] | None = None,
        more: Path | None = None,
    ) -> None:
        self.stage, self.directory, self.encoder = stage, pool, encoder
        self.more = None if more is None else Pool(more)
        self.size, self.start = size, start
        self.plan = tuple(plan or PLAN[stage])
        self._stock: dict[str, Stickers] = {}
        self.pad = token_id(encoder.tokenizer, END_OF_TEXT)
        self.words = torch.tensor(
            [encoder.ids_of(f" {w}")[-1] for w in (*MARKS, *COLOURS, *SHAPES)]
        )
        named = {encoder.ids_of(f" {w}")[-1] for w in (*MARKS, *every_name())}
        self.names = torch.tensor(sorted(named))

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        pool = DomainPool(self.directory)
        info = torch.utils.data.get_worker_info()
        number, step = (info.id, info.num_workers) if info else (0, 1)
        number += self.start
        while True:
            yield self.batch(pool, number)
            number += step

    def batch(self, pool: DomainPool, number: int) -> Batch:
        """The batch of a number: the stage's kinds in turn."""
        rng = random.Random(f"second-{self.stage}-{number}")
        kind = self.plan[number % len(self.plan)]
        if self.stage == "see":
            if kind == "chars":
                return self._chars(pool, rng, 3 * self.size)
            return self._windows(pool, rng) if kind == "clip" else self._whole(pool, rng, kind)
        if kind in AGAIN:
            return self._again(pool, rng, kind)
        if kind.startswith("see "):
            return self._projected(pool, rng, kind.removeprefix("see "))
        return self._plain(pool, rng, kind)

    def _stickers(self, kind: str) -> Stickers:
        if kind not in self._stock:
            self._stock[kind] = Stickers(kind)
        return self._stock[kind]

    # --- dense labels only ----------------------------------------------------------------------

    def _chars(self, pool: DomainPool, rng: random.Random, count: int) -> Batch:
        images = _Images()
        for i in range(count):
            shard, record = rng.choice(pool.records)
            tag = rng.choice(record.scene.tags)
            view, chars = window(rng, pool.view(shard, tag.crop), tag, zoom=2.0 if i % 2 else 1.0)
            images.add(view, crop_labels(view, chars, tag.answer))
        for _ in range(max(1, count // 8)):
            shard, record = rng.choice(pool.records)
            view = pool.view(shard, record.scene.whole)
            images.add(view, whole=whole_labels(view, record.scene))
        tensors, _ = images.close()
        return {**tensors, **images.labels(), "name": "chars"}

    def _windows(self, pool: DomainPool, rng: random.Random) -> Batch:
        images, labels = _Images(), []
        stickers = self._stickers("clip")
        for _ in range(2 * self.size):
            shard, record = rng.choice(pool.records)
            view = pool.view(shard, record.again["clip"])
            marked = [m for m in record.marks if m.mark]
            x, y = rng.choice(marked).at["clip"] if marked else (0.0, 0.0)
            left = _edge(x - rng.uniform(20, WINDOW - 20), view.shape[1])
            top = _edge(y - rng.uniform(20, WINDOW - 20), view.shape[0])
            grid = again_labels(record, "clip", WINDOW, WINDOW, left, top)
            part = view[top : top + WINDOW, left : left + WINDOW]
            images.add(stickers.add(rng, part, grid, MORE // 9))
            labels.append(in_block_order(grid))
        tensors, _ = images.close()
        patches = len(tensors["patches"])
        return {
            **tensors,
            **images.labels(),
            "kind": "clip",
            "name": "clip",
            "again_patches": torch.arange(patches),
            "again_labels": torch.from_numpy(np.concatenate(labels)),
        }

    def _whole(self, pool: DomainPool, rng: random.Random, kind: str) -> Batch:
        views, labels = [], []
        stickers = self._stickers(kind)
        # Half as many for sam: its 4096 patches a picture take as long.
        for _ in range(self.size // 2 if kind == "sam" else self.size):
            shard, record = rng.choice(pool.records)
            # Moved a little, or the marks of a small pool are learnt by heart.
            left, top = rng.randint(-SHIFT, SHIFT), rng.randint(-SHIFT, SHIFT)
            view = _moved(pool.view(shard, record.again[kind]), left, top)
            grid = again_labels(record, kind, view.shape[0], view.shape[1], left, top)
            views.append(stickers.add(rng, view, grid, MORE))
            labels.append(grid.reshape(-1, 3))
        return {
            "pixels": torch.from_numpy(np.stack(views)),
            "again_labels": torch.from_numpy(np.concatenate(labels)),
            "kind": kind,
            "name": kind,
        }

    def _projected(self, pool: DomainPool, rng: random.Random, kind: str) -> Batch:
        """Views full of stickers whose visual tokens are to tell them."""
        batch = self._windows(pool, rng) if kind == "clip" else self._whole(pool, rng, kind)
        cells = (WINDOW if kind == "clip" else AGAIN[kind]) // CELL[kind]
        tokens = token_labels(batch["again_labels"], kind, cells)
        return batch | {"projected_labels": tokens, "name": f"see_{kind}"}

    # --- conversations --------------------------------------------------------------------------

    def _asked(self, record: DomainRecord, group: str) -> list[AskedRecord]:
        """Questions of a group; ``mark_of`` is asked of pictures encoded again, too."""
        wanted = {group, "either"} if group == "reencode" else {group}
        return [a for a in record.asked if TYPES[a.type].group in wanted]

    def _chosen(
        self, pool: DomainPool, rng: random.Random, group: str
    ) -> tuple[int, DomainRecord, list[AskedRecord]]:
        """A scene that has questions of a group."""
        for _ in range(TRIES):
            shard, record = rng.choice(pool.records)
            found = self._asked(record, group)
            if group in ("region", "two_looks"):  # only what the first version's tags can answer
                found = [a for a in found if len(a.reads) == (1 if group == "region" else 2)]
            if found:
                return shard, record, found
        raise UserError(
            "no scene of this pool has such a question", where=self.directory, got=group
        )

    def _drawn(
        self, pool: DomainPool, rng: random.Random, group: str
    ) -> tuple[DomainPool | Pool, int, DomainRecord, list[AskedRecord]]:
        """A scene with questions of a group, and the pool it lies in: every second one that is to
        be read is of the first version's, if they are there."""
        if self.more is None or group != "region" or rng.random() < 0.5:
            return pool, *self._chosen(pool, rng, group)
        shard, scene = rng.choice(self.more.records)
        asked = [
            AskedRecord("region", t.question, t.answer, [], [i]) for i, t in enumerate(scene.tags)
        ]
        return self.more, shard, DomainRecord(scene, [], [], {}), asked

    def _plain(self, pool: DomainPool, rng: random.Random, kind: str) -> Batch:
        """Rows of regions, of two regions, or without a call."""
        images, items, asked = _Images(), list[tuple[Encoded, list[int]]](), []
        shown: list[tuple[DomainRecord, Pixels, AskedRecord]] = []
        reading = kind == "read"
        group = "region" if reading else kind
        while len(items) < self.size:
            source, shard, record, found = self._drawn(pool, rng, group)
            view = source.view(shard, record.scene.whole)
            first = images.add(view, whole=whole_labels(view, record.scene))
            for question in rng.sample(found, min(4, len(found))):
                trigger = group if group == "region" else "region" if kind == "two_looks" else ""
                trigger = trigger if rng.random() < 0.5 else ""
                text, reads = question.question, question.reads
                if reading and record.scene.tags:  # any tag, as often as there are some
                    number = rng.randrange(len(record.scene.tags))
                    text, reads = record.scene.tags[number].question, [number]
                # A direct answer is about tags, too, but not what they say.
                tags = [] if group == "none" else [record.scene.tags[i] for i in reads]
                answer = " ".join(t.answer for t in tags) if tags else question.answer
                pieces = [(opening(text, trigger), False)]
                grids, views = [token_grid(view)], [first]
                if group in ("region", "two_looks"):
                    if len(tags) != (1 if group == "region" else 2):
                        continue
                    pieces.append((regions_call([t.cells for t in tags]), True))
                    pieces.append((regions_turn(len(tags)), False))
                    for tag in tags:
                        crop = source.view(shard, tag.crop)
                        views.append(images.add(crop, crop_labels(crop, tag.chars, tag.answer)))
                        grids.append(token_grid(crop))
                    if group == "region":
                        asked.append((tags[0], record.scene, view))
                pieces.append((answer + END, True))
                items.append((self.encoder.encode_again(pieces, grids, 0), views))
                shown.append((record, view, question))
        batch: Batch = collate(images, items, self.pad) | images.labels()
        if group == "region" and len(asked) == len(items):
            found_spots = asked_tags(batch, asked, self.encoder)
            batch |= {k: found_spots[k] for k in ("spot", "asking")}
        if kind == "none":
            batch |= {**self._told(batch, shown), "names": self.names}
        return {**batch, "name": kind, "first_reply": _first_reply(batch, self.encoder, kind)}

    def _told(
        self, batch: Batch, shown: list[tuple[DomainRecord, Pixels, AskedRecord]]
    ) -> dict[str, torch.Tensor]:
        """Which visual tokens lie on the tags that a question is about, and from where to look."""
        ids, labels = batch["input_ids"], batch["labels"]
        spot, asking = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
        even = torch.tensor([asked.type in COUNTED for *_, asked in shown])
        for row, (record, view, asked) in enumerate(shown):
            tags, where = asked.tags, middles if even[row] else on_tags
            grid = torch.from_numpy(where(record, tags, *token_grid(view)))
            spot[row, ANCHOR] = even[row]
            start = int((ids[row] == self.encoder.image).nonzero()[0])
            spot[row, start : start + grid.numel()] = grid.flatten()
            learnt = int((labels[row] != -100).nonzero()[0])
            named = torch.isin(ids[row, :learnt], self.names).nonzero()[:, 0]
            first = int(named[-1]) if len(named) else learnt - 1
            if tags:
                asking[row, first:learnt] = True
        return {"spot": spot, "asking": asking, "even": even}

    def _again(self, pool: DomainPool, rng: random.Random, kind: str) -> Batch:
        images, items = _Images(), list[tuple[Encoded, list[int]]]()
        pixels, labels, whose, looked = list[Pixels](), list[Labels](), list[int](), []
        seen, counted = list[int](), list[bool]()
        while len(items) < self.size:
            shard, record, found = self._chosen(pool, rng, "reencode")
            view, again = (pool.view(shard, p) for p in (record.scene.whole, record.again[kind]))
            first = images.add(view, whole=whole_labels(view, record.scene))
            cells = again_labels(record, kind, *again.shape[:2])
            labels.append(in_block_order(cells) if kind == "clip" else cells.reshape(-1, 3))
            count = VISUAL_TOKENS
            if kind == "clip":
                seen.append(images.add(again))
                count = int(np.prod(token_grid(again)))
            pixels.append(again)
            for question in rng.sample(found, min(4, len(found))):
                phrase = kind if rng.random() < 0.5 else ""
                pieces = [
                    (opening(question.question, phrase), False),
                    (again_call(kind), True),
                    (again_turn(kind), False),
                    (question.answer + END, True),
                ]
                encoded = self.encoder.encode_again(pieces, [token_grid(view)], count)
                items.append((encoded, [first]))
                whose.append(len(pixels) - 1)
                looked.append(spots(record, kind, again, question.tags))
                counted.append(question.type in COUNTED)
        batch: Batch = collate(images, items, self.pad) | images.labels()
        batch |= self._features(kind, images, seen, pixels, labels, whose)
        batch |= _control(batch, self.encoder, kind, rng, looked, counted)
        batch |= {"words": self.words, "names": self.names}
        return {**batch, "name": kind, "first_reply": _first_reply(batch, self.encoder, kind)}

    def _features(
        self,
        kind: str,
        images: _Images,
        seen: list[int],
        pixels: list[Pixels],
        labels: list[Labels],
        whose: list[int],
    ) -> Batch:
        """Where each row's features come from, with the cells' labels and the tokens'."""
        tokens = [token_labels(torch.from_numpy(own), kind, AGAIN[kind] // CELL[kind])
                  for own in labels]  # fmt: skip
        made: Batch = {"kind": kind, "token_labels": torch.cat([tokens[i] for i in whose])}
        if kind != "clip":
            index = [np.arange(VISUAL_TOKENS) + i * VISUAL_TOKENS for i in whose]
            made["pixels"] = torch.from_numpy(np.stack(pixels))
            made["again_index"] = torch.from_numpy(np.concatenate(index))
            made["again_labels"] = torch.from_numpy(np.concatenate(labels))
            return made
        starts, row = {}, 0
        for number in images.order():
            starts[number] = row
            row += images.views[number].shape[0] * images.views[number].shape[1] // PATCH**2
        spans = [np.arange(len(labels[i])) + starts[n] for i, n in enumerate(seen)]
        made["again_patches"] = torch.from_numpy(np.concatenate(spans))
        made["again_labels"] = torch.from_numpy(np.concatenate(labels))
        index = [spans[i][:: MERGE * MERGE] // (MERGE * MERGE) for i in whose]
        made["again_index"] = torch.from_numpy(np.concatenate(index))
        return made


def _moved(view: Pixels, left: int, top: int) -> Pixels:
    """The view from (left, top) on, at most SHIFT pixels off; its edge is continued."""
    height, width = view.shape[:2]
    wide = np.pad(view, ((SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    return wide[top + SHIFT : top + SHIFT + height, left + SHIFT : left + SHIFT + width]


def _edge(start: float, side: int) -> int:
    return int(min(max(0, start), side - WINDOW))


def _first_reply(batch: Batch, encoder: SecondEncoder, kind: str) -> torch.Tensor:
    """(rows, length - 1): labels that belong to a call, not to the answer."""
    labels = batch["labels"][:, 1:]
    learnt = labels != -100
    if kind == "none":
        return torch.zeros_like(learnt)
    # The call ends with the first end of turn that is learnt.
    end = token_id(encoder.tokenizer, END)
    before = ((labels == end) & learnt).cumsum(1)
    first: torch.Tensor = learnt & ((before == 0) | ((before == 1) & (labels == end)))
    return first


def _control(
    batch: Batch,
    encoder: SecondEncoder,
    kind: str,
    rng: random.Random,
    looked: list[Labels],
    counted: list[bool],
) -> Batch:
    """Where calls start, which questions are masked, and where the answer should look."""
    ids = batch["input_ids"]
    start = (ids == encoder.starts[kind]).int().argmax(1)
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    spot, asking = torch.zeros_like(hidden), torch.zeros_like(hidden)
    placeholder = token_id(encoder.tokenizer, TABLE[kind].placeholder)
    turn = token_id(encoder.tokenizer, END)
    for row, marks in enumerate(looked):
        ends = (ids[row] == turn).nonzero()[:, 0]
        if rng.random() < HIDE:
            # The first question: between the second turn's start and its end.
            hidden[row, int(ends[0]) + 2 : int(ends[1])] = True
            # What was to be said without having seen it is no lesson.
            batch["labels"][row, : int(start[row]) + 4] = -100
        places = (ids[row] == placeholder).nonzero()[:, 0]
        spot[row, places] = torch.from_numpy(marks).bool()
        spot[row, ANCHOR] = counted[row]
        if marks.any() or counted[row]:
            learnt = (batch["labels"][row] != -100).nonzero()[:, 0]
            asking[row, int(places[-1]) + 1 : int(learnt[learnt > places[-1]][0])] = True
    return {
        "start": start,
        "hidden": hidden,
        "placeholder": placeholder,
        "spot_again": spot,
        "asking_again": asking,
        "even_again": torch.ones(len(ids), dtype=torch.bool),
    }
