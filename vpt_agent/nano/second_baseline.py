"""The second version without perception tokens: what the same model learns that never looks again.

``python -m vpt_agent.nano.second_baseline --view global|large --out DIR [--steps N] [--rate R]``

Begins with what the stage ``talk`` begins with, and takes the same questions about the same pool in
the same shares, rows and steps; but every answer follows its question at once. ``global`` sees the
first look of 224 pixels. ``large`` sees the whole picture at 504 pixels instead, 312 visual tokens
on average: as many as first look and re-encoding together (317 with dino or sam, 373 with clip, 119
with a region), and large enough for the marks. Both have the tower's dense labels and are shown
where to look, as the model with tokens is. The checkpoint in ``DIR/baseline-VIEW/checkpoint`` is
asked with ``tool_choice="none"`` (`benchmarks/perception.py --baseline`); its kinds are untrained.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.trainer_utils import get_last_checkpoint

from vpt_agent.nano.batches import Labels, _Images, asked_tags, collate, token_grid, whole_labels
from vpt_agent.nano.conversation import Encoded
from vpt_agent.nano.domain.ask import GROUPS
from vpt_agent.nano.domain.sight import AGAIN
from vpt_agent.nano.domain.table import TABLE
from vpt_agent.nano.pool import Pixels, TagRecord
from vpt_agent.nano.second.batches import PLAN, Batch, SecondBatches
from vpt_agent.nano.second.labels import again_labels, in_block_order, spots
from vpt_agent.nano.second.model import Second
from vpt_agent.nano.second.pool import AskedRecord, DomainPool, DomainRecord
from vpt_agent.nano.second.text import END, SecondEncoder, opening, second_tokenizer
from vpt_agent.nano.second.train import (
    STAGES,
    WEIGHTS,
    _arguments,
    _SecondTrainer,
    load_second,
)
from vpt_agent.nano.ship import image_policy
from vpt_agent.nano.train import _Progress

View = Literal["global", "large"]
LARGE: Final = "clip"
"""The large view is what this kind's second look shows: the pool holds it."""
# What each kind of batch of the stage talk asks.
_GROUPS: Final = {"clip": "reencode", "dino": "reencode", "sam": "reencode", "read": "region"}
_EACH: Final[dict[View, int]] = {"global": 4, "large": 8}
"""Questions that share one view, at most: as in the stage talk; twice as many where the tower takes
the longest, since a large view costs it 0.2 s forward alone."""


