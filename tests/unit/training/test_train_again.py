"""What a run asks of its rows, of its config when it is taken up, and of what comes after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from tests.unit.training import world
from tests.unit.training.test_train import Stop
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration, add_perception_kind
from vpt_agent.model.testing import tiny_model
from vpt_agent.tokens import own_kind
from vpt_agent.tokens.table import IMAGE_TAG, REENCODE_TRIGGER
from vpt_agent.tool import perception_tool
from vpt_agent.training import TrainConfig, make_config, train
from vpt_agent.training.answers import plain_question
from vpt_agent.training.arguments import arguments
from vpt_agent.training.config import Source
from vpt_agent.training.run import load, make_collator, make_trainer
from vpt_agent.training.sources import RowFile, Wanted
from vpt_agent.training.stream import Fixed, Shape
from vpt_agent.training.trainer import VPTTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("again")
    world.save_model(folder / "model", encoders=("clip",))
    world.save_rows(folder / "rows", 4)
    return folder


def rows_of(folder: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        world.picture(folder, number)
    (folder / "own.json").write_text(json.dumps(rows))
    return {"sources": [{"path": str(folder / "own.json")}], "hold_out": 0}


def short(place: Path, tmp_path: Path, *rows: dict[str, Any], **changes: Any) -> TrainConfig:
    data = rows_of(tmp_path / "rows", *rows) | changes.pop("data", {})
    settings = {"steps": 2, "out": str(tmp_path / "out"), "data": data} | changes
    return world.config(place, **settings)


def test_a_run_goes_on_with_its_own_config_and_rows(place: Path, tmp_path: Path) -> None:
    begun = short(place, tmp_path, *[world.direct_row("p0.png")] * 4, save_every=1, answers=1)
    with pytest.raises(KeyboardInterrupt):
        train(begun, callbacks=[Stop(2)])
    for change, said in (
        ({"optim": begun.optim.model_copy(update={"learning_rate": 3.0})},
         r"config it began with.*got: optim.learning_rate: 3.0; expected: .*rate: 0.001"),
        ({"data": begun.data.model_copy(update={"sources": ()})}, r"data.sources.0.path: None"),
        ({"steps": 5}, r"got: steps: 5; expected: steps: 2; do: .*config.yaml"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            train(begun.model_copy(update=change), resume=True)
    file = tmp_path / "rows" / "own.json"
    rows = file.read_text()
    file.write_text(rows.replace("A cat.", "A dog."))
    with pytest.raises(UserError, match=r"the rows have changed.*where: own.json; got: rows with"):
        train(begun, resume=True)
    file.write_text(rows)
    assert train(begun.model_copy(update={"answers": 0, "keep": None}), resume=True).steps == 2


def test_the_rows_of_an_evaluation_are_not_counted_among_those_trained_on(
    place: Path, tmp_path: Path
) -> None:
    rows = [world.direct_row("p0.png")] * 8
    counts = [
        train(short(place, tmp_path / name, *rows, data={"hold_out": 2}, evaluate_every=every)).rows
        for name, every in (("a", 1), ("b", None))
    ]
    assert counts[0] == counts[1]


def test_rows_that_cannot_be_evaluated_on_are_told_before_a_run(
    place: Path, tmp_path: Path
) -> None:
    long = world.direct_row("p0.png")
    long["messages"][0]["content"] += "why " * 400
    rows = [long, *[world.direct_row("p0.png")] * 3]
    data = {"hold_out": 1, "max_length": 256}
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"no row can be evaluated on; .*got: rows: 1, dropped: prompt: 1"
    ):
        train(short(place, tmp_path, *rows, data=data), say=said.append)
    assert not any("step" in line for line in said)
    # One that can be used is enough.
    short_one = short(place, tmp_path / "b", *rows, data=data | {"hold_out": 2})
    assert "eval_loss" in train(short_one).metrics


def test_a_finished_checkpoint_outlives_an_evaluation_that_fails(
    place: Path, tmp_path: Path
) -> None:
    rows = [world.direct_row(f"{name}.png") for name in ("p0", "gone", "p2")]
    with pytest.raises(UserError, match=r"no such.*gone.png"):
        train(short(place, tmp_path, *rows, data={"hold_out": 2}))
    assert (tmp_path / "out" / "final" / "training.json").is_file()


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_evaluation_rows_come_whole(place: Path, tmp_path: Path, workers: int) -> None:
    bad = world.region_row("p1.png") | {"images": ["p1.png"]}
    rows = [world.direct_row("p0.png"), bad]
    data = rows_of(tmp_path, *rows) | {"hold_out": 2, "workers": workers}
    settings = world.config(place, data=data | {"sources": [{"path": str(tmp_path / "own.json")}]})
    collator = make_collator(settings, tiny_model(("clip",))[1])
    fixed = Fixed(list(RowFile(settings.data.sources[0], wanted=Wanted(skip=True))), collator,
                  Shape(1, None, 1, 0))  # fmt: skip
    batches = iter(DataLoader(fixed, batch_size=None, num_workers=workers))
    assert "input_ids" in next(batches)
    if workers:
        assert "too few pictures" in str(next(batches)["error"])
    else:
        with pytest.raises(UserError, match=r"^too few pictures"):
            next(batches)


def test_bad_rows_are_skipped_and_counted(place: Path, tmp_path: Path) -> None:
    rows = [world.direct_row("p0.png"), {"messages": 3}, world.direct_row("none.png")]
    done = train(short(place, tmp_path, *rows, data={"bad_rows": "skip"}))
    assert done.rows["skipped"] >= 2
    with pytest.raises(UserError, match=r"messages in pairs.*own.json, row 1"):
        train(short(place, tmp_path / "b", *rows, data={"shuffle": 1}))


def test_kinds_without_rows_stay_untrained(tmp_path: Path) -> None:
    model, processor = tiny_model(("clip", "dino"))
    perception = dict(model.config.perception) | {"untrained": ["region", "clip", "dino"]}
    model.config.perception = perception
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [world.action_row("p0.png", "clip"), world.direct_row("p1.png")]

    def untrained(path: Path) -> list[str]:
        left: list[str] = VPTForConditionalGeneration.from_pretrained(path).config.perception[
            "untrained"
        ]
        return left

    settings = short(tmp_path, tmp_path, *rows, save_every=1, steps=3)
    with pytest.raises(KeyboardInterrupt):
        train(settings, callbacks=[Stop(2)])
    assert untrained(train(settings, resume=True).checkpoint) == ["region", "dino"]
    outside = world.region_row("p0.png") | {"meta": {"forced_calls": [1]}}
    put_upon = train(short(tmp_path, tmp_path / "b", outside, steps=1))
    assert untrained(put_upon.checkpoint) == ["region", "clip", "dino"]


@perception_tool
def wand(key: str) -> str:
    """Say what lies there."""
    return f"bin {key}"


def test_own_tools_answer(tmp_path: Path) -> None:
    phrase = "Wave the wand, and then answer."
    kind = own_kind("wand", payload="text", pattern=r"\d", argument="key", trigger=phrase)
    model, processor = tiny_model(())
    add_perception_kind(model, processor, kind, tool=wand)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    row = world.direct_row("p0.png")
    row["messages"][0]["content"] = f"{IMAGE_TAG}Where?\n{phrase}"
    settings = short(tmp_path, tmp_path, *[row] * 4, answers=1, steps=1, data={"hold_out": 1})
    with pytest.raises(UserError, match=r"calls a tool that is not here.*wand"):
        train(settings)
    assert not (tmp_path / "out" / "checkpoint-1").exists()
    answer = train(settings, tools=[wand]).answers[0]
    assert answer["question"] == "Where?"
    table = processor.table
    (taken,) = RowFile(settings.data.sources[0])[:1]
    assert plain_question(taken, table) == "Where?"  # type: ignore[arg-type]
    row["messages"][0]["content"] = f"{IMAGE_TAG}\nWhere?\n{REENCODE_TRIGGER}"
    (tmp_path / "rows" / "own.json").write_text(json.dumps([row]))
    assert plain_question(RowFile(settings.data.sources[0])[0], table) == "Where?"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("per_device_train_batch_size", r"by the config itself.*use data.rows or data.tokens"),
        ("save_total_limit", r"by the config itself: save_total_limit \(use keep\)"),
        ("label_smoothing_factor", r"by the config itself: label_smoothing_factor$"),
        ("bf16", r"\(use precision\)"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(place: Path, key: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        world.config(place, trainer={key: 1})


def test_one_process_trains_on_one_gpu(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(
        UserError, match=r"one process trains on one GPU; got: 2 GPUs; do: .*torchr"
    ):
        arguments(world.config(place), rows=4, evaluates=False)


def test_there_must_be_kinds_and_rows_to_evaluate_on(place: Path, tmp_path: Path) -> None:
    settings = short(place, tmp_path, world.direct_row("p0.png"))
    trainer = make_trainer(settings, *load(settings))
    with pytest.raises(UserError, match=r"there are no rows to evaluate on; do: set data.hold_out"):
        trainer.evaluate()
    bare, processor = tiny_model(())
    bare.config.perception = None
    bare.save_pretrained(tmp_path / "bare")
    processor.save_pretrained(tmp_path / "bare")
    without = settings.model_copy(
        update={"model": settings.model.model_copy(update={"path": str(tmp_path / "bare")})}
    )
    with pytest.raises(UserError, match=r"no perception kinds"):
        load(without)


def test_what_sharded_weights_do_not_allow(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    rows = [world.direct_row("p0.png")] * 4
    done = short(place, tmp_path, *rows, save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("vpt_agent.training.run._finish", _killed)
        with pytest.raises(KeyboardInterrupt):
            train(done)
        patch.setattr(VPTTrainer, "sharded", True)
        with pytest.raises(UserError, match=r"sharded weights are taken up to train only"):
            train(done, resume=True)
        patch.undo()
        patch.setattr(VPTTrainer, "sharded", True)
        lora = short(place, tmp_path / "b", *rows, stage="lora", lora={"rank": 2})
        with pytest.raises(UserError, match=r"LoRA cannot be merged into sharded weights"):
            train(lora)


def _killed(*_: Any) -> None:
    raise KeyboardInterrupt


def test_epochs_are_for_rows_that_are_counted(place: Path) -> None:
    source = Source(path=Path("rows.json"), stream=True)
    data = {"sources": [source.model_dump(mode="json")]}
    with pytest.raises(UserError, match=r"with streams say steps"):
        make_config({"out": "x", "stage": "instruction", "epochs": 1, "model": {"path": "x"},
                     "data": data})  # fmt: skip
