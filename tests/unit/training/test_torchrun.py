"""Two processes under torchrun (CPU, gloo): the same steps as one process that accumulates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training import world
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.training import TrainConfig, train
from vpt_agent.training.logs import METRICS, read_metrics

CODE = "import sys; from vpt_agent.cli import main; sys.exit(main())"
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


def two(settings: TrainConfig, *options: str) -> None:
    file = settings.out.with_suffix(".yaml")
    file.write_text(settings.to_yaml())
    command = [sys.executable, *LAUNCH, sys.executable, "-c", CODE, "train", str(file), *options]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint: ") == 1  # one process speaks


def one_row_a_batch(tmp_path: Path, name: str, **changes: Any) -> TrainConfig:
    """Rows in turn: two processes take what one takes in two batches."""
    data = {"rows": 1, "window": 1, "shuffle": 1}
    return world.config(tmp_path, out=str(tmp_path / name), data=data, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["instruction", "alignment"])
def test_two_processes_are_one_that_accumulates(tmp_path: Path, stage: str) -> None:
    """In the alignment stage some batches reach no projector: their process must not wait."""
    world.save_model(tmp_path / "model")
    world.save_rows(tmp_path / "rows", 16)
    shared = {"stage": stage, "steps": 3, "save_every": 3, "evaluate_every": 2}
    optim = {"learning_rate": 1e-3, "accumulate": 2}
    alone = train(one_row_a_batch(tmp_path, "one", optim=optim, **shared))
    pair = one_row_a_batch(tmp_path, "two", **shared)
    two(pair)
    rows = [read_metrics(tmp_path / name / METRICS) for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 5
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        assert b == pytest.approx(a, abs=2e-5)
    assert {p.name for p in (pair.out / "checkpoint-3").glob("data_state-*")} == {
        "data_state-0.json", "data_state-1.json"}  # fmt: skip
    a, b = (
        VPTForConditionalGeneration.from_pretrained(path).state_dict()
        for path in (alone.checkpoint, pair.out / "final")
    )
    # AdamW's first steps are as long as the rate, however small a gradient is.
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-3
