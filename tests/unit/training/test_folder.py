"""The folder of a run: whole checkpoints, half ones, and what is not its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpt_agent.errors import UserError
from vpt_agent.training.config import TrainConfig, make_config
from vpt_agent.training.folder import CONFIG, checkpoints, drafted, open_run, prune, step_of


def whole(checkpoint: Path) -> bool:
    return (checkpoint / "mark").is_file()


def make(out: Path, name: str, *, mark: bool = True) -> Path:
    (out / name).mkdir(parents=True)
    if mark:
        (out / name / "mark").touch()
    return out / name


def config(out: Path, **changes: object) -> TrainConfig:
    data = {"sources": [{"path": "rows.json"}]}
    plain = {"out": str(out), "stage": "instruction", "steps": 1, "model": {"path": "x"}}
    return make_config(plain | {"data": data} | changes)


def begin(out: Path, *, resume: bool = False, **changes: object) -> Path | None:
    return open_run(config(out, **changes), resume=resume, whole=whole, free=("keep",))


def test_only_whole_checkpoints_of_the_run_count(tmp_path: Path) -> None:
    names = ("checkpoint-2", "checkpoint-10", "checkpoint-4-copy", "checkpoint-6.draft")
    made = [make(tmp_path, name) for name in names]
    make(tmp_path, "checkpoint-12", mark=False)
    (tmp_path / "checkpoint-14").touch()
    assert checkpoints(tmp_path, whole) == made[:2]
    assert step_of(made[1]) == 10
    assert checkpoints(tmp_path / "none", whole) == []


def test_a_run_is_begun_once_and_taken_up(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to resume: no run was begun here.*config.yaml"):
        begin(tmp_path, resume=True)
    assert begin(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    half = make(tmp_path, "checkpoint-2", mark=False)
    said: list[str] = []
    again = config(tmp_path, keep=3)
    assert open_run(again, resume=True, whole=whole, free=("keep",), say=said.append) is None
    assert said == ["no checkpoint is complete: the run begins again"]
    assert not half.exists()
    assert not (tmp_path / "metrics.jsonl").exists()
    make(tmp_path, "checkpoint-4")
    with pytest.raises(UserError, match=r"this folder holds a run that was begun.*--resume"):
        begin(tmp_path)
    with pytest.raises(UserError, match=r"config it began with.*got: seed: 7; expected: seed: 42"):
        begin(tmp_path, resume=True, seed=7)
    assert begin(tmp_path, resume=True, keep=5) == tmp_path / "checkpoint-4"
    make(tmp_path, "final")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"a finished checkpoint is never overwritten"):
            begin(tmp_path, resume=resume)


def test_the_checkpoints_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    theirs = make(tmp_path, "checkpoint-500", mark=False)
    with pytest.raises(UserError, match=r"this folder holds a run that was begun"):
        begin(tmp_path)
    assert theirs.exists()


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert begin(tmp_path / "out") is None
    assert not (tmp_path / "out").exists()


def test_old_checkpoints_go(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        make(tmp_path, f"checkpoint-{step}")
    make(tmp_path, "checkpoint-3", mark=False)
    make(tmp_path, "checkpoint-9", mark=False)  # being written
    make(tmp_path, "checkpoint-1.old")  # a kill while it was removed
    prune(tmp_path, whole, keep=None)
    assert len(list(tmp_path.iterdir())) == 7
    prune(tmp_path, whole, keep=2, spare=[tmp_path / "checkpoint-2"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-2", "checkpoint-6", "checkpoint-8", "checkpoint-9"]  # fmt: skip


def test_a_draft_becomes_the_folder_or_stays_one(tmp_path: Path) -> None:
    make(tmp_path, "final.draft")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "final")
    assert not (tmp_path / "final").exists()
    with drafted(tmp_path / "final") as draft:
        (draft / "all").touch()
    assert [p.name for p in (tmp_path / "final").iterdir()] == ["all"]
    assert not (tmp_path / CONFIG).exists()


def _interrupted(folder: Path) -> None:
    with drafted(folder) as draft:
        assert not list(draft.iterdir())
        (draft / "half").touch()
        raise KeyboardInterrupt
