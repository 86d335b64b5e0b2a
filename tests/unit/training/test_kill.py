"""Runs that are killed for good (SIGKILL), at every place where it could hurt, and taken up."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.training import world
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.training import TrainConfig, Trained, train
from vpt_agent.training import run as run_module
from vpt_agent.training.logs import METRICS, read_metrics
from vpt_agent.training.trainer import VPTTrainer

STEPS: dict[str, Any] = {"steps": 4, "save_every": 2, "keep": 1, "answers": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    world.save_model(folder / "model", encoders=("clip",))
    world.save_rows(folder / "rows", 12)
    rows = json.loads((folder / "rows" / "rows.json").read_text())
    kept = [r for r in rows if not {"detection_images", "seg_images"} & set(r)]
    (folder / "rows" / "rows.json").write_text(json.dumps(kept))
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Trained:
    return train(config(place, "whole"))


def config(place: Path, name: str, **changes: Any) -> TrainConfig:
    data = {"hold_out": 2}
    return world.config(place, out=str(place / name), data=data, **(STEPS | changes))


def killed(settings: TrainConfig, prepare: Callable[[], None], *, resume: bool = False) -> None:
    """Train in another process, which kills itself where ``prepare`` says."""

    def child() -> None:
        torch.set_num_threads(1)
        prepare()
        train(settings, resume=resume)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def kill_in(owner: Any, name: str, *, when: Callable[..., bool] = lambda *_: True) -> None:
    old = getattr(owner, name)

    def dead(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return old(*args, **kwargs)

    setattr(owner, name, dead)


def writing_final(processor: Any, folder: Path, *_: Any) -> bool:
    return Path(folder).name == "final.draft"


PLACES: dict[str, Callable[[], None]] = {
    "first checkpoint": lambda: kill_in(VPTTrainer, "save_data_state"),
    "second checkpoint": lambda: kill_in(
        VPTTrainer, "save_data_state", when=lambda trainer, _: trainer.state.global_step == 4
    ),
    "last checkpoint written": lambda: kill_in(run_module, "_finish"),
    "final": lambda: kill_in(VPTProcessor, "save_pretrained", when=writing_final),
    "evaluation": lambda: kill_in(VPTTrainer, "evaluate"),
    "answers": lambda: kill_in(run_module, "answer_rows"),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", PLACES)
def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    place: Path, whole: Trained, where: str
) -> None:
    settings = config(place, where.replace(" ", "-"))
    killed(settings, PLACES[where])
    done = train(settings, resume=True)
    assert done.metrics == pytest.approx(whole.metrics, abs=1e-6)
    assert read_metrics(settings.out / METRICS)[:4] == read_metrics(place / "whole" / METRICS)[:4]
    assert (done.loss, done.padding, done.rows) == (whole.loss, whole.padding, whole.rows)
    assert done.answers == whole.answers
    assert json.loads((settings.out / "answers.json").read_text()) == list(whole.answers)
    same_weights(done.checkpoint, whole.checkpoint)
    assert {path.name for path in settings.out.glob("checkpoint-*")} == {"checkpoint-4"}
    with pytest.raises(UserError, match=r"a finished checkpoint is never overwritten"):
        train(settings, resume=True)


def test_killed_in_its_first_checkpoint_a_run_can_be_begun_anew(
    place: Path, whole: Trained
) -> None:
    settings = config(place, "anew", answers=0)
    killed(settings, PLACES["first checkpoint"])
    assert (settings.out / "checkpoint-2" / "trainer_state.json").is_file()
    (settings.out / "final.draft").mkdir()
    (settings.out / "final.draft" / "half").touch()
    done = train(settings)
    same_weights(done.checkpoint, whole.checkpoint)
    assert not (done.checkpoint / "half").exists()


def same_weights(one: Path, other: Path) -> None:
    a, b = (VPTForConditionalGeneration.from_pretrained(p).state_dict() for p in (one, other))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_the_command_is_killed_at_any_time(place: Path, whole: Trained) -> None:
    """From outside, by the clock of the file system: whatever it was doing."""
    settings = config(place, "command", answers=0)
    file = place / "command.yaml"
    file.write_text(settings.to_yaml())
    code = "import sys; from vpt_agent.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", str(file)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if (settings.out / "checkpoint-2").is_dir():
            process.kill()
        time.sleep(0.01)
    assert process.wait() == -signal.SIGKILL
    assert not (settings.out / "final").exists()
    subprocess.run([*command, "--resume"], check=True, stderr=subprocess.DEVNULL)
    losses = [[r["loss"] for r in read_metrics(place / n / METRICS) if "loss" in r]
              for n in ("command", "whole")]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