class BaselineBatches(SecondBatches):
    """The stage talk's questions with direct answers; batch i depends only on the pool and i.

    ``pack`` puts the questions about a view into one row (:func:`packed`).
    """

    def __init__(
        self,
        view: View,
        pool: Path,
        encoder: SecondEncoder,
        size: int = 16,
        start: int = 0,
        plan: Sequence[str] | None = None,
        pack: bool = True,
    ) -> None:
        # Batches of dense labels alone have no questions; here every batch has those labels.
        plan = [k for k in plan or PLAN["talk"] if _GROUPS.get(k, k) in GROUPS]
        super().__init__("talk", pool, encoder, size, start, plan)
        self.view, self.pack = view, pack

    def batch(self, pool: DomainPool, number: int) -> Batch:
        """The batch of a number: the stage's groups of questions in turn."""
        rng = random.Random(f"second-baseline-{number}")
        kind = self.plan[number % len(self.plan)]
        group = _GROUPS.get(kind, kind)
        images, items, cells = _Images(), list[tuple[Encoded, list[int]]](), list[Labels]()
        rows: list[tuple[DomainRecord, Pixels, AskedRecord]] = []
        while len(items) < self.size:
            shard, record, _ = self._chosen(pool, rng, group)
            asked = self._questions(record, group, rng)
            large = self.view == "large"
            view = pool.view(shard, record.again[LARGE] if large else record.scene.whole)
            place = images.add(view, whole=whole_labels(view, record.scene))
            cells.append(in_block_order(again_labels(record, LARGE, *view.shape[:2])))
            for question in asked:
                pieces = [(opening(question.question), False), (question.answer + END, True)]
                items.append((self.encoder.encode_again(pieces, [token_grid(view)], 0), [place]))
                rows.append((record, view, question))
        batch: Batch = collate(images, items, self.pad) | images.labels()
        batch |= {"name": group, "first_reply": torch.zeros_like(batch["labels"][:, 1:]).bool()}
        if self.view == "large":
            order = np.concatenate([cells[i] for i in images.order()])
            batch |= {"kind": LARGE, "again_labels": torch.from_numpy(order),
                      "again_patches": torch.arange(len(batch["patches"]))}  # fmt: skip
        batch |= self._shown(batch, group, rows)
        if not self.pack:
            return batch
        return packed(batch, [place for _, (place,) in items], self.encoder.image)

    def _questions(self, record: DomainRecord, group: str, rng: random.Random) -> list[AskedRecord]:
        """Some of a group's questions about a scene; of any tag, where one is to be read."""
        found = self._asked(record, group)
        if group == "region":
            tags = enumerate(record.scene.tags)
            found = [AskedRecord(group, t.question, t.answer, [], [i]) for i, t in tags]
        return rng.sample(found, min(_EACH[self.view], len(found)))

    def _shown(
        self,
        batch: Batch,
        group: str,
        rows: Sequence[tuple[DomainRecord, Pixels, AskedRecord]],
    ) -> Batch:
        """Where each answer is to look: at the tag it reads, or at marks that can be seen."""
        if group == "region":
            reading: list[tuple[TagRecord, DomainRecord, Pixels]] = [
                (record.scene.tags[asked.reads[0]], record, view) for record, view, asked in rows
            ]
            found = asked_tags(
                batch, [(tag, record.scene, view) for tag, record, view in reading], self.encoder
            )
            return {key: found[key] for key in ("spot", "asking")}
        if group != "reencode" or self.view != "large":
            return {}
        ids = batch["input_ids"]
        spot, asking = (torch.zeros_like(ids, dtype=torch.bool) for _ in range(2))
        for row, (record, view, asked) in enumerate(rows):
            marks = torch.from_numpy(spots(record, LARGE, view, asked.tags)).bool()
            spot[row, ids[row] == self.encoder.image] = marks
            if marks.any():
                learnt = (batch["labels"][row] != -100).nonzero()[:, 0]
                asking[row, int(learnt[0]) - 1] = True
        return {"spot_again": spot, "asking_again": asking}


def packed(batch: Batch, views: Sequence[int], image: int) -> Batch:
    """The same batch with one row a view: what its questions begin with, and then each of them.

    ``views`` names each row's view, rows of one view together; ``image`` is the id of visual
    tokens. A question sees the beginning and itself (``seen``), at the positions that it had alone:
    logits and losses are those of the rows apart, and the view's tokens are computed once.
    """
    ids = batch["input_ids"]
    groups = [[r for r, v in enumerate(views) if v == view] for view in dict.fromkeys(views)]
    counts = (ids == image).sum(1).tolist()
    index = batch["image_index"].split(counts)
    known = (batch["labels"] != -100).int()
    lengths = (known.shape[1] - known.flip(1).argmax(1)).tolist()  # up to the last label
    takes: list[list[tuple[int, int]]] = []  # of each new row: whence its tokens come
    seen = []
    for rows in groups:
        first = int((ids[rows[0]] == image).nonzero()[-1]) + 1  # the beginning ends with the view
        take = [(rows[0], column) for column in range(first)]
        take += [(row, column) for row in rows for column in range(first, lengths[row])]
        takes.append(take)
        part = torch.tensor([-1] * first + [r for r in rows for _ in range(first, lengths[r])])
        seen.append(((part[:, None] == part) | (part == -1)).tril())
    longest = max(len(take) for take in takes)
    source = torch.zeros(len(takes), longest, 2, dtype=torch.long)
    real = torch.zeros(len(takes), longest, dtype=torch.bool)
    mask = torch.ones(len(takes), longest, longest, dtype=torch.bool).tril()
    for row, take in enumerate(takes):
        source[row, : len(take)], real[row, : len(take)] = torch.tensor(take), True
        mask[row, : len(take), : len(take)] = seen[row]
    at, column = source.unbind(-1)
    found = batch | {
        "input_ids": torch.where(real, ids[at, column], ids[0, 0]),
        "labels": torch.where(real, batch["labels"][at, column], -100),
        "position_ids": torch.where(real, batch["position_ids"][:, at, column], 0),
        "image_index": torch.cat([index[rows[0]] for rows in groups]),
        "first_reply": torch.zeros(len(takes), longest - 1, dtype=torch.bool),
        "seen": mask,
        "packed": torch.ones(()),
    }
    for name in ("", "_again"):
        if f"asking{name}" in batch:
            asking = batch[f"asking{name}"][at, column] & real
            found[f"asking{name}"] = asking
            # Spots are visual tokens: in the beginning, where all rows of a view have the same.
            spots = torch.zeros(len(at[asking]), longest, dtype=torch.bool)
            width = min(longest, ids.shape[1])
            spots[:, :width] = batch[f"spot{name}"][at[asking], :width]
            found[f"spot{name}"] = spots
    return found


