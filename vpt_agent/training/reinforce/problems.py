"""What is asked: questions with pictures and the answers that are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from vpt_agent.data import Mixture, Row, row_views
from vpt_agent.errors import UserError
from vpt_agent.tokens.table import IMAGE_TAG, PUBLISHED
from vpt_agent.training.config import Source
from vpt_agent.training.reinforce.config import ReinforceConfig
from vpt_agent.training.sources import RowFile


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
    """The questions of a file of rows; pictures are opened when a problem is taken."""

    def __init__(self, source: Source) -> None:
        self._rows = RowFile(source)
        if not self._rows:
            raise UserError("a source has no questions", where=source.path)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Problem: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...

    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        """One problem, or several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        placed = self._rows[index]
        return problem_of(placed.row, folder=placed.folder)


def problems_of(config: ReinforceConfig) -> Mixture[Problem]:
    """The endless stream of a config's questions, in stated shares, shuffled by its seed."""
    if not config.sources:
        raise UserError("there are no questions to ask", where="sources", fix="name a file of rows")
    return endless([(RowProblems(s), s.weight) for s in config.sources], seed=config.seed)


def endless(
    sources: Sequence[tuple[Sequence[Problem], float]], *, seed: int = 0
) -> Mixture[Problem]:
    """Problems of ``sources`` by weight, without end, each source shuffled as a whole."""
    size = max(len(source) for source, _ in sources)
    return Mixture(sources, seed=seed, buffer=max(1, size), stop="never")


def at_step(stream: Mixture[Problem], step: int, count: int) -> list[Problem]:
    """The ``count`` problems of step ``step`` (from 0): the same for the same stream."""
    stream.load_state_dict(stream.state_dict(position=step * count))
    taken = []
    for problem in stream:
        taken.append(problem)
        if len(taken) == count:
            break
    return taken
