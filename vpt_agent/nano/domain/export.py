"""Questions about drawn scenes as files: pictures, rows to train on, items to evaluate with."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vpt_agent.data.builder import DIRECT, Annotation, Recipe, make_row, write_json, write_rows
from vpt_agent.data.rows import Row
from vpt_agent.errors import UserError
from vpt_agent.evaluation.items import Item
from vpt_agent.nano.alphabet import Split
from vpt_agent.nano.domain.ask import Asked, QuestionType, ask, types_of
from vpt_agent.nano.domain.scene import DomainScene, make_domain_scene
from vpt_agent.nano.domain.sight import AGAIN
from vpt_agent.nano.domain.table import TABLE
from vpt_agent.nano.views import GRID, SLACK, asked_cells, crop_box
from vpt_agent.types import Box

ROWS, ITEMS = "rows.json", "items.jsonl"
Weights = Mapping[str, float]


@dataclass(frozen=True)
class Written:
    """What :func:`write_domain` wrote; ``answers`` counts answers by type of question."""

    rows: Path
    items: Path
    scenes: int
    answers: Mapping[str, Counter[str]]

    def baselines(self) -> dict[str, float]:
        """By type, the share of items that its most frequent answer would get right."""
        return {
            name: max(found.values()) / sum(found.values()) for name, found in self.answers.items()
        }


def parse_types(text: str) -> dict[str, float]:
    """``region,none=2,count_marks`` as weights of types; a group's weight goes to each of its."""
    weights: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, number = part.partition("=")
        try:
            weight = float(number or 1)
        except ValueError:
            weight = -1.0
        if not 0 < weight < float("inf"):
            raise UserError(
                "a type's weight is a number above 0", got=part, expected="region,none=2"
            )
        weights |= {t.name: weight for t in types_of([name.strip()])}
    if not weights:
        raise UserError("no type of question is named", got=repr(text), expected="region,none=2")
    return weights


def questions(
    count: int, weights: Weights, *, seed: int = 0, split: Split = "train", per_scene: int = 1
) -> Iterator[tuple[DomainScene, Asked]]:
    """``count`` questions, types by ``weights``, about the scenes ``seed``, ``seed`` + 1, ...

    At most ``per_scene`` about each. The share of each type is exact to one question: what a scene
    cannot be asked is asked of a later one.
    """
    waiting = _schedule(count, weights, random.Random(f"types-{split}-{seed}"))
    for number in itertools.count(seed):
        if not waiting:
            return
        scene = make_domain_scene(number, split=split)
        taken: list[int] = []
        for place, kind in enumerate(waiting):
            if len(taken) == per_scene:
                break
            asked = ask(scene, kind, seed=len(taken))
            if asked is not None:
                taken.append(place)
                yield scene, asked
        waiting = [kind for place, kind in enumerate(waiting) if place not in taken]


def _schedule(count: int, weights: Weights, rng: random.Random) -> list[QuestionType]:
    total = sum(weights.values())
    exact = {name: count * weight / total for name, weight in weights.items()}
    numbers = {name: int(value) for name, value in exact.items()}
    rest = sorted(exact, key=lambda name: numbers[name] - exact[name])
    for name in rest[: count - sum(numbers.values())]:
        numbers[name] += 1
    kinds = types_of(weights)
    schedule = [kind for kind in kinds for _ in range(numbers[kind.name])]
    rng.shuffle(schedule)
    return schedule


def shown_boxes(asked: Asked, size: tuple[int, int]) -> tuple[Box, ...]:
    """What looks at the question's boxes show in a picture of ``size``: whole cells."""
    return tuple(Box(*crop_box(asked_cells(b, *size), *size)) for b in asked.boxes)


def item_json(scene: DomainScene, asked: Asked, *, id: str, picture: str) -> dict[str, Any]:
    """One line of the items file; boxes in pixels of the picture."""
    looks = asked.type.group in ("region", "two_looks", "either")
    return {
        "id": id,
        "picture": picture,
        "question": asked.question,
        "answer": asked.answer,
        "type": asked.type.name,
        "group": asked.type.group,
        "needs": [list(kinds) for kinds in asked.type.needs],
        "boxes": [list(box) for box in asked.boxes],
        "crops": [list(box) for box in shown_boxes(asked, scene.size)] if looks else [],
        "size": list(scene.size),
        "seed": scene.seed,
        "split": scene.split,
    }


def read_items(path: Path | str) -> list[Item]:
    """The items of a file that :func:`write_domain` wrote, for :mod:`vpt_agent.evaluation`.

    Pictures are opened when they are asked for. A file or line that is none is a
    :class:`UserError`.
    """
    path = Path(path)
    items = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError("the items cannot be read", where=path, got=error.strerror) from error
    for number, line in enumerate(lines, start=1):
        try:
            data = json.loads(line)
            items.append(_item(data, path.parent))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "a line is no item", where=f"{path}, line {number}", got=repr(error)
            ) from error
    return items