def visual_tokens(pool: DomainPool, view: View) -> float:
    """Visual tokens of a view, on average over a pool."""
    places = [r.again[LARGE] if view == "large" else r.scene.whole for _, r in pool.records]
    return sum(h * w for _, h, w in places) / len(places) / 28**2


def train_baseline(
    view: View,
    out: Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    rate: float | None = None,
    resume: bool = False,
    threads: int = 2,
    size: int = 16,
) -> Path:
    """Train a baseline from the scenes in ``out/pool`` and what the stage see left in ``out``;
    gives the checkpoint's folder.

    ``minutes`` stops early with a checkpoint that ``resume`` continues; ``steps`` and ``rate``
    replace the schedule's length and peak learning rate, those of the stage talk.
    """
    config = STAGES["talk"] if rate is None else replace(STAGES["talk"], rate=rate)
    directory = out / f"baseline-{view}"
    directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    last = get_last_checkpoint(str(directory)) if resume else None
    model = load_second(out, "talk")
    done = int(last.rsplit("-", 1)[1]) if last else 0
    encoder = SecondEncoder(second_tokenizer())
    data = BaselineBatches(view, out / "pool", encoder, size, done)

    def export() -> None:
        save_file({k: v.clone() for k, v in model.state_dict().items()}, directory / WEIGHTS)

    trainer = _SecondTrainer(
        model=model,
        args=_arguments(directory, config, steps or config.steps),
        train_dataset=data,
        data_collator=lambda items: items[0],
        callbacks=[_Progress(directory, minutes, size, export)],
    )
    trainer.found = {}
    trainer.train(resume_from_checkpoint=last)
    export()
    return save_baseline(model, view, directory / "checkpoint")


def save_baseline(model: Second, view: View, target: Path) -> Path:
    """Write the model as a checkpoint of the library's that sees the baseline's view."""
    images = image_policy() | ({"longest": AGAIN[LARGE]} if view == "large" else {})
    perception = dict(model.vpt.config.perception)
    perception |= {"images": images, "untrained": [kind.name for kind in TABLE.kinds]}
    model.vpt.config.perception = perception
    model.vpt.save_pretrained(target)
    second_tokenizer().save_pretrained(target)
    return target


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="vpt_agent.nano.second_baseline", description=__doc__)
    parser.add_argument("--view", required=True, choices=get_args(View))
    parser.add_argument("--out", required=True, type=Path, help="the recipe's work folder")
    parser.add_argument("--minutes", type=float, help="stop early and write a checkpoint")
    parser.add_argument("--steps", type=int, help="length of the schedule; default: that of talk")
    parser.add_argument("--rate", type=float, help="peak learning rate; default: that of talk")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=16, help="rows of a batch")
    options = parser.parse_args(arguments)
    path = train_baseline(
        options.view,
        options.out,
        minutes=options.minutes,
        steps=options.steps,
        rate=options.rate,
        resume=options.resume,
        threads=options.threads,
        size=options.size,
    )
    print(path)


if __name__ == "__main__":
    main()
