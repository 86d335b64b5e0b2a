"""A config is read whole or refused with one error that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.model.directories import plain_qwen
from vpt_agent.errors import UserError
from vpt_agent.training import make_config, read_config
from vpt_agent.training.plan import SIZES, plan

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(CONFIGS.glob("vpt-*.yaml"))


def minimal(**more: Any) -> dict[str, Any]:
    return {
        "out": "runs/x",
        "stage": "instruction",
        "steps": 1,
        "model": {"path": "shipped"},
        "data": {"sources": [{"path": "rows.json"}]},
        **more,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stepz": 3}, "there is no key stepz, did you mean steps?"),
        ({"optim": {"learning_rat": 1}}, "no key optim.learning_rat, did you mean learning_rate?"),
        ({"mask": {"ara_mask_id": 1}}, "there is no key mask.ara_mask_id"),
        (
            {"data": {"sources": [{"path": "a", "wieght": 1}]}},
            "no key data.sources.0.wieght, did you mean weight?",
        ),
        ({"model": {"path": "x", "encoders": ["clop"]}}, "model.encoders.0: Input should be"),
        ({"epochs": 1}, "say either steps or epochs"),
        ({"steps": None}, "say either steps or epochs"),
        ({"steps": None, "epochs": 1, "data": {"sources": [{"path": "a"}], "tokens": 64}},
         "with batches by tokens say steps"),
        ({"trainable": ["a"], "frozen": ["b"]}, "say either trainable or frozen"),
        ({"stage": "lora"}, "the stage lora and the part lora go together"),
        ({"mask": {"paragraphs": 2, "how": "attention"}}, "attention masks hide the question only"),
        ({"mask": {"ratio": 1.5}}, "mask.ratio: Input should be less than or equal to 1"),
        ({"data": {"sources": [{}]}}, "a source has a path, a dataset or scenes"),
        ({"data": {"sources": []}}, "data.sources"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=r"the config is wrong") as error:
        make_config(minimal() | change)
    assert said in str(error.value)


def test_files_and_changes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(make_config(minimal()).to_yaml())
    read = read_config(path, ["data.rows=7", "optim.schedule=linear", "data.sources.0.weight=2"])
    assert (read.data.rows, read.optim.schedule, read.data.sources[0].weight) == (7, "linear", 2)
    assert read_config(path) == make_config(minimal())
    for change, said in (
        ("data.rows", "KEY=VALUE"),
        ("out.x=1", "reaches into a value"),
        ("data.sources.3=1", "a list has no such place"),
        ("data.sources.3.path=1", "a list has no such place"),
        ("data.rowz=1", "did you mean rows"),
    ):
        with pytest.raises(UserError, match=said):
            read_config(path, [change])
    path.write_text("[1")
    with pytest.raises(UserError, match=r"the config is no YAML"):
        read_config(path)
    path.write_text("5")
    with pytest.raises(UserError, match=r"a config is a table"):
        read_config(path)
    with pytest.raises(UserError, match=r"the config cannot be read"):
        read_config(tmp_path / "none.yaml")


def test_the_recipes_are_the_published_ones() -> None:
    read = {path.stem: read_config(path) for path in RECIPES}
    assert len(read) == 6
    for name, config in read.items():
        aligns = name.endswith("alignment")
        optim, data = config.optim, config.data
        assert (optim.schedule, optim.warmup, optim.clip, optim.weight_decay) == (
            "cosine", 0.03, 1.0, 0.0)  # fmt: skip
        assert optim.learning_rate == (2e-3 if aligns else 2e-5)
        assert (config.precision, data.max_length) == ("bfloat16", 2048)
        assert config.gradient_checkpointing
        assert config.evaluate_every == 500
        want = (16, 4) if aligns else (8, 4) if name == "vpt-2b-dino" else (4, 8)
        assert (data.rows, optim.accumulate) == want
        if aligns:
            assert (config.stage, config.epochs, config.mask.paragraphs) == ("alignment", 1, 0)
        else:
            assert (config.steps, data.hold_out, data.shuffle) == (6000, 1000, 16384)
            assert (config.mask.paragraphs, config.mask.ratio) == (1, 0.5)
    lora = read["vpt-7b-clip-lora"].lora
    assert lora is not None
    assert (lora.rank, lora.alpha) == (512, 1024)
    assert lora.also == ("clip_projector", "lm_head", "model.embed_tokens")


@pytest.mark.parametrize(
    ("name", "billions", "learning"),
    [
        ("vpt-2b-dino-alignment", 2.517, {"detection_projector"}),
        ("vpt-2b-clip", 2.214, {"model", "embed_tokens", "clip_projector"}),
        ("vpt-7b-clip-lora", 9.609, {"embed_tokens", "lm_head", "clip_projector", "lora"}),
    ],
)
def test_a_dry_run_counts(name: str, billions: float, learning: set[str]) -> None:
    made = plan(read_config(CONFIGS / f"{name}.yaml"))
    # Without the LoRA weights, and with the tied head counted, these are the hub's sizes.
    assert made.parameters / 1e9 == pytest.approx(billions, abs=0.001)
    assert {part.name for part in made.parts if part.trainable} == learning
    assert made.rows_per_step in (32, 64)
    assert made.memory > made.parameters * 4
    assert any("tokens per step" in line for line in made.lines())


@pytest.mark.parametrize(
    ("sizes", "count"), [("qwen2.5-vl-3b", 3_754_622_976), ("qwen3-vl-4b", 4_437_815_808)]
)
def test_a_dry_run_on_a_newer_base(sizes: str, count: int) -> None:
    """The base's own parameters are as many as its checkpoint on the hub has."""
    model = {"path": "Qwen/some", "sizes": sizes, "encoders": ["clip"]}
    made = plan(make_config(minimal(model=model)))
    own = sum(p.parameters for p in made.parts if p.name != "clip_projector")
    assert own == count
    assert {p.name for p in made.parts if p.trainable} == {
        "embed_tokens",
        "model",
        "clip_projector",
    }


@pytest.mark.parametrize("base", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_dry_run_on_the_folder_of_a_base(tmp_path: Path, base: str) -> None:
    path = str(plain_qwen(tmp_path, base=base))
    made = plan(make_config(minimal(model={"path": path, "encoders": ["clip"]})))
    assert [p.name for p in made.parts if p.trainable][-1] == "clip_projector"


def test_a_dry_run_needs_shapes() -> None:
    with pytest.raises(UserError, match=r"needs the model's shapes.*qwen2-vl-2b"):
        plan(make_config(minimal(model={"path": "rp-yu/some"})))
    assert set(SIZES) == {"qwen2-vl-2b", "qwen2-vl-7b", "qwen2.5-vl-3b", "qwen3-vl-4b"}
    assert plan(make_config(minimal())).parameters > 1e6  # the shipped model's own
