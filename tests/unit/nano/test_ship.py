"""Writing the shipped checkpoint: what it may overwrite, and that it is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vpt_agent.errors import CheckpointError
from vpt_agent.model.testing import tiny_model
from vpt_agent.nano import ship as shipping


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_model(encoders=("clip",))
    monkeypatch.setattr(shipping, "convert", lambda trained: (model, processor.tokenizer))


@pytest.mark.usefixtures("converted")
def test_a_foreign_folder_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no place for a shipped checkpoint"):
        shipping.ship(tmp_path, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.usefixtures("converted")
def test_an_older_checkpoint_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "nano"
    first = shipping.ship(tmp_path, out, {"exact": 0.5})
    assert json.loads((out / "manifest.json").read_text()) == json.loads(json.dumps(first))
    assert [p.name for p in out.parent.iterdir()] == ["nano"]
    monkeypatch.setattr(shipping, "MOST_BYTES", 10)
    with pytest.raises(CheckpointError, match="the checkpoint is too large to ship"):
        shipping.ship(tmp_path, out, {"exact": 0.9})
    monkeypatch.setattr(shipping, "MOST_PARAMETERS", 10)
    with pytest.raises(CheckpointError, match="the model is too large to ship"):
        shipping.ship(tmp_path, out, {"exact": 0.9})
    assert json.loads((out / "manifest.json").read_text())["figures"] == {"exact": 0.5}
    monkeypatch.undo()


@pytest.mark.usefixtures("converted")
def test_it_replaces_its_own(tmp_path: Path) -> None:
    shipping.ship(tmp_path, tmp_path / "nano", {"exact": 0.5})
    (tmp_path / "nano" / "left_over.bin").touch()
    shipping.ship(tmp_path, tmp_path / "nano", {"exact": 0.9})
    assert json.loads((tmp_path / "nano" / "manifest.json").read_text())["figures"] == {
        "exact": 0.9
    }
    assert not (tmp_path / "nano" / "left_over.bin").exists()
