"""From annotations to rows: regions, re-encoding and direct answers, in stated shares."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vpt_agent.data.builder.annotations import Annotation, read_box
from vpt_agent.data.builder.deal import deal
from vpt_agent.data.check import ALL_KINDS
from vpt_agent.data.report import CheckReport
from vpt_agent.data.rows import ImageRef, Message, Row, RowError
from vpt_agent.errors import UserError
from vpt_agent.tokens.grid import Cells, RegionPolicy, box_to_region, region_to_box
from vpt_agent.tokens.table import IMAGE_TAG, PUBLISHED, PerceptionKind, PerceptionTable

DIRECT = "direct"
"""The kind of row without a call."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What rows are made, and how many.

    ``shares`` maps kinds of ``table``, and ``direct`` for rows without a call, to their shares (any
    numbers; they need not sum to 1). The table's grids and number of control tokens decide how
    calls are spelled. ``trigger`` is the share of rows with a call whose question carries the
    trigger phrase: 1 for a model that calls when told to, 0 for free choice. ``instruction`` (a
    format instruction) is a line of its own between question and phrase. ``regions`` says how cells
    become pixels, as the model will look at them. ``merge`` makes one region of all boxes; else
    each box is one, and annotations with more than ``max_regions`` become no region rows.
    ``rows`` is how many are made (default: as many as the shares allow, each annotation once).
    """

    shares: Mapping[str, float]
    table: PerceptionTable = ALL_KINDS
    trigger: float = 1.0
    instruction: str = ""
    regions: RegionPolicy = "published"
    merge: bool = False
    max_regions: int = 4
    rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, share in self.shares.items():
            if name != DIRECT and self.table[name].result == "inline":
                raise UserError(
                    "results inside an assistant's turn cannot stand in rows",
                    where=f"shares, {name}",
                    expected="a kind whose result is a turn",
                )
            if not isinstance(share, int | float) or not math.isfinite(share) or share < 0:
                raise UserError(
                    "a share is a number, 0 or more", where=f"shares, {name}", got=repr(share)
                )
        if not sum(self.shares.values()) > 0:
            raise UserError(
                "the shares sum to nothing",
                got=dict(self.shares),
                expected=f"shares of {', '.join(k.name for k in self.table.kinds)}, {DIRECT}",
            )
        if not 0 <= self.trigger <= 1:
            raise UserError("trigger is a share", got=self.trigger, expected="0 to 1")
        if self.max_regions < 1:
            raise UserError("a region row has a region", where="max_regions", got=self.max_regions)
        if self.rows is not None and self.rows < 1:
            raise UserError("at least one row is made", where="rows", got=self.rows)


@dataclass(frozen=True)
class Built:
    """Rows and how they came about: ``report`` counts annotations and their faults, ``kinds`` and
    ``triggers`` the rows of each kind and those among them with the phrase, ``unused`` the good
    annotations that the shares left over."""

    rows: tuple[Row, ...]
    report: CheckReport
    kinds: Counter[str] = field(default_factory=Counter)
    triggers: Counter[str] = field(default_factory=Counter)
    unused: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All but the rows, for JSON."""
        return {"rows": len(self.rows), "kinds": dict(self.kinds), "triggers": dict(self.triggers),
                "unused": self.unused, "annotations": self.report.to_dict()}  # fmt: skip


def build_rows(
    annotations: Iterable[Annotation | RowError],
    recipe: Recipe,
    *,
    on_error: Literal["raise", "skip"] = "raise",
) -> Built:
    """Rows of ``annotations`` by ``recipe``: each annotation becomes one row at most.

    Region rows are made of annotations with boxes, and rows of kinds that give text of those with a
    ``result``. The same annotations, recipe and seed give the same rows in the same order. A bad
    annotation is raised, or left out and counted. Shares that the annotations cannot fill are a
    :class:`UserError` if ``recipe.rows`` asks for more rows than there can be.
    """
    report = CheckReport("annotations")
    good: list[Annotation] = []
    for item in annotations:
        try:
            found = _usable(item)
        except RowError as error:
            report.add(error)
            if on_error == "raise":
                raise
            continue
        report.add()
        good.append(found)
    report.pictures = len({a.image for a in good})
    chance = random.Random(recipe.seed)
    chance.shuffle(good)
    wanted = [name for name, share in recipe.shares.items() if share > 0]
    fits = [frozenset(k for k in wanted if _fits(a, k, recipe)) for a in good]
    dealt = deal(fits, {k: recipe.shares[k] for k in wanted}, recipe.rows)
    kinds = Counter(kind for kind in dealt if kind is not None)
    left = {k: round(recipe.trigger * n) for k, n in kinds.items() if _phrase(recipe.table, k)}
    triggers = Counter({k: n for k, n in left.items() if n})
    rows: list[Row] = []
    for annotation, kind in zip(good, dealt, strict=True):
        if kind is None:
            continue
        trigger = left.get(kind, 0) > 0
        left[kind] = left.get(kind, 0) - 1
        rows.append(make_row(annotation, kind, recipe, trigger=trigger))
    chance.shuffle(rows)
    return Built(tuple(rows), report, kinds, triggers, len(good) - len(rows))


