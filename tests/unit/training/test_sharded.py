"""Sharded weights (FSDP, two processes on a CPU with gloo): the same steps as one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.unit.model.batches import batch
from tests.unit.model.test_one_pass import step
from tests.unit.training import world
from tests.unit.training.test_torchrun import LAUNCH, one_row_a_batch
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.model.testing import tiny_model
from vpt_agent.training import TrainConfig, train
from vpt_agent.training import sharded as sharded_module
from vpt_agent.training.logs import METRICS, read_metrics
from vpt_agent.training.sharded import EqualRuns, shard_layers

ROOT = Path(__file__).parents[3]
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2}}


def save_mixed_rows(folder: Path) -> Path:
    """Rows that take one, two and three runs of the language model; those of a pair differ."""
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for number, kind in enumerate(["clip", "", "region", "dino", "sam", "2 clip", "", "dino"] * 2):
        name = world.picture(folder, number)
        if not kind:
            rows.append(world.direct_row(name))
        elif kind == "region":
            rows.append(world.region_row(name))
        else:
            rows.append(world.action_row(name, kind[-4:].strip(), calls=1 + kind.startswith("2")))
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def two(
    settings: TrainConfig, *options: str, module: str = "tests.unit.training.shard_on_cpu"
) -> str:
    file = settings.out.with_suffix(".yaml")
    file.write_text(settings.to_yaml())
    launcher = ["-m", module, "train", str(file), *options]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": "true"}
    done = subprocess.run([sys.executable, *LAUNCH, sys.executable, *launcher], env=environ,
                          timeout=300, capture_output=True, text=True, check=False,
                          cwd=ROOT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = VPTForConditionalGeneration.from_pretrained(path).state_dict()
    return state


def run_of(tmp_path: Path, name: str, passes: str, **changes: Any) -> TrainConfig:
    made = one_row_a_batch(tmp_path, name, steps=4, save_every=2, **changes)
    return made.model_copy(update={"model": made.model.model_copy(update={"passes": passes})})


def apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    return max(float((one[n] - two[n]).abs().max()) for n in one if one[n].shape == two[n].shape)


@pytest.mark.slow
@pytest.mark.parametrize(("passes", "how"), [("one", "embeddings"), ("two", "attention")])
def test_sharded_weights_take_the_same_steps(tmp_path: Path, passes: str, how: str) -> None:
    """Without momentum: a gradient of zero is then the same as none."""
    world.save_model(tmp_path / "model")
    save_mixed_rows(tmp_path / "rows")
    mask = {"paragraphs": 1, "ratio": 1.0, "how": how}
    optim = {"learning_rate": 0.05, "accumulate": 2}
    plain = run_of(tmp_path, "one", passes, optim=optim, mask=mask, trainer={"optim": "sgd"})
    alone = train(plain)
    optim = {"learning_rate": 0.05}
    pair = run_of(tmp_path, "two", passes, optim=optim, mask=mask, trainer=FSDP | {"optim": "sgd"})
    two(pair)
    rows = [read_metrics(tmp_path / name / METRICS) for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert b == pytest.approx(a, abs=2e-5)
    wanted, made = weights(alone.checkpoint), weights(pair.out / "final")
    assert wanted.keys() == made.keys()
    assert apart(wanted, made) < 1e-5
    assert apart(weights(tmp_path / "model"), made) > 1e-4


@pytest.mark.slow
def test_a_sharded_run_is_taken_up_to_the_same_losses(tmp_path: Path) -> None:
    """Untied weights, and masks that are drawn in evaluation, too."""
    world.save_model(tmp_path / "model", tied=False)
    save_mixed_rows(tmp_path / "rows")
    mask = {"paragraphs": 2, "ratio": 0.5, "draw": "row", "in_evaluation": True}
    pair = run_of(
        tmp_path,
        "two",
        "one",
        optim={"learning_rate": 1e-3},
        mask=mask,
        trainer=FSDP,
        gradient_checkpointing=True,
        evaluate_every=2,
    )
    two(pair)
    rows, made = read_metrics(pair.out / METRICS), weights(pair.out / "final")
    shutil.rmtree(pair.out / "final")
    shutil.rmtree(pair.out / "checkpoint-4")
    two(pair, "--resume")
    for a, b in zip(rows, read_metrics(pair.out / METRICS), strict=True):
        assert b == pytest.approx(a, abs=1e-6)
    assert apart(weights(pair.out / "final"), made) < 1e-6


@pytest.mark.slow
def test_a_cpu_that_shards_nothing_says_so(tmp_path: Path) -> None:
    world.save_model(tmp_path / "model")
    world.save_rows(tmp_path / "rows", 8)
    settings = one_row_a_batch(tmp_path, "two", steps=1, trainer=FSDP)
    assert "trainer.fsdp has no effect here" in two(settings, module="vpt_agent")


def test_one_process_cannot_shard(tmp_path: Path) -> None:
    world.save_model(tmp_path / "model")
    world.save_rows(tmp_path / "rows", 8)
    with pytest.raises(UserError, match=r"nobody to share weights with.*torchrun"):
        train(one_row_a_batch(tmp_path, "one", steps=1, trainer=FSDP))


def test_checkpointing_is_ours_and_not_fsdps(tmp_path: Path) -> None:
    world.save_model(tmp_path / "model")
    world.save_rows(tmp_path / "rows", 8)
    own = {"fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": True}}
    with pytest.raises(UserError, match=r"FSDP's own checkpointing.*gradient_checkpointing: true"):
        train(one_row_a_batch(tmp_path, "one", steps=1, trainer=own))


def test_the_input_embeddings_may_be_a_part_of_their_own(tmp_path: Path) -> None:
    """As new versions of accelerate shard untied ones: gathered, used, and let go of at once."""
    model, processor = tiny_model(("clip",), tied=False)
    model.config.gradients = "full"
    rows = batch(model, processor, [("clip", "")], [], padding_side="right")
    inputs = rows | {"passes": "one", "labelled_only": True}
    loss, grads = step(model.train(), **inputs)
    model.zero_grad()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model.runs = EqualRuns(model)
        mesh = init_device_mesh("cpu", (1,))
        for part in (model.model.embed_tokens, *model.model.layers):
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)
        torch.manual_seed(3)
        made = model(**inputs).loss
        made.backward()
        assert float(made.detach()) == pytest.approx(loss, abs=1e-6)
        named: dict[str, Any] = dict(model.named_parameters())
        for name, grad in grads.items():
            torch.testing.assert_close(named[name].grad.full_tensor(), grad, atol=1e-5, rtol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


def test_a_process_that_is_done_makes_the_runs_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(("clip",))[0].train()
    shard_layers(model)
    assert model._no_split_modules == ["Qwen2VLDecoderLayer"]
    others = iter([1, 1, 0])  # what another process says, time by time

    def all_reduce(said: torch.Tensor, _: Any) -> None:
        said.fill_(max(int(said), next(others)))

    monkeypatch.setattr(sharded_module.torch.distributed, "all_reduce", all_reduce)
    runs = EqualRuns(model)
    hidden = torch.ones(1, 2, 3, requires_grad=True)
    ended = runs.end(hidden)
    assert runs.made_up == 2
    assert torch.equal(ended, hidden)
    ended.sum().backward()
    learning = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and not grad.any() for grad in learning.values())
    others = iter([0, 1, 0])
    with torch.no_grad():  # evaluation, with masks drawn otherwise in another process
        runs.begin()
        assert runs.end(hidden) is hidden
    assert runs.made_up == 3
