"""An endless stream of ready batches that can be taken up where it was left.

Rows are dealt to shards (processes times workers). A shard takes ``window`` rows at a time, sorts
them into batches of like length, shuffles these, and gives each batch a cursor: shard, window,
batches given of it. From the last cursors the stream goes on with the very next batch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from vpt_agent.data import Mixture
from vpt_agent.errors import UserError, VPTError
from vpt_agent.training.collate import Batch, Collator, Item, plan_batches
from vpt_agent.training.sources import Taken

EMPTY_WINDOWS = 100
"""After so many windows without one usable row the data is at fault."""


class Cursor(NamedTuple):
    """How far a worker's share is: ``used`` batches of window ``window`` were given out."""

    worker: int
    window: int
    used: int


@dataclass(frozen=True)
class Shape:
    """How rows become batches; see :class:`~vpt_agent.training.config.DataPart`."""

    rows: int
    tokens: int | None
    window: int
    seed: int


class Batches(IterableDataset[Batch]):
    """Ready batches, without end, of one process's share of ``rows``.

    ``rank`` of ``world`` processes. ``cursors`` (by worker) and ``given`` (batches given out so
    far) take the stream up where it was left; the number of processes and of workers must be the
    same. Beside the arguments of ``forward`` a batch has ``cursor``; ``counts``, what became of the
    rows since the last one; and ``kinds``, how many of its rows teach which perception kind.
    """

    def __init__(
        self,
        rows: Mixture[Taken],
        collator: Collator,
        shape: Shape,
        *,
        rank: int = 0,
        world: int = 1,
        cursors: Mapping[int, Cursor] | None = None,
        given: int = 0,
    ) -> None:
        self.rows, self.collator, self.shape = rows, collator, shape
        self.rank, self.world = rank, world
        self.cursors = dict(cursors or {})
        self.given = given

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        if info is not None:
            torch.set_num_threads(1)
        # The loader asks worker 0 first; after a resume that is not whose turn it was.
        worker = ((info.id if info else 0) + self.given) % workers
        try:
            yield from self._share(worker, workers)
        except VPTError as error:
            if info is None:
                raise
            # Raised in a worker, it would reach the user as the text of a traceback.
            yield {"error": error}

    def _share(self, worker: int, workers: int) -> Iterator[Batch]:
        size = self.shape.window
        shards = self.world * workers
        shard = self.rank * workers + worker
        start = self.cursors.get(worker, Cursor(worker, 0, 0))
        self.rows.seek(shards * size * start.window)
        stream = iter(self.rows.shard(shard, shards))
        window, used, empty = start.window, start.used, 0
        while True:
            items = [self.collator.item(row) for row in islice(stream, size)]
            if used:  # taken up in the middle of a window, whose rows were counted already
                self.collator.counts.clear()
            kept = [item for item in items if item is not None]
            empty = 0 if kept else empty + 1
            if empty == EMPTY_WINDOWS:
                raise UserError(
                    "no row can be trained on",
                    got=", ".join(f"{k}: {n}" for k, n in self.collator.counts.items() if n),
                    fix="raise data.max_length, or look at the rows with vpt-agent data check",
                )
            groups = plan_batches(
                [len(item) for item in kept], rows=self.shape.rows, tokens=self.shape.tokens
            )
            random.Random(f"{self.shape.seed} {shard} {window}").shuffle(groups)
            for number, group in enumerate(groups):
                if number >= used:
                    yield self._batch([kept[i] for i in group], Cursor(worker, window, number + 1))
            window, used = window + 1, 0

    def _batch(self, items: list[Item], cursor: Cursor) -> Batch:
        counts = dict(self.collator.counts)
        self.collator.counts.clear()
        kinds = dict(Counter(kind for item in items for kind in item.kinds))
        about = {"cursor": tuple(cursor), "counts": counts, "kinds": kinds}
        return self.collator.batch(items) | about


class Fixed(IterableDataset[Batch]):
    """Batches of given rows, once, sorted by length: for evaluation.

    Of several processes and workers each takes its share of the windows. ``collator`` should be
    used by nobody else: its counts are those of these rows.
    """

    def __init__(
        self,
        rows: Sequence[Taken],
        collator: Collator,
        shape: Shape,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rows, self.collator, self.shape = rows, collator, shape
        self.rank, self.world = rank, world

    def require_usable(self) -> None:
        """Raise :class:`UserError` where all rows are dropped: better before a run than at its end.

        Stops at the first row that can be used.
        """
        counts = self.collator.counts
        counts.clear()
        if all(self.collator.item(row) is None for row in self.rows):
            raise UserError(
                "no row can be evaluated on",
                where="data.hold_out or data.evaluation",
                got=", ".join(f"{k}: {n}" for k, n in counts.items() if n),
                fix="raise data.max_length, hold out other rows, or hold out none",
            )
        counts.clear()

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        try:
            yield from self._share(*((info.id, info.num_workers) if info else (0, 1)))
        except VPTError as error:
            if info is None:
                raise
            yield {"error": error}  # see Batches

    def _share(self, worker: int, workers: int) -> Iterator[Batch]:
        share, shares = self.rank * workers + worker, self.world * workers
        size = self.shape.window
        for window, first in enumerate(range(0, len(self.rows), size)):
            if window % shares != share:
                continue
            made = [self.collator.item(row) for row in self.rows[first : first + size]]
            kept = [item for item in made if item is not None]
            lengths = [len(item) for item in kept]
            for group in plan_batches(lengths, rows=self.shape.rows, tokens=self.shape.tokens):
                yield self.collator.batch([kept[i] for i in group])
