"""Training batches of every stage, put together from the pool in a worker process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from vpt_agent.nano.alphabet import COLOURS, SHAPES, SYMBOLS
from vpt_agent.nano.conversation import (
    END,
    LOOK,
    Encoded,
    Encoder,
    crop_question_text,
    question_text,
    region_text,
)
from vpt_agent.nano.pool import Pixels, Pool, SceneRecord, TagRecord
from vpt_agent.nano.questions import every_name
from vpt_agent.nano.tokenizer import token_id
from vpt_agent.nano.views import MERGE, PATCH
from vpt_agent.tokens.table import END_OF_TEXT

Stage = Literal["tower", "read", "scenes", "baseline-global", "baseline-large"]
# Height and width of the windows cut out of crops: characters at their true size, less emptiness.
WINDOW: Final = (84, 196)
_COLOUR_INDEX: Final = {name: i + 1 for i, name in enumerate(COLOURS)}
_SHAPE_INDEX: Final = {name: i + 1 for i, name in enumerate(SHAPES)}
Labels = NDArray[np.int64]


def frame_patches(view: Pixels) -> Pixels:
    """One frame's patches (patches, 588) of a uint8 RGB view, in 2 x 2 block order."""
    height, width, _ = view.shape
    rows, columns = height // PATCH, width // PATCH
    blocks = view.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    return np.ascontiguousarray(blocks.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(rows * columns, -1)


def _block_order(grid: Labels) -> Labels:
    """(rows, columns, k) labels in the tower's patch order: (patches, k)."""
    rows, columns, k = grid.shape
    blocks = grid.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, k)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, k)


def crop_labels(view: Pixels, chars: list[list[float]], answer: str) -> Labels:
    """(patches, 4): character and place in the string at each patch's left and right half."""
    rows, columns = view.shape[0] // PATCH, view.shape[1] // PATCH
    places = np.array(chars)
    y = (np.arange(rows) + 0.5) * PATCH
    x = (np.arange(columns * 2) + 0.5) * PATCH / 2
    dy = np.abs(y[:, None, None] - places[None, None, :, 1])
    dx = np.abs(x[None, :, None] - places[None, None, :, 0])
    # Letter gaps belong to the nearer character.
    near = (dy < places[:, 3] + 3) & (dx < np.maximum(places[:, 2], 4) + 1.5)
    cost = np.where(near, dx, 1e6)
    best = cost.argmin(axis=-1)
    on = cost.min(axis=-1) < 1e6
    codes = np.array([SYMBOLS.index(c) + 1 for c in answer])
    char = np.where(on, codes[best], 0).reshape(rows, columns, 2)
    slot = np.where(on, best + 1, 0).reshape(rows, columns, 2)
    grid = np.stack((char[..., 0], slot[..., 0], char[..., 1], slot[..., 1]), axis=-1)
    return _block_order(grid)


