"""The rows of a config's sources, read where they are looked at, or as they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

from vpt_agent.data import (
    Mixture,
    Reading,
    Row,
    RowError,
    Rows,
    RowStream,
    Rules,
    load_rows,
    open_dataset,
    stream_rows,
)
from vpt_agent.errors import UserError
from vpt_agent.tokens.table import PerceptionTable
from vpt_agent.training.config import DataPart, Source

Taken = Row | RowError
"""A row; or what is wrong with it, where bad rows are skipped and counted."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How rows are read: for a model with ``table``, by ``rules``; bad ones raised, or given out as
    their errors (``skip``)."""

    table: PerceptionTable | None = None
    rules: Rules = "strict"
    skip: bool = False

    @classmethod
    def by(cls, data: DataPart, table: PerceptionTable | None) -> Wanted:
        """As a config says it."""
        return cls(table=table, rules=rules_of(data), skip=data.bad_rows == "skip")

    def taken(self, reading: Reading, item: tuple[str, object]) -> Taken:
        """The row of a raw item."""
        try:
            return reading.row(item)
        except RowError as error:
            if self.skip:
                return error
            raise


class RowFile(Sequence[Taken]):
    """The rows of a source that have numbers; each is checked when it is taken.

    ``first`` and ``last`` say which part of them counts. Picture paths begin in the source's
    ``images``, else in the file's own folder, after ``remap`` has replaced their beginnings.
    """

    def __init__(
        self,
        source: Source,
        *,
        first: int = 0,
        last: int | None = None,
        wanted: Wanted | None = None,
    ) -> None:
        self.wanted = wanted or Wanted()
        origin, name = _origin(source)
        self._rows: Rows = load_rows(origin, name=name, **_options(source, self.wanted))
        self.name = name
        self._range = range(len(self._rows))[first:last]

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._range)

    def fingerprint(self) -> str | None:
        """Changes when the rows do; None where that is not known."""
        return self._rows.fingerprint()

    @overload
    def __getitem__(self, index: int) -> Taken: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Taken]: ...

    def __getitem__(self, index: int | slice) -> Taken | Sequence[Taken]:
        """One row (or several); what is wrong with it is a :class:`UserError`."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        item = self._rows.indexed.item(self._range[index])
        return self.wanted.taken(self._rows.reading, item)


class RowFlow(Iterable[Taken]):
    """The rows of a source that is streamed, from row ``first`` on, up to ``last``."""

    def __init__(
        self,
        source: Source,
        *,
        first: int = 0,
        last: int | None = None,
        wanted: Wanted | None = None,
    ) -> None:
        self.wanted, self.first, self.last = wanted or Wanted(), first, last
        origin, self.name = _origin(source)
        self._rows: RowStream = stream_rows(origin, name=self.name, **_options(source, self.wanted))

    def fingerprint(self) -> str | None:
        """That of a file; what else is streamed is known when it has come."""
        return self._rows.fingerprint()

    def __iter__(self) -> Iterator[Taken]:
        for item in islice(self._rows.items, self.first, self.last):
            yield self.wanted.taken(self._rows.reading, item)


def _origin(source: Source) -> tuple[Any, str]:
    """What the readers take, and what it is called."""
    if source.path is not None:
        return source.path, source.path.name
    if source.dataset is None:
        raise UserError(
            "scenes are drawn by the command, not by the library",
            where="data.sources",
            got=f"scenes: {source.scenes}",
            fix="use vpt-agent train, or vpt-agent nano scenes, and give the path",
        )
    part = source.dataset
    table = open_dataset(
        part.name,
        config=part.subset,
        split=part.split,
        files=None if part.files is None else list(part.files),
        streaming=source.stream,
    )
    return table, f"{part.name}, {part.split}"


def _options(source: Source, wanted: Wanted) -> Any:
    if source.retarget and wanted.table is None:
        raise UserError(
            "rows are re-targeted for a model, and here there is none",
            where="retarget",
            got=source.retarget,
        )
    own = [kind.tag for kind in wanted.table.kinds] if wanted.table is not None else []
    return {
        "folder": source.images,
        "remap": source.remap,
        "columns": source.columns,
        "table": wanted.table if source.retarget else None,
        "encoder": source.retarget if isinstance(source.retarget, str) else None,
        "own_tags": own,
        "rules": wanted.rules,
    }


def rules_of(data: DataPart) -> Rules:
    """Published truncation comes with all published rules of reading rows."""
    return "published" if data.truncation == "published" else "strict"


def training_rows(
    data: DataPart, *, seed: int, table: PerceptionTable | None = None
) -> tuple[Mixture[Taken], int | None]:
    """The endless mixture of the sources, and how many rows they have in all (None: streams)."""
    wanted, pairs = Wanted.by(data, table), list[tuple[RowFile | RowFlow, float]]()
    for source in data.sources:
        if source.stream:
            pairs.append((RowFlow(source, first=data.hold_out, wanted=wanted), source.weight))
            continue
        file = RowFile(source, first=data.hold_out, wanted=wanted)
        if not len(file):
            raise UserError(
                "a source has no rows left for training",
                where=source.path or file.name,
                got=f"hold_out: {data.hold_out}",
                fix="hold out fewer rows",
            )
        pairs.append((file, source.weight))
    mixture: Mixture[Taken] = Mixture(pairs, seed=seed, buffer=data.shuffle, stop="never")
    counts = [len(f) if isinstance(f, RowFile) else None for f, weight in pairs if weight > 0]
    known = [count for count in counts if count is not None]
    return mixture, sum(known) if len(known) == len(counts) else None


def evaluation_rows(data: DataPart, table: PerceptionTable | None = None) -> list[Taken]:
    """The rows that are kept for evaluation: the same ones each time, at most so many."""
    wanted = Wanted.by(data, table)
    last = None if data.evaluation else data.hold_out
    sources = data.evaluation or data.sources
    if not data.evaluation and not data.hold_out:
        return []
    streams = [
        iter((RowFlow if source.stream else RowFile)(source, last=last, wanted=wanted))
        for source in sources
    ]
    taken: list[Taken] = []
    while streams and len(taken) < data.max_evaluation:
        for stream in list(streams):  # in turn, so that each source has its share
            row = next(stream, None)
            if row is None:
                streams.remove(stream)
            elif len(taken) < data.max_evaluation:
                taken.append(row)
    return taken
