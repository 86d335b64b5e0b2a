"""``vpt-agent nano scene`` draws the same scene again and says what is on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from vpt_agent import PerceptionAgent
from vpt_agent.cli import app
from vpt_agent.cli import ask as ask_module
from vpt_agent.tool import ToolRegistry


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


@pytest.fixture
def knows_one_answer(monkeypatch: pytest.MonkeyPatch) -> str:
    """An agent that answers every question with what is right for the first scene only."""
    from vpt_agent.nano.agent_eval import FIRST_SEED
    from vpt_agent.nano.scene import make_scene

    right = make_scene(FIRST_SEED).questions[0].answer
    agent = PerceptionAgent.from_script([right], tools=ToolRegistry(), encoders=())
    monkeypatch.setattr(ask_module, "load_agent", lambda *_, **__: agent)
    return right


def test_eval_counts_right_answers(knows_one_answer: str) -> None:
    words = ["nano", "eval", "--scenes", "2", "--batch", "1"]
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert told["scenes"] == 2
    assert told["exact_match"] == 0.5
    assert told["looked"] == 0
    lines = CliRunner().invoke(app, words).stdout.splitlines()
    assert "exact match: 0.5" in lines


def test_eval_checks_the_split_before_it_loads(knows_one_answer: str) -> None:
    result = CliRunner().invoke(app, ["nano", "eval", "--split", "test"])
    assert result.exit_code == 2
    assert "error: unknown split" in result.stderr
