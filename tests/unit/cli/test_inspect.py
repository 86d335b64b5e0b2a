"""``vpt-agent inspect`` tells what a checkpoint is, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from vpt_agent.cli import app

GOLDEN = Path(__file__).parents[2] / "parity" / "golden"


def inspect(*words: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *words])


def test_text_says_kinds_and_sizes() -> None:
    result = inspect(str(GOLDEN / "dino_tied"))
    assert result.exit_code == 0
    assert "dino: tool reencode_dino" in result.stdout
    assert "detection_projector" in result.stdout


def test_json_has_the_token_ids() -> None:
    told = json.loads(inspect(str(GOLDEN / "clip_tied"), "--json").stdout)
    kinds = {kind["name"]: kind for kind in told["kinds"]}
    assert set(kinds) == {"region", "clip"}
    assert kinds["clip"]["control"] == kinds["clip"]["start"] + 1
    assert told["parameters"] == sum(told["parts"].values())


def test_a_folder_without_a_checkpoint_exits_2(tmp_path: Path) -> None:
    result = inspect(str(tmp_path))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: there is no checkpoint here; where: ")