def make_row(annotation: Annotation, kind: str, recipe: Recipe, *, trigger: bool = False) -> Row:
    """The row of ``kind`` (of the recipe's table, or ``direct``) that ``annotation`` becomes.

    ``trigger`` appends the kind's trigger phrase to the question. An annotation that lacks what the
    kind needs (boxes, an argument, a result) is a :class:`RowError`.
    """
    lines = [IMAGE_TAG, annotation.question, *([recipe.instruction] if recipe.instruction else [])]
    known = {"id": annotation.id, "type": annotation.type}
    meta: dict[str, Any] = {k: v for k, v in known.items() if v}
    meta |= {"kind": kind, "tools": [], "answer": annotation.answer}
    picture = ImageRef(annotation.image)
    if kind == DIRECT:
        messages = [_user("\n".join(lines)), Message("assistant", annotation.answer)]
        return Row(tuple(messages), {IMAGE_TAG: (picture,)}, annotation.where, meta)
    row = recipe.table[kind]
    if trigger and row.trigger:
        lines.append(row.trigger)
    meta |= {"tools": [kind], "trigger": trigger}
    pictures: dict[str, tuple[ImageRef, ...]] = {IMAGE_TAG: (picture,)}
    if row.payload == "grid":
        cells = region_cells(annotation, row.grid, recipe)
        call = "".join(row.call_text(region=c) for c in cells)
        meta |= {"regions": [list(c) for c in cells], "grid": row.grid}
    else:
        argument = _argument(annotation, row)
        call = row.call_text(text=argument, controls=recipe.table.controls)
    if _gives_text(annotation, row):
        said = _needed(annotation, annotation.result, "result", row)
    elif row.payload == "grid":
        size = annotation.picture_size()
        boxes = [region_to_box(c, size, row.grid, recipe.regions) for c in cells]
        pictures[row.tag] = (picture, *(ImageRef(annotation.image, _whole(b)) for b in boxes))
        said = row.tag if len(boxes) == 1 else ""
        said = said or "".join(f"Region {i}: {row.tag}\n" for i in range(len(boxes)))
    else:
        pictures[row.tag] = (*pictures.get(row.tag, ()), picture)
        said = row.tag
    messages = [
        _user("\n".join(lines)),
        Message("assistant", call),
        _user(said),
        Message("assistant", row.answer_prefix + annotation.answer),
    ]
    return Row(tuple(messages), pictures, annotation.where, meta)


def region_cells(annotation: Annotation, grid: int, recipe: Recipe) -> tuple[Cells, ...]:
    """The regions of a ``grid`` that hold the annotation's boxes, each once, in their order."""
    if not annotation.boxes:
        raise RowError("not_a_row", "a region row needs a box", where=annotation.where)
    size = annotation.picture_size()
    found = [box_to_region(box, size, grid) for box in annotation.boxes]
    if recipe.merge:
        xs, ys, x_ends, y_ends = zip(*found, strict=True)
        found = [Cells(min(xs), min(ys), max(x_ends), max(y_ends))]
    return tuple(dict.fromkeys(found))


def _usable(item: Annotation | RowError) -> Annotation:
    if isinstance(item, RowError):
        raise item
    tags = [k.tag for k in PUBLISHED.values() if k.tag in f"{item.question}\n{item.answer}"]
    if tags:
        raise RowError(
            "not_a_row",
            "a question or answer spells the tag of a picture",
            where=item.where,
            got=", ".join(dict.fromkeys(tags)),
            fix="write it otherwise: the picture is put before the question",
        )
    if not Path(item.image).is_file():
        raise RowError(
            "missing_pictures", "there is no such file", where=f"{item.where}, {item.image}"
        )
    size = item.picture_size()
    boxes = tuple(read_box(box, "xyxy", size, item.where) for box in item.boxes)
    return replace(item, boxes=boxes, size=size)


def _fits(annotation: Annotation, kind: str, recipe: Recipe) -> bool:
    if annotation.kinds and kind not in annotation.kinds:
        return False
    if kind == DIRECT:
        return True
    row = recipe.table[kind]
    if _gives_text(annotation, row) and annotation.result is None:
        return False
    if row.payload == "text":
        return annotation.argument is not None
    if row.payload == "grid":
        return bool(annotation.boxes) and (
            recipe.merge or len(region_cells(annotation, row.grid, recipe)) <= recipe.max_regions
        )
    return True


def _gives_text(annotation: Annotation, row: PerceptionKind) -> bool:
    """Kinds without an encoder do; of one's own kinds, those for which a result is written."""
    return row.encoder == "none" or (annotation.result is not None and row.name not in PUBLISHED)


def _argument(annotation: Annotation, row: PerceptionKind) -> str | None:
    if row.payload != "text":
        return None
    return _needed(annotation, annotation.argument, "argument", row)


def _needed(annotation: Annotation, value: str | None, name: str, row: PerceptionKind) -> str:
    if value is None:
        raise RowError(
            "not_a_row", f"a row of the kind {row.name} needs the {name}", where=annotation.where
        )
    return value


def _phrase(table: PerceptionTable, kind: str) -> str:
    return "" if kind == DIRECT else table[kind].trigger


def _whole(box: Sequence[float]) -> tuple[int, int, int, int]:
    left, top, right, bottom = (int(n) for n in box)
    return left, top, right, bottom


def _user(text: str) -> Message:
    return Message("user", text)
