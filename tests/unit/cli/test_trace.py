"""``vpt-agent trace`` reads a run folder, and says what is wrong with one that is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vpt_agent.cli import app
from vpt_agent.trace import RunFinished, RunStarted, Trace, ViewInfo
from vpt_agent.types import Box, View


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    trace = Trace(folder)
    view = View("image_1", Image.new("RGB", (8, 6)), "image_1", Box(0, 0, 8, 6), (8, 6))
    info = ViewInfo.of(view, trace.add_picture(view))
    trace.emit(RunStarted(run="run_1", question="What is on the [red] tag?", views=(info,)))
    trace.emit(RunFinished(run="run_1", status="answered", text="K7Q"))
    return folder


def test_show_prints_the_run_for_a_person(run: Path) -> None:
    result = CliRunner().invoke(app, ["trace", "show", str(run)])
    assert result.exit_code == 0
    assert "What is on the [red] tag?" in result.stdout
    assert "image_1, 8 x 6 pixels" in result.stdout
    assert "K7Q" in result.stdout
    assert "\x1b[" not in result.stdout, "no colours where there is no terminal"


def test_html_writes_one_page(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "run.html"
    result = CliRunner().invoke(app, ["trace", "html", str(run), "--out", str(page)])
    assert result.exit_code == 0
    assert result.stderr == f"written: {page}\n"
    assert "K7Q" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["show", "html"])
def test_a_folder_that_is_no_run_exits_2(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["trace", command, str(tmp_path / "nothing")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: this is no run folder; where: ")


def test_a_page_that_cannot_be_written_exits_2(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "no" / "run.html"
    result = CliRunner().invoke(app, ["trace", "html", str(run), "--out", str(page)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: the file cannot be written; where: {page}")