def whole_labels(view: Pixels, record: SceneRecord) -> Labels:
    """(patches, 6): colour, shape and grid cells of the tag on each patch (-100 off tags)."""
    rows, columns = view.shape[0] // PATCH, view.shape[1] // PATCH
    grid = np.full((rows, columns, 6), -100, dtype=np.int64)
    grid[..., :2] = 0
    sx, sy = columns / record.size[0], rows / record.size[1]
    for tag in record.tags:
        x0, x1 = int(tag.box[0] * sx + 0.3), int(tag.box[2] * sx + 0.7)
        y0, y1 = int(tag.box[1] * sy + 0.3), int(tag.box[3] * sy + 0.7)
        codes = (_COLOUR_INDEX[tag.colour], _SHAPE_INDEX[tag.shape], *tag.cells)
        grid[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = codes
    return _block_order(grid)


def window(
    rng: random.Random, view: Pixels, tag: TagRecord, zoom: float = 1.0
) -> tuple[Pixels, list[list[float]]]:
    """A part of a crop around the string, moved at random, and the characters in it.

    `zoom` is the most that the part may be enlarged; the whole string stays inside.
    """
    places = np.array(tag.chars)
    height, width = WINDOW
    reach = float(places[-1, 0] - places[0, 0]) + 3 * float(places[:, 2].max())
    factor = min(rng.uniform(1.0, zoom), width / reach)
    if factor > 1.02:
        new = (round(view.shape[1] * factor), round(view.shape[0] * factor))
        view = np.asarray(Image.fromarray(view).resize(new, Image.Resampling.BILINEAR))
        places = places * factor
    out = np.zeros((height, width, 3), dtype=np.uint8)
    cx, cy = places[:, 0].mean(), places[:, 1].mean()
    slack_x = max(2.0, (width - (places[-1, 0] - places[0, 0]) - 24) / 2 * 0.9)
    left = int(cx - width / 2 + rng.uniform(-slack_x, slack_x))
    top = int(cy - height / 2 + rng.uniform(-20, 20))
    x0, y0 = max(0, left), max(0, top)
    x1, y1 = min(view.shape[1], left + width), min(view.shape[0], top + height)
    out[y0 - top : y1 - top, x0 - left : x1 - left] = view[y0:y1, x0:x1]
    return out, [[x - left, y - top, rx, ry] for x, y, rx, ry in places.tolist()]


class _Images:
    """Views of one batch with dense labels; equal sizes are put together when it is closed."""

    def __init__(self) -> None:
        self.views: list[Pixels] = []
        self._crop: list[Labels] = []
        self._whole: list[Labels] = []

    def add(self, view: Pixels, crop: Labels | None = None, whole: Labels | None = None) -> int:
        """Keep a view with its labels (patches, k), if any; returns its number."""
        count = view.shape[0] * view.shape[1] // PATCH**2
        self.views.append(view)
        self._crop.append(np.full((count, 4), -100) if crop is None else crop)
        self._whole.append(np.full((count, 6), -100) if whole is None else whole)
        return len(self.views) - 1

    def labels(self) -> dict[str, Tensor]:
        """Dense labels of all patches in the order of the batch."""
        both = {"crop_labels": self._crop, "whole_labels": self._whole}
        return {
            name: torch.from_numpy(np.concatenate([parts[i] for i in self.order()]))
            for name, parts in both.items()
        }

    def order(self) -> list[int]:
        """Views in the order of the batch: equal sizes together."""
        return sorted(range(len(self.views)), key=lambda i: self.views[i].shape[:2])

    def close(self) -> tuple[dict[str, Tensor], list[int]]:
        """Tensors, and the first feature row of every view in the order of `add`."""
        order = self.order()
        starts = [0] * len(self.views)
        row = 0
        for i in order:
            starts[i] = row
            row += self.views[i].shape[0] * self.views[i].shape[1] // (PATCH * MERGE) ** 2
        stacked = np.concatenate([frame_patches(self.views[i]) for i in order])
        grids = [[s // PATCH for s in self.views[i].shape[:2]] for i in order]
        return {"patches": torch.from_numpy(stacked), "grids": torch.tensor(grids)}, starts


def token_grid(view: Pixels) -> tuple[int, int]:
    """Rows and columns of visual tokens of a view."""
    step = PATCH * MERGE
    return view.shape[0] // step, view.shape[1] // step


def collate(images: _Images, items: list[tuple[Encoded, list[int]]], pad: int) -> dict[str, Tensor]:
    """Pad conversations on the right; each comes with the indices of its views."""
    tensors, starts = images.close()
    length = max(len(item.ids) for item, _ in items)
    ids = np.full((len(items), length), pad)
    labels = np.full((len(items), length), -100)
    positions = np.zeros((3, len(items), length), dtype=np.int64)
    index: list[NDArray[np.int64]] = []
    for row, (item, views) in enumerate(items):
        n = len(item.ids)
        ids[row, :n], labels[row, :n], positions[:, row, :n] = item.ids, item.labels, item.positions
        for i in views:
            rows, columns = token_grid(images.views[i])
            index.append(starts[i] + np.arange(rows * columns))
    return {
        **tensors,
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "image_index": torch.from_numpy(np.concatenate(index)),
    }


def asked_tags(
    batch: dict[str, Tensor],
    asked: list[tuple[TagRecord, SceneRecord, Pixels]],
    encoder: Encoder,
) -> dict[str, Tensor]:
    """Where each conversation should look in its first image.

    `spot` (batch, length) is true on the visual tokens that lie on the asked tag, `asking`
    (batch, length) from the last word that names the tag to the last coordinate. That word's
    own token has to look too: it knows what to look for without having it carried there.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    spot = torch.zeros_like(ids, dtype=torch.bool)
    asking = torch.zeros_like(spot)
    names = torch.tensor(sorted({encoder.ids_of(f" {word}")[-1] for word in every_name()}))
    for row, (tag, record, view) in enumerate(asked):
        rows, columns = token_grid(view)
        start = int((ids[row] == encoder.image).nonzero()[0])
        learnt = int((labels[row] != -100).nonzero()[0])
        sx, sy = columns / record.size[0], rows / record.size[1]
        grid = torch.zeros(rows, columns, dtype=torch.bool)
        left, right = int(tag.box[0] * sx + 0.25), int(tag.box[2] * sx + 0.75)
        top, bottom = int(tag.box[1] * sy + 0.25), int(tag.box[3] * sy + 0.75)
        grid[top : max(bottom, top + 1), left : max(right, left + 1)] = True
        spot[row, start : start + rows * columns] = grid.flatten()
        named = int(torch.isin(ids[row, :learnt], names).nonzero()[-1])
        asking[row, named : learnt + 4] = True
    words = [encoder.ids_of(f" {word}")[-1] for word in (*COLOURS, *SHAPES)]
    return {"spot": spot, "asking": asking, "names": torch.tensor(words)}


class StageBatches(IterableDataset[dict[str, Tensor]]):
    """Endless whole batches of a stage; batch number i depends only on the pool and i."""

    def __init__(self, stage: Stage, pool: Path, encoder: Encoder, size: int, start: int) -> None:
        self.stage = stage
        self.pool_directory = pool
        self.encoder = encoder
        self.size = size
        self.start = start

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        torch.set_num_threads(1)
        pool = Pool(self.pool_directory)
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        number = self.start + first
        while True:
            yield self.batch(pool, number)
            number += step

    def batch(self, pool: Pool, number: int) -> dict[str, Tensor]:
        """The batch of a number; scenes are taken in a shuffled order, pass after pass."""
        rng = random.Random(f"{self.stage}-{number}")
        if self.stage == "tower":
            return self._tower(pool, rng)
        # The model that looks also practises its two halves alone, at low cost.
        if self.stage == "read" or (self.stage == "scenes" and number % 3 == 2):
            return self._read(pool, rng, 64)
        if self.stage == "scenes" and number % 3 == 1:
            return self._localise(pool, rng, self.size // 2)
        return self._scenes(pool, rng)

    def _tower(self, pool: Pool, rng: random.Random) -> dict[str, Tensor]:
        images = _Images()
        for i in range(self.size):
            shard, record = rng.choice(pool.records)
            tag = rng.choice(record.tags)
            view, chars = pool.view(shard, tag.crop), tag.chars
            # A few entire crops, so that the tower learns to ignore what surrounds a tag.
            if i >= self.size // 12:
                # Enlarged characters are learnt much sooner, and help with the small ones.
                view, chars = window(rng, view, tag, zoom=2.0 if i % 2 else 1.0)
            images.add(view, crop_labels(view, chars, tag.answer))
        for _ in range(max(1, self.size // 8)):
            shard, record = rng.choice(pool.records)
            view = pool.view(shard, record.whole)
            images.add(view, whole=whole_labels(view, record))
        tensors, _ = images.close()
        return tensors | images.labels()

    def _crop_item(
        self, pool: Pool, rng: random.Random, images: _Images, narrow: float
    ) -> tuple[Encoded, list[int]]:
        """A crop to be read, or a narrow window of one."""
        shard, record = rng.choice(pool.records)
        tag = rng.choice(record.tags)
        view, chars = pool.view(shard, tag.crop), tag.chars
        if rng.random() < narrow:
            view, chars = window(rng, view, tag, zoom=rng.choice((1.0, 1.5)))
        pieces = [(crop_question_text(), False), (tag.answer + END, True)]
        place = images.add(view, crop_labels(view, chars, tag.answer))
        return self.encoder.encode(pieces, [token_grid(view)]), [place]

    def _read(self, pool: Pool, rng: random.Random, size: int) -> dict[str, Tensor]:
        images = _Images()
        # Windows or entire crops, never both: the short rows would only be padded.
        narrow = rng.random() < 0.8
        share, count = (1.0, size) if narrow else (0.0, size // 2)
        items = [self._crop_item(pool, rng, images, share) for _ in range(count)]
        return collate(images, items, self._pad()) | images.labels()

    def _localise(self, pool: Pool, rng: random.Random, scenes: int) -> dict[str, Tensor]:
        """Only the first halves of looks: cheap, so that one batch asks for many regions."""
        images = _Images()
        items: list[tuple[Encoded, list[int]]] = []
        asked: list[tuple[TagRecord, SceneRecord, Pixels]] = []
        for _ in range(scenes):
            shard, record = rng.choice(pool.records)
            view = pool.view(shard, record.whole)
            first = images.add(view, whole=whole_labels(view, record))
            trigger = rng.random() < 0.5
            # Questions that name a colour alone are learnt last, so they are asked more often.
            plain = [t for t in record.tags if not any(s in t.question for s in SHAPES)]
            named = [t for t in plain if any(f" {c} " in t.question for c in COLOURS)]
            tags = named if named and rng.random() < 0.5 else record.tags
            for tag in rng.sample(tags, min(6, len(tags))):
                asked.append((tag, record, view))
                pieces = [
                    (question_text(tag.question, trigger), False),
                    (region_text(tag.cells) + END, True),
                ]
                items.append((self.encoder.encode(pieces, [token_grid(view)]), [first]))
        batch = collate(images, items, self._pad()) | images.labels()
        return batch | asked_tags(batch, asked, self.encoder)

    def _scenes(self, pool: Pool, rng: random.Random) -> dict[str, Tensor]:
        images = _Images()
        items: list[tuple[Encoded, list[int]]] = []
        asked: list[tuple[TagRecord, SceneRecord, Pixels]] = []
        while len(items) < self.size:
            shard, record = rng.choice(pool.records)
            place = record.large if self.stage == "baseline-large" else record.whole
            view = pool.view(shard, place)
            first = images.add(view, whole=whole_labels(view, record))
            # Several questions share the work of one whole view.
            for tag in rng.sample(record.tags, min(4, len(record.tags))):
                start = question_text(tag.question, rng.random() < 0.5)
                if self.stage != "scenes":
                    pieces = [(start, False), (tag.answer + END, True)]
                    items.append((self.encoder.encode(pieces, [token_grid(view)]), [first]))
                    continue
                crop = pool.view(shard, tag.crop)
                second = images.add(crop, crop_labels(crop, tag.chars, tag.answer))
                asked.append((tag, record, view))
                pieces = [
                    (start, False),
                    (region_text(tag.cells) + END, True),
                    (LOOK, False),
                    (tag.answer + END, True),
                ]
                grids = [token_grid(view), token_grid(crop)]
                items.append((self.encoder.encode(pieces, grids), [first, second]))
        batch = collate(images, items, self._pad())
        if self.stage != "scenes":
            return batch
        return batch | images.labels() | asked_tags(batch, asked, self.encoder)

    def _pad(self) -> int:
        return token_id(self.encoder.tokenizer, END_OF_TEXT)