def _item(data: Mapping[str, Any], folder: Path) -> Item:
    name = folder / data["picture"]

    def picture() -> Image.Image:
        with Image.open(name) as image:
            return image.convert("RGB")

    return Item(
        id=data["id"],
        question=data["question"],
        answer=data["answer"],
        picture=picture,
        type=data["type"],
        needs=tuple(tuple(kinds) for kinds in data["needs"]),
        boxes=tuple(Box(*box) for box in data["boxes"]),
        crops=tuple(Box(*box) for box in data["crops"]),
        meta={key: data[key] for key in ("group", "size", "seed", "split")},
    )


def kinds_for(kind: QuestionType, reencode: Sequence[str]) -> list[str]:
    """Kinds of rows that a question can become: ``direct``, ``region``, or of ``reencode``."""
    if not kind.needs:
        return [DIRECT]
    return [k for k in kind.needs[0] if k == "region" or k in reencode]


def row_of(
    scene: DomainScene, asked: Asked, kind: str, *, id: str, picture: Path, trigger: bool
) -> Row:
    """The row that answers a question with a kind's calls, in the published layout.

    Regions hold the boxes with the room that the model is to leave around them. ``meta`` tells the
    type, the needed kinds and the true boxes (pixels).
    """
    width, height = scene.size
    room_x, room_y = SLACK * width / GRID, SLACK * height / GRID
    wider = tuple(
        Box(
            max(0, left - room_x),
            max(0, top - room_y),
            min(width, right + room_x),
            min(height, bottom + room_y),
        )
        for left, top, right, bottom in asked.boxes
    )
    made = make_row(
        Annotation(
            str(picture),
            asked.question,
            asked.answer,
            wider if kind == "region" else (),
            id=id,
            type=asked.type.name,
            size=scene.size,
            where=id,
        ),
        kind,
        Recipe(shares={kind: 1.0}, table=TABLE, regions="cover", max_regions=2),
        trigger=trigger,
    )
    more = {"needs": [list(k) for k in asked.type.needs], "boxes": [list(b) for b in asked.boxes]}
    return replace(made, meta={**made.meta, **more})


def write_domain(
    folder: Path,
    *,
    count: int,
    weights: Weights,
    seed: int = 0,
    split: Split = "train",
    per_scene: int = 1,
    reencode: Sequence[str] = tuple(AGAIN),
    trigger: float = 0.5,
) -> Written:
    """Draw scenes into ``folder``: ``count`` questions as ``rows.json`` and ``items.jsonl``.

    Questions that can be answered in several ways become rows of each way in turn. ``trigger`` is
    the share of rows with a call whose question carries the trigger phrase. The same arguments give
    the same files; files of rows or items that are there are never overwritten.
    """
    unknown = sorted(set(reencode) - set(AGAIN))
    if unknown or not reencode:
        raise UserError("unknown encoder", got=unknown or "none", expected=", ".join(AGAIN))
    if per_scene < 1 or not 0 <= trigger <= 1:
        raise UserError(
            "a scene has a question or more, and trigger is a share",
            got=f"per_scene {per_scene}, trigger {trigger}",
        )
    rows_path, items_path = folder / ROWS, folder / ITEMS
    for path in (rows_path, items_path):
        if path.exists():
            raise UserError(
                "a file is never written over another one", where=path, fix="name another folder"
            )
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"rows-{split}-{seed}")
    turns: dict[str, itertools.cycle[str]] = {}
    rows: list[Row] = []
    items: list[dict[str, Any]] = []
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    drawn: set[int] = set()
    for scene, asked in questions(count, weights, seed=seed, split=split, per_scene=per_scene):
        name = f"pictures/{split}{scene.seed}.png"
        if scene.seed not in drawn:
            scene.image.save(folder / name)
            drawn.add(scene.seed)
        id = f"{split}{scene.seed}-{asked.type.name}-{len(items)}"
        cycle = itertools.cycle(kinds_for(asked.type, reencode))
        kind = next(turns.setdefault(asked.type.group, cycle))
        phrase = rng.random() < trigger
        rows.append(row_of(scene, asked, kind, id=id, picture=folder / name, trigger=phrase))
        items.append(item_json(scene, asked, id=id, picture=name))
        answers[asked.type.name][asked.answer] += 1
    write_json(items, items_path)
    write_rows(rows, rows_path)
    return Written(rows_path, items_path, len(drawn), dict(answers))


def baseline_lines(written: Written) -> Iterable[str]:
    """By type: how many questions, how many answers, and what always saying the first gives."""
    for name, share in sorted(written.baselines().items()):
        found = written.answers[name]
        (most, _), *_ = found.most_common(1)
        yield (
            f"{name}: {sum(found.values())} questions, {len(found)} answers, "
            f"majority ({most}) {share:.3f}"
        )
