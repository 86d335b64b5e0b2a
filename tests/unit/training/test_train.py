"""Whole runs on a tiny model: they learn, go on after a kill, and overwrite nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.unit.training import world
from vpt_agent import PerceptionAgent
from vpt_agent.errors import MissingExtraError, TrainingError, UserError
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.training import TrainConfig, train
from vpt_agent.training.logs import METRICS, MetricsFile, plot_losses, read_metrics


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    world.save_model(folder / "model")
    world.save_rows(folder / "rows")
    return folder


def config(place: Path, tmp_path: Path, **changes: Any) -> TrainConfig:
    return world.config(place, out=str(tmp_path / "out"), **changes)


def weights(path: Path | str) -> dict[str, torch.Tensor]:
    return VPTForConditionalGeneration.from_pretrained(path, dtype=torch.float32).state_dict()


def moved(place: Path, checkpoint: Path) -> set[str]:
    before, after = weights(place / "model"), weights(checkpoint)
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


class Stop(TrainerCallback):  # type: ignore[misc]
    """A kill in the middle: after the optimiser's step, before anything is saved for it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_learns_and_its_checkpoint_answers(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    chosen = config(place, tmp_path, steps=12, answers=2, evaluate_every=6)
    result = train(chosen, say=said.append)
    assert result.steps == 12
    rows = read_metrics(chosen.out / METRICS)
    losses = [row["loss"] for row in rows if "loss" in row]
    evaluated = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert len(losses) == 12
    assert len(evaluated) == 2  # the last step's is not measured twice
    assert evaluated[-1] < evaluated[0]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert result.metrics["eval_loss"] == evaluated[-1]
    assert 0 <= result.metrics["eval_accuracy"] <= 1
    assert result.rows["rows"] >= 36
    assert 0 < result.padding < 0.3
    assert any("padding" in line for line in said)
    assert moved(place, result.checkpoint) == {
        "model", "lm_head", "clip_projector", "detection_projector", "seg_projector"}  # fmt: skip
    assert len(result.answers) == 2
    assert json.loads((chosen.out / "answers.json").read_text()) == list(result.answers)
    agent = PerceptionAgent.from_pretrained(str(result.checkpoint), device="cpu")
    agent.close()
    assert not VPTForConditionalGeneration.from_pretrained(result.checkpoint).config.perception[
        "untrained"
    ]
    about = json.loads((result.checkpoint / "training.json").read_text())
    assert about["config"]["steps"] == 12
    with pytest.raises(UserError, match=r"a finished checkpoint is never overwritten"):
        train(chosen)
    with pytest.raises(UserError, match=r"a finished checkpoint is never overwritten"):
        train(chosen, resume=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_it_ends_with_the_same_losses(
    place: Path, tmp_path: Path, workers: int
) -> None:
    changes: dict[str, Any] = {
        "steps": 6,
        "save_every": 2,
        "data": {"workers": workers},
        "mask": {"paragraphs": 1, "draw": "row"},
        "optim": {"accumulate": 2, "learning_rate": 1e-3},
    }
    whole = train(config(place, tmp_path / "a", **changes))
    killed = config(place, tmp_path / "b", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(killed, callbacks=[Stop(5)])
    with pytest.raises(UserError, match=r"holds a run that was begun.*--resume"):
        train(killed)
    if workers:
        other = killed.model_copy(update={"data": killed.data.model_copy(update={"workers": 1})})
        with pytest.raises(UserError, match=r"as many processes and workers.*data.workers 2"):
            train(other, resume=True)
    resumed = train(killed, resume=True)
    assert read_metrics(killed.out / METRICS) == read_metrics(tmp_path / "a" / "out" / METRICS)
    assert resumed.metrics == whole.metrics
    assert (resumed.padding, resumed.rows) == (whole.padding, whole.rows)
    a, b = weights(whole.checkpoint), weights(resumed.checkpoint)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert weights(killed.out / "checkpoint-6").keys() == a.keys()


def test_there_must_be_something_to_resume(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to resume"):
        train(config(place, tmp_path), resume=True)


def test_alignment_moves_projectors_only(place: Path, tmp_path: Path) -> None:
    result = train(config(place, tmp_path, stage="alignment", data={"tokens": 512}))
    # Without control states clip's projector gets no gradient.
    assert moved(place, result.checkpoint) == {"detection_projector", "seg_projector"}
    own = VPTForConditionalGeneration.from_pretrained(result.checkpoint).config
    assert own.num_inner_forward_run == 2


def test_lists_of_the_config_say_otherwise(place: Path, tmp_path: Path) -> None:
    result = train(config(place, tmp_path, trainable=["clip_projector"]))
    assert moved(place, result.checkpoint) == {"clip_projector"}


def test_lora_is_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    world.save_model(tmp_path / "model", tied=False)
    world.save_rows(tmp_path / "rows", 12)
    part = {"rank": 4, "alpha": 8, "also": ["clip_projector", "lm_head", "model.embed_tokens"]}
    chosen = world.config(tmp_path, stage="lora", lora=part, save_every=2,
                          optim={"learning_rate": 1e-2})  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        train(chosen, callbacks=[Stop(3)])
    result = train(chosen, resume=True)
    assert moved(tmp_path, result.checkpoint) == {"model", "lm_head", "clip_projector"}
    before, after = weights(tmp_path / "model"), weights(result.checkpoint)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.layers.0.self_attn.q_proj.weight" in changed
    assert "model.embed_tokens.weight" in changed
    assert not any("layernorm" in n or n.endswith("bias") for n in changed if "layers" in n)


def test_bad_parts_of_lora_are_named(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for part, said in (
        ({"rank": 2, "targets": "nothing"}, r"no module has a name that LoRA is for"),
        ({"rank": 2, "also": ["clop"]}, r"where: lora.also; got: clop"),
    ):
        with pytest.raises(UserError, match=said):
            train(config(place, tmp_path, stage="lora", lora=part))


def test_half_precision_checkpointing_and_remembered_towers(place: Path, tmp_path: Path) -> None:
    result = train(
        config(
            place,
            tmp_path,
            precision="bfloat16",
            gradient_checkpointing=True,
            model={"remember": 0.1},
            mask={"paragraphs": 1, "how": "attention", "in_evaluation": True},
        )
    )
    assert result.loss < 8
    with pytest.raises(UserError, match=r"only frozen towers can be remembered"):
        train(config(place, tmp_path / "b", frozen=["seg_model"], model={"remember": 0.1}))


def test_passes_make_no_difference(place: Path, tmp_path: Path) -> None:
    one = train(config(place, tmp_path / "a"))
    two = train(config(place, tmp_path / "b", model={"passes": "two"}))
    assert one.loss == pytest.approx(two.loss, abs=1e-4)


def test_a_loss_that_is_no_number_ends_the_run(place: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss is no number any more; where: step \d+, .*row"):
        train(config(place, tmp_path, optim={"learning_rate": 1e30, "clip": 1e30}))
    assert not (tmp_path / "out" / "final").exists()


def _rows(tmp_path: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    world.save_rows(tmp_path, 2)
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    return {"sources": [{"path": str(tmp_path / "bad.json")}], "hold_out": 0}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_with_too_few_pictures(place: Path, tmp_path: Path, workers: int) -> None:
    bad = world.region_row("p0.png") | {"images": ["p0.png"]}
    data = _rows(tmp_path, bad) | {"workers": workers}
    with pytest.raises(UserError, match=r"^too few pictures.*bad.json, row 0, images") as told:
        train(config(place, tmp_path, data=data))
    assert "Traceback" not in str(told.value)


def test_a_kind_that_the_model_has_not(tmp_path: Path) -> None:
    world.save_model(tmp_path / "model", encoders=("clip",))
    data = _rows(tmp_path, world.action_row("p0.png", "dino"))
    with pytest.raises(
        UserError,
        match=r"perception tokens that cannot stand there.*expected: calls of region, clip",
    ):
        train(world.config(tmp_path, data=data))


def test_a_mixture_that_sums_to_nothing(place: Path, tmp_path: Path) -> None:
    data = _rows(tmp_path, world.direct_row("p0.png"))
    data["sources"][0]["weight"] = 0
    with pytest.raises(UserError, match=r"weights of a mixture sum to nothing"):
        train(config(place, tmp_path, data=data))


def test_transformers_arguments_pass_through(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"transformers refuses.*no_such"):
        train(config(place, tmp_path, trainer={"no_such": 1}))
    with pytest.raises(UserError, match=r"decided by the config itself.*max_steps"):
        train(config(place, tmp_path / "b", trainer={"max_steps": 1}))
    result = train(config(place, tmp_path / "c", trainer={"lr_scheduler_type": "constant"}))
    rates = [row["rate"] for row in read_metrics(tmp_path / "c" / "out" / METRICS) if "rate" in row]
    assert result.steps == len(rates) == 4
    assert len(set(rates)) == 1


def test_metrics_survive_half_a_line(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": 1.0 / step})
    with file.path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(file.path)] == [1, 2, 3]
    file.resume(2)
    assert [row["step"] for row in read_metrics(file.path)] == [1, 2]
    file.path.write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"a line of metrics is no JSON"):
        read_metrics(file.path)


def test_tensorboard_shows_the_same_losses(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = config(place, tmp_path, evaluate_every=2)
    train(chosen)
    (folder,) = (chosen.out / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    rows = read_metrics(chosen.out / METRICS)
    for tag, name in (
        ("train/loss", "loss"), ("train/learning_rate", "rate"), ("eval/loss", "eval_loss")
    ):  # fmt: skip
        seen = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in seen] == [row["step"] for row in rows if name in row]
        assert [value for _, value in seen] == pytest.approx(
            [row[name] for row in rows if name in row], abs=1e-4
        )


def test_losses_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = MetricsFile(tmp_path)
    for step in range(1, 20):
        file.write({"step": step, "loss": 5.0 / step})
    file.write({"step": 19, "eval_loss": 1.0, "eval_accuracy": 0.5})
    picture = plot_losses(tmp_path)
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_extras_that_are_missing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"LoRA needs peft.*vpt-agent\[train\]"):
        train(config(place, tmp_path, stage="lora", lora={"rank": 2}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_losses(tmp_path) is None
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingExtraError, match=r"reading YAML needs PyYAML"):
        config(place, tmp_path).to_yaml()


def test_alignment_needs_something_to_align(tmp_path: Path) -> None:
    world.save_model(tmp_path / "model", encoders=())
    data = _rows(tmp_path, world.direct_row("p0.png"))
    with pytest.raises(UserError, match=r"alignment needs a kind with a projector"):
        train(world.config(tmp_path, stage="alignment", data=data))
