"""What is asked: questions with pictures and the answers that are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from vpt_agent.data import Mixture, Row, RowError, row_views
from vpt_agent.errors import UserError
from vpt_agent.tokens.table import IMAGE_TAG, PUBLISHED, PerceptionTable
from vpt_agent.training.config import Source
from vpt_agent.training.reinforce.config import ReinforceConfig
from vpt_agent.training.sources import RowFile, Wanted


@dataclass(frozen=True)
class Problem:
    """A question about ``images`` (paths or PIL pictures) whose right ``answer`` is known.

    ``type`` groups problems in the figures; ``meta`` is for rewards of one's own.
    """

    question: str
    answer: str
    images: tuple[Any, ...] = ()
    type: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


def problem_of(row: Row, *, folder: Path | str | None = None) -> Problem:
    """The question of ``row``: its first message, with the pictures that stand there.

    The right answer is ``meta.answer``, else the last message.
    """
    asked = row.messages[0].content
    shown = asked.count(IMAGE_TAG)
    views = row_views(row, folder=folder).get(IMAGE_TAG, ())[:shown]
    others = [kind.tag for kind in PUBLISHED.values() if kind.tag != IMAGE_TAG]
    if any(tag in asked for tag in others):
        raise UserError(
            "the first message of a row already shows a re-encoded picture",
            where=row.where,
            expected=f"{IMAGE_TAG} and the question",
        )
    return Problem(
        asked.replace(IMAGE_TAG, "").strip(),
        str(row.meta.get("answer", row.messages[-1].content)).strip(),
        tuple(view.image for view in views),
        str(row.meta.get("type", "")),
        row.meta,
    )


class RowProblems(Sequence[Problem]):
    """The questions of a source of rows; pictures are opened when a problem is taken.

    ``table`` is the model's, so that rows may use its own kinds.
    """

    def __init__(self, source: Source, *, table: PerceptionTable | None = None) -> None:
        if source.stream or source.retarget:
            raise UserError(
                "questions are taken by number, and as they stand",
                where="sources",
                got=f"stream: {source.stream}, retarget: {source.retarget}",
                fix="leave stream and retarget out",
            )
        self._rows = RowFile(source, wanted=Wanted(table=table))
        self.name = self._rows.name
        if not self._rows:
            raise UserError("a source has no questions", where=source.path or self.name)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._rows)

    def fingerprint(self) -> str | None:
        """Changes when the rows do; None where that is not known."""
        return self._rows.fingerprint()

    @overload
    def __getitem__(self, index: int) -> Problem: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...

    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        """One problem, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[index]
        if isinstance(row, RowError):
            raise row
        return problem_of(row)


def problems_of(config: ReinforceConfig, table: PerceptionTable | None = None) -> Mixture[Problem]:
    """The endless stream of a config's questions, in stated shares, shuffled by its seed."""
    if not config.sources:
        raise UserError("there are no questions to ask", where="sources", fix="name a file of rows")
    pairs = [(RowProblems(source, table=table), source.weight) for source in config.sources]
    return endless(pairs, seed=config.seed)


def endless(
    sources: Sequence[tuple[Sequence[Problem], float]], *, seed: int = 0
) -> Mixture[Problem]:
    """Problems of ``sources`` by weight, without end, each source shuffled as a whole."""
    size = max(len(source) for source, _ in sources)
    return Mixture(sources, seed=seed, buffer=max(1, size), stop="never")


def at_step(stream: Mixture[Problem], step: int, count: int) -> list[Problem]:
    """The ``count`` problems of step ``step`` (from 0): the same for the same stream."""
    stream.seek(step * count)
    taken = []
    for problem in stream:
        taken.append(problem)
        if len(taken) == count:
            break
    return taken
