"""Files of rows as sequences that are read where they are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, overload

from vpt_agent.data import Mixture, Row, Rules, load_rows
from vpt_agent.errors import UserError
from vpt_agent.training.config import DataPart, Source


class Placed(NamedTuple):
    """A row, and the folder in which its relative picture paths begin (None: they are placed)."""

    row: Row
    folder: Path | None


class RowFile(Sequence[Placed]):
    """The rows of a JSON array or of JSON lines (``.jsonl``); each is checked when it is taken.

    ``first`` and ``last`` say which part of the file counts. Picture paths begin in the source's
    ``images``, else in the file's own folder, after ``remap`` has replaced their beginnings.
    """

    def __init__(
        self,
        source: Source,
        *,
        first: int = 0,
        last: int | None = None,
        rules: Rules = "strict",
    ) -> None:
        if source.path is None:
            raise UserError(
                "scenes are drawn by the command, not by the library",
                where="data.sources",
                got=f"scenes: {source.scenes}",
                fix="use vpt-agent train, or vpt-agent nano scenes, and give the path",
            )
        self.path = source.path
        folder = source.images or source.path.parent
        self._rows = load_rows(source.path, folder=folder, remap=source.remap, rules=rules)
        self._range = range(len(self._rows))[first:last]

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> Placed: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Placed]: ...

    def __getitem__(self, index: int | slice) -> Placed | Sequence[Placed]:
        """One row (or several); what is wrong with it is a :class:`UserError`."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Placed(self._rows[self._range[index]], None)


def rules_of(data: DataPart) -> Rules:
    """Published truncation comes with all published rules of reading rows."""
    return "published" if data.truncation == "published" else "strict"


def training_rows(data: DataPart, *, seed: int) -> tuple[Mixture[Placed], int]:
    """The endless mixture of the sources, and how many rows they have in all."""
    files = [RowFile(s, first=data.hold_out, rules=rules_of(data)) for s in data.sources]
    for file in files:
        if not len(file):
            raise UserError(
                "a source has no rows left for training",
                where=file.path,
                got=f"hold_out: {data.hold_out}",
                fix="hold out fewer rows",
            )
    pairs = [(file, s.weight) for file, s in zip(files, data.sources, strict=True)]
    mixture: Mixture[Placed] = Mixture(pairs, seed=seed, buffer=data.shuffle, stop="never")
    return mixture, sum(len(file) for file, weight in pairs if weight > 0)


def evaluation_rows(data: DataPart) -> list[Placed]:
    """The rows that are kept for evaluation: the same ones each time, at most so many."""
    if data.evaluation:
        files = [RowFile(s, rules=rules_of(data)) for s in data.evaluation]
    else:
        files = [RowFile(s, last=data.hold_out, rules=rules_of(data)) for s in data.sources]
    taken: list[Placed] = []
    for number in range(max((len(file) for file in files), default=0)):
        for file in files:  # in turn, so that each source has its share
            if number < len(file) and len(taken) < data.max_evaluation:
                taken.append(file[number])
    return taken
