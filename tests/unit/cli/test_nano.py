"""``vpt-agent nano scene`` draws the same scene again and says what is on it."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner, Result

from vpt_agent.cli import app


def scene(*options: str) -> Result:
    return CliRunner().invoke(app, ["nano", "scene", *options])


def test_json_and_picture_agree(tmp_path: Path) -> None:
    picture = tmp_path / "scene.png"
    result = scene("--seed", "7", "--out", str(picture), "--json")
    assert result.exit_code == 0
    told = json.loads(result.stdout)
    assert tuple(told["size"]) == Image.open(picture).size
    assert len(told["questions"]) >= 1
    for row in told["questions"]:
        assert row["question"]
        assert 3 <= len(row["answer"]) <= 6
        (left, top, right, bottom) = row["regions"][0]
        assert 0 <= left < right <= told["size"][0]
        assert 0 <= top < bottom <= told["size"][1]


def test_the_same_seed_draws_the_same_scene(tmp_path: Path) -> None:
    first, again, other = (tmp_path / f"{n}.png" for n in "abc")
    scene("--seed", "3", "--out", str(first))
    scene("--seed", "3", "--out", str(again))
    scene("--seed", "3", "--split", "unseen", "--out", str(other))
    assert first.read_bytes() == again.read_bytes()
    assert first.read_bytes() != other.read_bytes()


def test_without_json_it_is_for_a_person() -> None:
    told = json.loads(scene("--seed", "3", "--json").stdout)["questions"][0]
    assert f"{told['question']}  {told['answer']}" in scene("--seed", "3").stdout.splitlines()


def test_an_unknown_split_exits_2() -> None:
    result = scene("--split", "test")
    assert result.exit_code == 2
    assert result.stderr == "error: unknown split; got: test; expected: train or unseen\n"


def test_a_folder_that_is_not_there_exits_2(tmp_path: Path) -> None:
    result = scene("--out", str(tmp_path / "no" / "scene.png"))
    assert result.exit_code == 2
    assert "error: the file cannot be written" in result.stderr
