"""Scenes as items, and the page of all figures."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from vpt_agent.cli import app
from vpt_agent.errors import MissingExtraError, UserError
from vpt_agent.evaluation import (
    FREE,
    NO_TOOLS,
    Called,
    Outcome,
    State,
    control_settings,
    crop_settings,
    figures_of,
)
from vpt_agent.evaluation.runs import orders_table, verdict
from vpt_agent.evaluation.store import ResultStore
from vpt_agent.nano.aims import aims_of, aims_table
from vpt_agent.nano.domain import GROUPS, TYPES
from vpt_agent.nano.report import (
    TURNS,
    domain_item,
    domain_items,
    question_type,
    report,
    scene_items,
)
from vpt_agent.nano.scene import make_scene
from vpt_agent.tokens.table import CLIP, REGION
from vpt_agent.types import Box

SETTINGS = [NO_TOOLS, FREE, *crop_settings(REGION), *control_settings(CLIP)]


def figures() -> dict[str, Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    rows = [
        Outcome(
            f"i{n}",
            setting.name,
            type=("colour", "shape", "<b>place</b>")[n % 3],
            score=float(rng.random() < (0.1 if setting.switches or setting is NO_TOOLS else 0.8)),
            calls=() if setting is NO_TOOLS else (Called("crop_region", "region", "forced"),),
            boxes=((0.0, 0.0, 60.0, 60.0),),
            true=((10.0, 10.0, 40.0, 30.0 + 40 * (n % 2)),),
            size=(400, 300),
            needs=(("region",),) if n % 4 else (),
        )
        for setting in SETTINGS
        for n in range(24)
    ]
    states = [
        State(f"i{n}", "clip", "clip", ("a", "b")[n % 2], rng.normal(size=(1, 8)) + n % 2 * 3)
        for n in range(24)
    ]
    model = {"name": "m<", "untrained": ["dino"], "weights_sha256": None}
    return {
        "models": {s.name: model for s in SETTINGS},
        "machine": {"date": "2026-01-01T00:00", "processor": "p", "versions": {}},
        "settings": [s.to_dict() for s in SETTINGS],
        **figures_of(rows, states, [s.to_dict() for s in SETTINGS]),
    }


GROUP: dict[str, Any] = {
    "name": "Grid",
    "question": "how fine?",
    "measure": "exact match",
    "expected": ["k = 8", "k = 4"],
    "runs": [
        {
            "name": f"k = {k}",
            "seed": seed,
            "figures": {"exact match": {"value": v, "low": v - 0.03, "high": v + 0.03, "n": 500}},
        }
        for k, v in ((8, 0.8), (4, 0.6))
        for seed in (0, 1)
    ]
    + [{"name": "k = 32", "seed": 0, "missing": "no time left"}],
}


def written(folder: Path) -> list[Path]:
    perception = folder / "perception.json"
    data = {"benchmark": "perception", "untrained": ["dino"], "splits": {"train": figures()}}
    perception.write_text(json.dumps(data))
    ablations = folder / "ablations.json"
    ablations.write_text(
        json.dumps({"benchmark": "ablations", "about": "few scenes", "groups": [GROUP]})
    )
    return [perception, ablations]


def test_a_scene_as_an_item() -> None:
    items = scene_items(3, split="unseen", first=5)
    assert list(items) == ["unseen-5", "unseen-6", "unseen-7"]
    item = items["unseen-6"]()
    scene = make_scene(6, split="unseen")
    asked = scene.questions[0]
    assert (item.question, item.answer) == (asked.question, asked.answer)
    assert item.boxes == (Box(*asked.regions[0]),)
    assert item.needs == (("region",),)
    assert item.picture().tobytes() == scene.image.tobytes()
    (shown,) = item.shown
    left, top, right, bottom = asked.regions[0]
    assert shown.left <= left
    assert shown.top <= top
    assert shown.right >= right
    assert shown.bottom >= bottom
    assert shown.width < scene.size[0] / 2


def test_questions_of_the_second_domain() -> None:
    items = domain_items(12, split="train", first=6)
    made = [items[id]() for id in items]
    assert [m.id for m in made] == list(items)
    assert [m.meta["group"] for m in made] == list(TURNS) * 2
    assert set(TURNS) == set(GROUPS)
    for item in made:
        assert item.needs == TYPES[item.type].needs
        assert bool(item.crops) == any("region" in need for need in item.needs or ())
        again = items[item.id]()
        assert (again.question, again.answer) == (item.question, item.answer)
        assert again.picture().tobytes() == item.picture().tobytes()


def test_pieces_of_the_second_domain_are_parts_of_the_whole() -> None:
    whole = list(domain_items(200, first=10, per_scene=2))
    parts = [list(domain_items(100, first=n, per_scene=2)) for n in (10, 110)]
    assert [*parts[0], *parts[1]] == whole
    assert len(whole) == 400
    counted = Counter(id.split("-")[1] for id in whole)
    assert set(counted) == set(TYPES)
    reencoded = [counted[n] for n, t in TYPES.items() if t.group == "reencode"]
    assert max(reencoded) - min(reencoded) <= 1
    assert sum(reencoded) == pytest.approx(400 / 3, abs=2)


def test_two_questions_about_one_scene() -> None:
    items = domain_items(1, first=8, per_scene=6)
    made = [make() for make in items.values()]
    pictures = {m.picture().tobytes() for m in made if m.meta["group"] in ("region", "either")}
    assert len(pictures) == 1
    assert len({m.question for m in made}) == 6
    first, again = (domain_item("region", 8, again=n) for n in (0, 1))
    assert (first.question, again.id) != (again.question, first.id)


@pytest.mark.parametrize(
    ("question", "type"),
    [
        ("What does the red tag say?", "colour"),
        ("Read the arrow-shaped label.", "shape"),
        ("What is written on the pink oval sign?", "colour and shape"),
        ("Which text is on the tag at the top left?", "place"),
        ("Read the lowest sign.", "place"),
    ],
)
def test_types_of_questions(question: str, type: str) -> None:
    assert question_type(question) == type


def test_the_page_has_every_table_and_plot(tmp_path: Path) -> None:
    page = report(written(tmp_path), tmp_path / "out")
    text = page.read_text()
    for title in ("Exact match", "Differences on the same items", "Regions against true boxes",
                  "Free choice against need", "Calls made in free choice",
                  "Control states by type of question", "Grid: how fine?"):  # fmt: skip
        assert f"<h3>{title}</h3>" in text
    assert "&lt;b&gt;place&lt;/b&gt;" in text
    assert "<b>" not in text
    assert "untrained" in text
    assert "no time left" in text
    assert "k = 8 &gt; k = 4 (exact match): confirmed" in text
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert len(pictures) == 6
    for name in pictures:
        with Image.open(page.parent / name) as picture:
            assert min(picture.size) > 100
            assert len(set(picture.convert("L").tobytes())) > 10


def test_the_command_writes_it(tmp_path: Path) -> None:
    paths = [str(p) for p in written(tmp_path)]
    out = tmp_path / "page"
    result = CliRunner().invoke(app, ["nano", "report", *paths, "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert Path(result.stdout.strip()) == out / "report.html"


def test_a_folder_of_an_evaluation_is_shown(tmp_path: Path) -> None:
    told = figures()
    store = ResultStore(tmp_path / "e", {k: told[k] for k in ("models", "machine", "settings")})
    store.add([Outcome("a", "free choice", score=1.0)])
    text = report([tmp_path / "e"], tmp_path / "out").read_text()
    assert "Evaluation e" in text
    assert "1.000 [0.21, 1.00]" in text


def test_an_order_is_open_where_intervals_meet_or_runs_lack() -> None:
    assert verdict(GROUP) == "confirmed"
    assert verdict({**GROUP, "expected": ["k = 4", "k = 8"]}) == "contradicted"
    assert verdict({**GROUP, "expected": ["k = 8", "k = 32"]}) == "open: not run: k = 32"
    near = [dict(run) for run in GROUP["runs"][:4]]
    for run in near:
        run["figures"] = {"exact match": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
    assert verdict({**GROUP, "runs": near}) == "open: the intervals overlap"
    table = orders_table({"groups": [GROUP, {**GROUP, "expected": []}]})
    assert table.rows == (("Grid", "k = 8 > k = 4", "exact match", "confirmed"),)


def test_aims_are_met_missed_or_not_run() -> None:
    told = figures()
    loss = next(d for d in told["differences"] if d["setting"] == "region, random region")
    loss["needed"] = {"value": -0.4, "low": -0.5, "high": -0.3, "n": 9}
    told["choices"]["free choice"]["calls_needed"] = {"value": 0.9, "low": 0.8, "high": 0.96}
    verdicts = {aim.what: aim.verdict for aim in aims_of({"train": told})}
    assert verdicts["loss by a random region, where looking is needed"] == "met"
    assert verdicts["calls of a needed kind, free choice"] == "missed"
    assert verdicts["loss by c at zero, where dino is needed"] == "not run"
    assert verdicts["loss by c at zero, where clip is needed"] == "not run"  # nobody needs it
    assert verdicts["exact match, region questions, new scenes"] == "missed"
    (row,) = [r for r in aims_table({"train": told}).rows if "random region" in r[0]]
    assert row[1:] == ("0.30", "0.400 [0.30, 0.50]", "met")
    assert {aim.verdict for aim in aims_of({})} == {"not run"}


def test_what_is_no_result_is_told(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"benchmark": "speed"}')
    with pytest.raises(UserError, match="no results that a report can show"):
        report([other], tmp_path / "out")
    with pytest.raises(UserError, match="these results cannot be read"):
        report([tmp_path / "none.json"], tmp_path / "out")
    with pytest.raises(UserError, match="no results were given"):
        report([], tmp_path / "out")


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"vpt-agent\[plots\]"):
        report(written(tmp_path), tmp_path / "out")
