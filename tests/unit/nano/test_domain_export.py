"""Questions written as rows and items: what the library reads back is what was asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vpt_agent.cli.app import app
from vpt_agent.data import read_row, row_views
from vpt_agent.data.check import call_problems
from vpt_agent.errors import UserError
from vpt_agent.nano.domain import TYPES, make_domain_scene
from vpt_agent.nano.domain.export import (
    Written,
    baseline_lines,
    kinds_for,
    parse_types,
    questions,
    read_items,
    row_of,
    shown_boxes,
    write_domain,
)
from vpt_agent.nano.domain.table import TABLE
from vpt_agent.nano.views import asked_cells
from vpt_agent.tokens.table import IMAGE_TAG

WEIGHTS = parse_types("region,two_looks,none,reencode,either")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Two questions of every type and one more, about few scenes."""
    folder = tmp_path_factory.mktemp("domain") / "new"
    return write_domain(folder, count=23, weights=WEIGHTS, seed=50, per_scene=6)


def test_rows_are_published_json(written: Written) -> None:
    """Every row reads strictly, its pictures open, and its calls and results agree."""
    data = json.loads(written.rows.read_text())
    kinds: Counter[str] = Counter()
    for number, value in enumerate(data):
        row = read_row(value, where=f"row {number}")
        views = row_views(row, folder=written.rows.parent)
        assert not list(call_problems(row, TABLE))
        kinds[row.meta["kind"]] += 1
        first = row.messages[0].content
        assert first.startswith(f"{IMAGE_TAG}\n")
        kind = row.meta["kind"]
        if kind == "direct":
            assert len(row.messages) == 2
            assert row.meta["needs"] == []
            continue
        assert first.endswith(TABLE[kind].trigger) == row.meta["trigger"]
        assert kind in row.meta["needs"][0]
        if kind == "region":
            size = views[IMAGE_TAG][0].size
            crops = [view.box for view in views[IMAGE_TAG][1:]]
            assert len(crops) == len(row.meta["needs"])
            for box, crop in zip(row.meta["boxes"], crops, strict=True):
                assert crop.left <= box[0]
                assert box[2] <= crop.right
                assert crop.top <= box[1]
                assert box[3] <= crop.bottom
            assert [list(asked_cells(tuple(b), *size)) for b in row.meta["boxes"]] == (
                row.meta["regions"]
            )
    assert set(kinds) == {"direct", "region", "clip", "dino", "sam"}


def test_items_are_the_evaluations(written: Written) -> None:
    """Items read back with picture, needs and boxes; rows and items are about the same."""
    items = read_items(written.items)
    rows = [read_row(value) for value in json.loads(written.rows.read_text())]
    assert [i.id for i in items] == [r.meta["id"] for r in rows]
    for item, row in zip(items, rows, strict=True):
        assert item.picture().size == tuple(item.meta["size"])
        assert item.needs == TYPES[item.type].needs
        assert item.question in row.messages[0].content
        assert item.answer == row.messages[-1].content
        assert item.boxes or item.type == "count_marks" or item.meta["group"] == "none"
    looked = [i for i in items if i.type in ("region", "two_looks")]
    assert all(len(i.shown) == len(i.needs or ()) for i in looked)
    assert len({i.meta["seed"] for i in items}) == written.scenes < len(items)


def test_shares_are_exact_and_the_seed_decides() -> None:
    """Types by weight, to one question; the same arguments ask the same."""
    weights = {"region": 2.0, "count_marks": 1.0, "is_there": 1.0}
    first = list(questions(9, weights, seed=3, per_scene=3))
    found = Counter(a.type.name for _, a in first)
    assert sorted(found.values()) == [2, 2, 5] or sorted(found.values()) == [2, 3, 4]
    again = list(questions(9, weights, seed=3, per_scene=3))
    assert [a for _, a in first] == [a for _, a in again]
    assert [a for _, a in questions(9, weights, seed=9, per_scene=3)] != [a for _, a in first]


def test_every_way_of_a_question_has_its_turn(written: Written) -> None:
    """Re-encoding questions become rows of each encoder; `mark_of` of regions, too."""
    assert kinds_for(TYPES["count_marks"], ("clip", "sam")) == ["clip", "sam"]
    assert kinds_for(TYPES["mark_of"], ("dino",)) == ["region", "dino"]
    assert kinds_for(TYPES["is_there"], ("dino",)) == ["direct"]
    made = [value["meta"] for value in json.loads(written.rows.read_text())]
    again = [m["kind"] for m in made if TYPES[m["type"]].group == "reencode"]
    assert again[:4] == ["clip", "dino", "sam", "clip"]


def test_regions_leave_room(tmp_path: Path) -> None:
    """A region row asks for the cells that the first version asks for."""
    scene, asked = next(questions(1, {"two_looks": 1.0}, seed=5))
    row = row_of(scene, asked, "region", id="x", picture=tmp_path / "x.png", trigger=False)
    crops = [ref.crop for ref in row.pictures[IMAGE_TAG][1:]]
    assert crops == [tuple(map(int, box)) for box in shown_boxes(asked, scene.size)]


def test_majority_is_told(written: Written) -> None:
    """By type: the number of questions and what the most frequent answer would get."""
    lines = {line.split(":")[0]: line for line in baseline_lines(written)}
    assert set(lines) == set(WEIGHTS)
    assert "majority" in lines["is_there"]
    assert written.baselines()["is_there"] <= 1


def test_wrong_arguments_and_files(written: Written, tmp_path: Path) -> None:
    """Each has one clear error, and nothing is overwritten."""
    with pytest.raises(UserError, match="a type's weight is a number above 0"):
        parse_types("region=0")
    with pytest.raises(UserError, match="no type of question is named"):
        parse_types(" , ")
    with pytest.raises(UserError, match="no such type of question"):
        parse_types("regions")
    with pytest.raises(UserError, match="never written over another one"):
        write_domain(written.rows.parent, count=1, weights={"region": 1.0})
    with pytest.raises(UserError, match="unknown encoder"):
        write_domain(tmp_path, count=1, weights={"region": 1.0}, reencode=["yolo"])
    with pytest.raises(UserError, match="a question or more"):
        write_domain(tmp_path, count=1, weights={"region": 1.0}, per_scene=0)
    with pytest.raises(UserError, match="items cannot be read"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="a line is no item"):
        read_items(tmp_path / "bad.jsonl")


def test_command(tmp_path: Path) -> None:
    """`vpt-agent nano scenes --types` writes rows, items and pictures."""
    out = tmp_path / "out"
    made = CliRunner().invoke(
        app,
        ["nano", "scenes", "--out", str(out), "--count", "3", "--types", "count_marks,is_there",
         "--split", "unseen", "--kinds", "sam", "--per-scene", "2"],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    rows = json.loads((out / "rows.json").read_text())
    assert {r["meta"]["kind"] for r in rows} == {"sam", "direct"}
    scene = make_domain_scene(0, split="unseen")
    with Image.open(out / "pictures" / "unseen0.png") as picture:
        assert picture.convert("RGB").tobytes() == scene.image.tobytes()
    assert len((out / "items.jsonl").read_text().splitlines()) == 3
