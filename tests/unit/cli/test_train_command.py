"""The commands ``train``, ``bench train`` and ``nano scenes``, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import distributed
from typer.testing import CliRunner

from tests.unit.training import world
from vpt_agent.cli import app
from vpt_agent.cli.train import _leave_group
from vpt_agent.data import read_row, row_views

CONFIGS = Path(__file__).parents[3] / "configs"
runner = CliRunner()


def test_a_dry_run_prints_sizes() -> None:
    result = runner.invoke(app, ["train", str(CONFIGS / "vpt-2b-sam.yaml"), "--dry-run"])
    assert result.exit_code == 0
    assert "seg_projector" in result.stdout
    assert "memory, about" in result.stdout
    told = runner.invoke(
        app, ["train", str(CONFIGS / "nano-smoke.yaml"), "--dry-run", "--json", "--set", "steps=3"]
    )
    assert json.loads(told.stdout)["steps"] == 3


def test_errors_are_bad_input(tmp_path: Path) -> None:
    result = runner.invoke(
        app, ["train", str(CONFIGS / "nano-smoke.yaml"), "--set", "optim.learning_rat=1"]
    )
    assert result.exit_code == 2
    assert "did you mean learning_rate?" in result.stderr
    assert runner.invoke(app, ["train", str(tmp_path / "none.yaml")]).exit_code == 2


def test_a_run_from_a_file(tmp_path: Path) -> None:
    world.save_model(tmp_path / "model")
    world.save_rows(tmp_path / "rows", 12)
    path = tmp_path / "c.yaml"
    path.write_text(world.config(tmp_path, answers=1).to_yaml())
    result = runner.invoke(app, ["train", str(path), "--json", "--set", "steps=2"])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["steps"], len(told["answers"])) == (2, 1)
    assert Path(told["checkpoint"]).is_dir()
    again = runner.invoke(app, ["train", str(path)])
    assert again.exit_code == 2
    assert "never overwritten" in again.stderr


def test_scenes_become_rows(tmp_path: Path) -> None:
    arguments = ["nano", "scenes", "--count", "2", "--seed", "7", "--out"]
    paths = []
    for name in ("a", "b"):
        result = runner.invoke(app, [*arguments, str(tmp_path / name)])
        assert result.exit_code == 0
        paths.append(Path(result.stdout.strip()))
    assert paths[0].read_text() == paths[1].read_text()
    for data in json.loads(paths[0].read_text()):
        row = read_row(data)
        views = row_views(row, folder=paths[0].parent)["<image>"]
        assert [v.parent for v in views] == [None, views[0].id]
        assert len(row.messages) == 4


@pytest.mark.slow
def test_the_smoke_run_trains_evaluates_saves_and_answers(tmp_path: Path) -> None:
    common = ["train", str(CONFIGS / "nano-smoke.yaml"), "--json"]
    whole = runner.invoke(app, [*common, "--set", f"out={tmp_path / 'whole'}"])
    assert whole.exit_code == 0, whole.stderr
    told = json.loads(whole.stdout)
    assert told["steps"] == 12
    assert told["padding"] < 0.10
    assert 0 < told["metrics"]["eval_loss"] < 3
    assert len(told["answers"]) == 4
    for name in ("final/model.safetensors", "final/config.json", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).is_file()


@pytest.mark.slow
def test_the_bench_prints_ratios(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    result = runner.invoke(
        app, ["bench", "train", "--repeats", "1", "--rows", "4", "--out", str(out)]
    )
    assert result.exit_code == 0, result.stderr
    figures = json.loads(out.read_text())
    assert figures["padding"] < 0.10
    for setting in figures["settings"]:
        assert setting["loss_apart"] < 1e-3
        assert f"ratio {setting['ratio']:.2f}" in result.stdout


def test_a_process_leaves_its_group(tmp_path: Path) -> None:
    """A group of one: nobody is waited for, and nothing is left open."""
    _leave_group()  # without one
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    _leave_group()
    assert not distributed.is_initialized()
