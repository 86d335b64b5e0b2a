"""The command: what it prints, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.training.reinforce_world import eager_model, picture
from vpt_agent.cli import app
from vpt_agent.tokens.table import IMAGE_TAG
from vpt_agent.training.reinforce import read_reinforce_config

CONFIG = Path(__file__).parents[3] / "configs" / "nano-reinforce.yaml"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    model, processor = eager_model(encoders=())
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    picture(0).save(tmp_path / "a.png")
    turns = [("user", f"{IMAGE_TAG}\nWhere is it?"), ("assistant", "left")]
    row = {"messages": [{"role": r, "content": t} for r, t in turns], "images": ["a.png"]}
    (tmp_path / "rows.json").write_text(json.dumps([row] * 2))
    path = tmp_path / "c.yaml"
    path.write_text(
        f"out: {tmp_path / 'out'}\nmodel: {tmp_path / 'model'}\nsteps: 2\nquestions: 1\ngroup: 3\n"
        f"sources: [{{path: {tmp_path / 'rows.json'}}}]\nnew_tokens: 6\ndevice: cpu\n"
        "save_every: 1\nrewards: [{use: new_tokens}]\n"
    )
    return path


def test_it_runs_prints_and_does_not_run_again(config: Path) -> None:
    done = CliRunner().invoke(app, ["reinforce", str(config), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["steps"] == 2
    assert (Path(told["checkpoint"]) / "config.json").is_file()
    assert told["last_step"]["rollouts"] == 3
    again = CliRunner().invoke(app, ["reinforce", str(config), "--resume"])
    assert again.exit_code == 2
    assert "never overwritten" in again.stderr


def test_bad_input_is_said_in_one_line(config: Path) -> None:
    wrong = CliRunner().invoke(app, ["reinforce", str(config), "--set", "stepps=3"])
    assert wrong.exit_code == 2
    assert "did you mean steps?" in wrong.stderr
    early = CliRunner().invoke(app, ["reinforce", str(config), "--resume"])
    assert early.exit_code == 2
    assert "nothing to resume" in early.stderr


def test_the_shipped_config_can_be_read() -> None:
    read = read_reinforce_config(CONFIG)
    assert read.model == "shipped"
    assert [part.use for part in read.rewards] == ["exact_match", "visual_tokens"]
    assert read.rewards[1].weight < 0
