"""docs/performance.md shows what the commands wrote: its table is made of the kept files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.contract.sources import ROOT
from vpt_agent.bench.report import report
from vpt_agent.cli import app
from vpt_agent.errors import UserError

RESULTS = ROOT / "benchmarks" / "results"


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = report(RESULTS)
    assert table in page, "put the output of 'vpt-agent bench report' into docs/performance.md"
    result = CliRunner().invoke(app, ["bench", "report", str(RESULTS)])
    assert result.stdout.strip() == table


def test_every_answer_that_was_kept_said_what_the_baseline_said() -> None:
    files = sorted(RESULTS.glob("answer_*.json"))
    assert files
    for file in files:
        figures = json.loads(file.read_text(encoding="utf-8"))
        if figures["dtype"] == figures["baseline_dtype"] == "float32":
            assert figures["tokens_equal"], file.name


def test_a_folder_without_figures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no figures of measurements lie there"):
        report(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="a file of figures is no JSON"):
        report(tmp_path)
