"""The command draws scenes when the folder has been checked, once, and the others wait."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.training import world
from vpt_agent.cli import app
from vpt_agent.cli import train as command
from vpt_agent.errors import UserError
from vpt_agent.training.config import Scenes, Source
from vpt_agent.training.folder import CONFIG

SOURCE = Source(scenes=Scenes(count=2, seed=3))


def test_nothing_is_drawn_for_a_run_that_cannot_be(tmp_path: Path) -> None:
    scenes = [{"scenes": {"count": 2, "seed": 3}}]
    settings = world.config(tmp_path, data={"sources": scenes, "hold_out": 0})
    (tmp_path / "c.yaml").write_text(settings.to_yaml())
    run = CliRunner().invoke(app, ["train", str(tmp_path / "c.yaml"), "--resume"])
    assert run.exit_code == 2
    assert "nothing to resume" in run.stderr
    (tmp_path / "out" / "final").mkdir(parents=True)
    run = CliRunner().invoke(app, ["train", str(tmp_path / "c.yaml")])
    assert run.exit_code == 2
    assert "never overwritten" in run.stderr
    assert not (tmp_path / "out-scenes").exists()
    reinforce = tmp_path / "r.yaml"
    reinforce.write_text(
        f"out: {tmp_path / 'out'}\nsteps: 1\nsources: [{{scenes: {{count: 2}}}}]\n"
    )
    run = CliRunner().invoke(app, ["reinforce", str(reinforce)])
    assert "never overwritten" in run.stderr
    assert not (tmp_path / "out-scenes").exists()


def test_the_config_of_a_run_keeps_its_scenes(tmp_path: Path) -> None:
    scenes = [{"scenes": {"count": 4, "seed": 3}}]
    data = {"sources": scenes, "hold_out": 1}
    settings = world.config(tmp_path, steps=1, model={"path": "shipped"}, data=data)
    (tmp_path / "c.yaml").write_text(settings.to_yaml())
    run = CliRunner().invoke(app, ["train", str(tmp_path / "c.yaml"), "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["steps"] == 1
    assert "count: 4" in (tmp_path / "out" / CONFIG).read_text()
    assert len(list((tmp_path / "out-scenes").rglob("*.png"))) == 4


def test_scenes_are_drawn_again_where_pictures_are_gone(tmp_path: Path) -> None:
    drawn = command.drawing(tmp_path / "run")(SOURCE)
    assert drawn.path is not None
    picture = drawn.path.parent / "scene3.png"
    before = picture.stat().st_mtime_ns
    command.drawing(tmp_path / "run")(SOURCE)
    assert picture.stat().st_mtime_ns == before
    picture.unlink()
    command.drawing(tmp_path / "run")(SOURCE)
    assert picture.is_file()
    assert [p.name for p in drawn.path.parent.parent.iterdir()] == ["train-3-2"]
    other = Source(path=Path("rows.json"))
    assert command.drawing(tmp_path / "run")(other) is other


def test_other_processes_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = command.drawing(tmp_path / "ready")(SOURCE).path
    assert ready is not None
    monkeypatch.setenv("LOCAL_RANK", "1")
    folder = tmp_path / "run-scenes" / "train-3-2"
    later = threading.Timer(0.5, shutil.copytree, (ready.parent, folder))
    later.start()
    assert command.drawing(tmp_path / "run")(SOURCE).path == folder / "rows.json"
    later.join()
    monkeypatch.setattr(command, "DRAWING_SECONDS", 0.1)
    with pytest.raises(UserError, match=r"scenes that another process draws did not come"):
        command.drawing(tmp_path / "none")(SOURCE)


def test_scenes_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run-scenes").write_text("a file")
    with pytest.raises(UserError, match=r"scenes cannot be written"):
        command.drawing(tmp_path / "run")(SOURCE)
