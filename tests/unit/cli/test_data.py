"""``vpt-agent data``: what the commands print, write and how they end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from vpt_agent.agent import PerceptionAgent
from vpt_agent.cli import app
from vpt_agent.data import load_rows
from vpt_agent.nano.scene import make_scene

REGION = "<|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", *map(str, arguments)])


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    scene = make_scene(1, size=(672, 680))
    scene.image.save(folder / "scene.png")
    lines = [
        {"image": "scene.png", "question": q.question, "answer": q.answer, "boxes": list(q.regions)}
        for q in scene.questions
    ]
    text = "\n".join(map(json.dumps, lines))
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def rows(scenes: Path) -> Path:
    out = scenes / "rows.json"
    shares = ["--share", "region=2", "--share", "clip=1", "--share", "direct=1"]
    result = run("build", scenes / "questions.jsonl", "--out", out, *shares, "--rows", 4)
    assert result.exit_code == 0, result.output
    assert "kinds: region 2, clip 1, direct 1" in result.output
    return out


def test_built_rows_pass_the_check(rows: Path) -> None:
    result = run("check", rows, "--pictures", "pixels")
    assert result.exit_code == 0
    assert result.output == "rows.json: 4 rows, 4 good, 1 pictures seen\n"
    assert json.loads(run("check", rows, "--json", "--limit", 2).output)["rows"] == 2


def test_a_check_that_finds_something_ends_with_1(rows: Path, tmp_path: Path) -> None:
    data = json.loads(rows.read_text(encoding="utf-8"))
    (tmp_path / "rows.json").write_text(json.dumps(data), encoding="utf-8")
    result = run("check", tmp_path / "rows.json")
    assert result.exit_code == 1
    assert "missing pictures: 4" in result.output
    assert run("check", tmp_path / "rows.json", "--folder", rows.parent).exit_code == 0
    assert run("check", rows, "--grid", 4).exit_code == 1
    unused = run("check", rows, "--remap", "/old=/new")
    assert "no path begins with /old" in unused.output


def test_build_is_deterministic(scenes: Path, tmp_path: Path) -> None:
    shares = ["--share", "region=1", "--share", "sam=1", "--trigger", "0.5", "--absolute"]
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.jsonl"
        got = run(
            "build", scenes / "questions.jsonl", "--out", out, *shares, "--seed", seed, "--json"
        )
        assert json.loads(got.stdout)["kinds"].keys() == {"region", "sam"}
        files.append(out.read_bytes())
    assert files[0] == files[1] != files[2]


def test_coco_and_runs_are_built_too(scenes: Path, tmp_path: Path) -> None:
    coco = {"images": [{"id": 1, "file_name": "scene.png", "width": 672, "height": 680}],
            "annotations": [{"id": 1, "image_id": 1, "bbox": [5, 5, 50, 50]}]}  # fmt: skip
    (scenes / "coco.json").write_text(json.dumps(coco), encoding="utf-8")
    texts = scenes / "texts.jsonl"
    entry = {"image_id": 1, "question": "q", "answer": "a", "annotation_ids": [1]}
    texts.write_text(json.dumps(entry), encoding="utf-8")
    out = tmp_path / "coco_rows.json"
    got = run("build", scenes / "coco.json", "--texts", texts, "--share", "region=1", "--out", out)
    assert got.exit_code == 0, got.output
    assert load_rows(out)[0].meta["regions"] == [[0, 0, 0, 0]]
    agent = PerceptionAgent.from_script([REGION, "Ok."])
    image = Image.new("RGB", (80, 80))
    agent.run("q", image=image, trace=tmp_path / "runs" / "a")
    agent.run("q", image=image, trace=tmp_path / "runs" / "b", tool_choice="crop_region")
    events = tmp_path / "runs" / "a" / "events.jsonl"
    got = run("build", tmp_path / "runs", "--out", tmp_path / "rows.json")
    assert got.exit_code == 0, got.output
    assert "forced calls: 1" in got.output
    assert len(load_rows(tmp_path / "rows.json")) == 2
    events.write_bytes(b"".join(events.read_bytes().splitlines(keepends=True)[:-1]))
    got = run("build", tmp_path / "runs", "--out", tmp_path / "more.json")
    assert got.exit_code == 2
    assert "a run did not end" in got.output
    got = run("build", tmp_path / "runs", "--out", tmp_path / "more.json", "--skip-bad")
    assert "left out: a run did not end" in got.output
    assert len(load_rows(tmp_path / "more.json")) == 1


def test_a_dataset_is_built_with_named_columns(scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    line = {"pic": str(scenes / "scene.png"), "ask": "q", "say": "a", "at": [[0, 0, 0.5, 0.5]]}
    (folder / "train.jsonl").write_text(json.dumps(line), encoding="utf-8")
    names = {"image": "pic", "question": "ask", "answer": "say", "boxes": "at"}
    columns = [f"--column={field}={key}" for field, key in names.items()]
    out = tmp_path / "rows.json"
    got = run("build", folder, "--dataset", *columns, "--box-format", "xyxy_1",
              "--share", "region=1", "--out", out)  # fmt: skip
    assert got.exit_code == 0, got.output
    assert load_rows(out)[0].meta["regions"] == [[0, 0, 3, 3]]


def test_show_writes_pictures_and_a_page(rows: Path, tmp_path: Path) -> None:
    result = run("show", rows, "--out", tmp_path / "seen", "--row", 1, "--row", 3)
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in (tmp_path / "seen").iterdir())
    assert names == ["index.html", "row_1.png", "row_3.png"]
    assert Image.open(tmp_path / "seen" / "row_1.png").width > 500
    assert run("show", rows, "--out", tmp_path / "first", "--first", 2).exit_code == 0
    assert len(list((tmp_path / "first").glob("*.png"))) == 2


def test_stats_with_and_without_a_checkpoint(rows: Path) -> None:
    plain = json.loads(run("stats", rows, "--json").stdout)
    assert plain["kinds"] == {"region": 2, "clip": 1, "direct": 1}
    assert plain["tokens"] == {}
    text = run("stats", rows).output
    assert "kinds: region 2, clip 1, direct 1" in text
    golden = Path(__file__).parents[2] / "parity" / "golden" / "clip_tied"
    result = run("stats", rows, "--model", golden, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["outcomes"] == {"rows": 4, "shortened": 0}
    assert found["tokens"]["min"] > 20


@pytest.mark.parametrize("to", ["llamafactory-vpt", "llamafactory", "trl", "trl-prompt"])
def test_convert(rows: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / "out.json"
    result = run("convert", rows, "--to", to, "--out", out, "--reencoded", "picture")
    assert result.exit_code == 0, result.output
    written: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))
    assert len(written) == (7 if to == "trl-prompt" else 4)
    assert ('"file_name": "out.json"' in result.output) == to.startswith("llamafactory")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "none.json"], "there is no such file"),
        (["check", "ROWS", "--pictures", "all"], "unknown depth of checking"),
        (["check", "ROWS", "--remap", "x"], "this option takes OLD=NEW; where: --remap; got: x"),
        (["show", "ROWS", "--row", "99"], "there is no such row"),
        (["stats", "ROWS", "--model", "./no/such/folder"], "error:"),
        (["build", "SCENES", "--out", "OUT"], "say what rows to make"),
        (["build", "SCENES", "--out", "OUT", "--share", "region=x"], "a share is a number"),
        (["build", "SCENES", "--out", "OUT", "--share", "region=0"], "the shares sum to nothing"),
        (["build", "SCENES", "--out", "OUT", "--share", "zoom=1"], "no such perception kind"),
        (["build", "SCENES", "--out", "ROWS", "--share", "clip=1"], "never written over another"),
        (["build", "FOLDER", "--out", "OUT", "--share", "clip=1"], "no such option; got: --share"),
        (["build", "FOLDER", "--out", "OUT"], "there are no recorded runs here"),
        (
            ["build", "SCENES", "--out", "OUT", "--share", "clip=1", "--answers", "ROWS"],
            "no such option; got: --answers",
        ),
        (
            ["build", "ROWS", "--texts", "ROWS", "--out", "OUT", "--column", "image=x"],
            "no such option; got: --column",
        ),
        (["convert", "ROWS", "--to", "alpaca", "--out", "OUT"], "unknown layout"),
        (["convert", "ROWS", "--to", "trl", "--out", "OUT"], "this layout knows no encoders"),
    ],
)
def test_bad_input_ends_with_2(
    rows: Path, scenes: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    names = {"ROWS": rows, "SCENES": scenes / "questions.jsonl", "OUT": tmp_path / "out.json",
             "FOLDER": tmp_path}  # fmt: skip
    result = run(*(names.get(a, a) for a in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out.json").exists()


def test_bad_rows_can_be_left_out(rows: Path, tmp_path: Path) -> None:
    data = json.loads(rows.read_text(encoding="utf-8"))
    data[0]["depth"] = 1
    bad = rows.parent / "bad.json"
    bad.write_text(json.dumps(data), encoding="utf-8")
    assert run("stats", bad).exit_code == 2
    result = run("stats", bad, "--skip-bad")
    assert result.exit_code == 0
    assert "rows: 3" in result.output
    assert "1 of 4 rows are left out" in result.output
    assert run("stats", bad, "--ignore", "depth").exit_code == 0
