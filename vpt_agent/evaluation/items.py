"""What is asked in an evaluation: a question, its answer, what it needs, and where to look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt_agent.data import Row, row_views
from vpt_agent.errors import UserError
from vpt_agent.tokens.grid import RegionPolicy, region_to_box
from vpt_agent.tokens.table import IMAGE_TAG, PUBLISHED, PerceptionKind
from vpt_agent.types import Box

if TYPE_CHECKING:
    from PIL import Image

Needs = tuple[tuple[str, ...], ...]
"""What a question needs: every entry names kinds of which one must be called. () is: none."""


@dataclass(frozen=True)
class Item:
    """One question. ``picture`` gives the image when it is asked (RGB), so that many items fit.

    ``type`` is the type of question that figures are split by. ``boxes`` are the true objects, in
    pixels of the picture; ``crops`` what looking at them should show (empty: the boxes). ``needs``
    is None where nobody said.
    """

    id: str
    question: str
    answer: str
    picture: Callable[[], Image.Image]
    type: str = ""
    needs: Needs | None = None
    boxes: tuple[Box, ...] = ()
    crops: tuple[Box, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> tuple[Box, ...]:
        """What a look at the true place shows: ``crops``, or else the boxes."""
        return self.crops or self.boxes


def items_of_rows(
    rows: Iterable[Row],
    *,
    folder: Path | str | None = None,
    kinds: Mapping[str, PerceptionKind] | None = None,
    policy: RegionPolicy = "published",
) -> Iterator[Item]:
    """Rows of :mod:`vpt_agent.data` as items.

    The question is the first message without its tags and without a kind's trigger phrase (a run
    that forces a kind adds it again); the answer is ``meta["answer"]``, or the last message without
    a kind's prefix. Needed kinds are ``meta["tools"]``, or those that the row calls. True boxes are
    ``meta["regions"]`` (cells, by ``policy``), or the crops of the row. A row without exactly one
    whole picture at its beginning is a :class:`UserError`: one question, one picture.
    """
    table = dict(kinds or PUBLISHED)
    for number, row in enumerate(rows):
        yield _item(number, row, folder, table, policy)


def _item(
    number: int,
    row: Row,
    folder: Path | str | None,
    kinds: Mapping[str, PerceptionKind],
    policy: RegionPolicy,
) -> Item:
    first = row.messages[0].content
    refs = row.pictures.get(IMAGE_TAG, ())
    if first.count(IMAGE_TAG) != 1 or not refs or refs[0].crop is not None:
        raise UserError(
            "only rows that ask about one whole picture can be evaluated",
            where=row.where,
            got=f"{first.count(IMAGE_TAG)} {IMAGE_TAG} in the first message",
        )
    question = first.replace(IMAGE_TAG, "")
    for kind in kinds.values():
        if kind.trigger:
            question = question.replace(kind.trigger, "")
    cells = row.meta.get("regions") or ()
    crops = tuple(Box(*ref.crop) for ref in refs if ref.crop is not None)

    def picture() -> Image.Image:
        return row_views(row, folder=folder)[IMAGE_TAG][0].image

    if cells:
        grid, size = int(row.meta.get("grid", 8)), picture().size
        crops = tuple(region_to_box([int(c) for c in r], size, grid, policy) for r in cells)
    return Item(
        id=str(row.meta.get("id", number)),
        question=question.strip(),
        answer=_answer(row, kinds),
        picture=picture,
        type=str(row.meta.get("type", "")),
        needs=_needs(row, kinds),
        boxes=crops,
    )


def _answer(row: Row, kinds: Mapping[str, PerceptionKind]) -> str:
    if "answer" in row.meta:
        return str(row.meta["answer"])
    text = row.messages[-1].content
    for kind in kinds.values():
        if kind.answer_prefix and text.startswith(kind.answer_prefix):
            text = text[len(kind.answer_prefix) :]
    return text.strip()


def _needs(row: Row, kinds: Mapping[str, PerceptionKind]) -> Needs:
    if "tools" in row.meta:
        return tuple((str(name),) for name in row.meta["tools"])
    said = [m.content for m in row.messages if m.role == "assistant"]
    called = (name for name, kind in kinds.items() if any(kind.start in text for text in said))
    return tuple((name,) for name in called)
