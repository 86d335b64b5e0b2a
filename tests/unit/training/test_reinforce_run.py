"""The stage as a whole on a tiny model: it learns, resumes, overwrites nothing, says its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.training.reinforce_world import ASKED, eager_model, picture
from vpt_agent.agent import PerceptionAgent
from vpt_agent.data import Mixture, read_row
from vpt_agent.errors import TrainingError, UserError
from vpt_agent.trace import Decoded
from vpt_agent.training.config import Source
from vpt_agent.training.logs import read_metrics
from vpt_agent.training.reinforce import (
    Problem,
    ReinforceConfig,
    endless,
    make_reinforce_config,
    problem_of,
    read_reinforce_config,
    reinforce,
)
from vpt_agent.training.reinforce.plot import plot_reinforcement
from vpt_agent.training.reinforce.problems import at_step, problems_of
from vpt_agent.training.reinforce.rewards import total_of
from vpt_agent.types import Answer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model, processor = eager_model(encoders=("clip",))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _config(out: Path, checkpoint: Path, **changes: Any) -> ReinforceConfig:
    data: dict[str, Any] = {
        "out": str(out),
        "model": str(checkpoint),
        "steps": 4,
        "questions": 2,
        "group": 4,
        "new_tokens": 6,
        "calls": 1,
        "rounds": 1,
        "device": "cpu",
        "save_every": 2,
        "update": {"learning_rate": 3e-3, "rows": 3},
    }
    return make_reinforce_config(data | changes)


def _problems(count: int = 3) -> Mixture[Problem]:
    made = [Problem(ASKED, "x", (picture(i),), "even" if i % 2 else "odd") for i in range(count)]
    return endless([(made, 1.0)], seed=0)


def begun(problem: Problem, answer: Answer) -> float:
    """1 if a call was begun, complete or not."""
    starts = ("<|region_token_start|>", "<|clip_action_start|>")
    spoken = [e for e in answer.trace.events if isinstance(e, Decoded)]
    text = "".join(span.text for event in spoken for span in event.spans)
    return float(any(start in text for start in starts))


def test_it_learns_what_is_rewarded(tmp_path: Path, checkpoint: Path) -> None:
    # The tower learns, too: features of old weights that were kept would show as a gap.
    learns = {"steps": 16, "group": 8, "save_every": 100, "frozen": ["embed_tokens"]}
    config = _config(tmp_path / "out", checkpoint, **learns)
    done = reinforce(config, problems=_problems(), reward=begun)
    rows = read_metrics(config.out / "metrics.jsonl")
    first, last = (sum(r["reward"] for r in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last > first + 0.4, f"share that begins a call: {first:.2f}, then {last:.2f}"
    assert max(r.get("gap", 0.0) for r in rows) < 1e-4
    assert {"accuracy", "looks", "visual_tokens", "skipped", "kl", "ratio"} <= set(rows[0])
    assert set(rows[0]["types"]) <= {"odd", "even"}
    agent = PerceptionAgent.from_pretrained(done.checkpoint, device="cpu")
    assert agent.run(ASKED, picture(0)).status in ("answered", "limit")


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_resumed_it_ends_with_the_same_weights(tmp_path: Path, checkpoint: Path) -> None:
    whole = _config(tmp_path / "whole", checkpoint)
    reinforce(whole, problems=_problems(), reward=_length)

    def killed(text: str) -> None:
        if text.startswith("step 3"):
            raise KeyboardInterrupt

    parts = _config(tmp_path / "parts", checkpoint)
    with pytest.raises(KeyboardInterrupt):
        reinforce(parts, problems=_problems(), reward=_length, say=killed)
    assert not (parts.out / "final").exists()
    with pytest.raises(UserError, match="holds a run that was begun"):
        reinforce(parts, problems=_problems(), reward=_length)
    other = _config(tmp_path / "parts", checkpoint, temperature=0.5)
    with pytest.raises(UserError, match="goes on with the config it began with"):
        reinforce(other, resume=True, problems=_problems(), reward=_length)
    reinforce(parts, resume=True, problems=_problems(), reward=_length)
    one, two = (_weights(c.out / "final") for c in (whole, parts))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[n], v) for n, v in _weights(checkpoint).items())
    rows = [read_metrics(c.out / "metrics.jsonl") for c in (whole, parts)]
    assert [r["step"] for r in rows[1]] == [1, 2, 3, 4]
    assert [r["reward"] for r in rows[0]] == [r["reward"] for r in rows[1]]
    with pytest.raises(UserError, match="never overwritten"):
        reinforce(whole, problems=_problems(), reward=_length)


def test_a_stage_goes_on_over_the_same_questions(tmp_path: Path, checkpoint: Path) -> None:
    config = _config(tmp_path / "out", checkpoint, steps=2, save_every=1)

    def killed(text: str) -> None:
        if text.startswith("step 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reinforce(config, problems=_problems(), reward=_length, say=killed)
    (config.out / "checkpoint-1").rename(config.out / "checkpoint-1-copy")
    fewer = endless([([Problem("Where?", "x", (picture(0),))], 1.0)])
    again = _config(tmp_path / "out", checkpoint, steps=2, save_every=1)
    with pytest.raises(KeyboardInterrupt):  # a copy is no checkpoint: from the start
        reinforce(again, resume=True, problems=_problems(), reward=_length, say=killed)
    with pytest.raises(UserError, match=r"taken from another mixture|rows have changed"):
        reinforce(again, resume=True, problems=fewer, reward=_length)
    done = reinforce(again, resume=True, problems=_problems(), reward=_length)
    assert done.steps == 2
    assert [r["step"] for r in read_metrics(config.out / "metrics.jsonl")] == [1, 2]


def _length(problem: Problem, answer: Answer) -> float:
    return answer.usage.new_tokens / 10


def test_groups_of_equal_worth_move_nothing(tmp_path: Path, checkpoint: Path) -> None:
    config = _config(tmp_path / "out", checkpoint, steps=1)
    done = reinforce(config, problems=_problems(), reward=lambda *_: 1.0)
    assert (done.metrics["skipped"], done.metrics["choices"]) == (1.0, 0.0)
    before, after = _weights(checkpoint), _weights(done.checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_nothing_to_resume_is_said(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="nothing to resume"):
        reinforce(_config(tmp_path / "none", checkpoint), resume=True, problems=_problems())


def test_a_question_that_cannot_be_asked_is_said(tmp_path: Path, checkpoint: Path) -> None:
    broken = endless([([Problem("  ", "x", (picture(0),))], 1.0)])
    with pytest.raises(UserError, match=r"cannot be asked.*empty"):
        reinforce(_config(tmp_path / "out", checkpoint), problems=broken)


def test_rewards_and_losses_that_are_no_numbers_are_said(tmp_path: Path, checkpoint: Path) -> None:
    config = _config(tmp_path / "out", checkpoint)
    weighted = total_of(config.rewards)
    nan = type(weighted)(((lambda *_: float("nan"), 1.0),))
    with pytest.raises(UserError, match="a reward is no number"):
        reinforce(config, problems=_problems(), reward=nan)
    with pytest.raises(TrainingError, match="no number any more"):
        reinforce(config, problems=_problems(), reward=_vast)


def _vast(problem: Problem, answer: Answer) -> float:
    return (answer.usage.new_tokens - 3) * 1e300


def test_rewards_are_found_by_name(tmp_path: Path, checkpoint: Path) -> None:
    def worth(*uses: str) -> Any:
        parts = [{"use": use} for use in uses]
        return total_of(_config(tmp_path, checkpoint, rewards=parts).rewards)

    found = worth("looks", "math:copysign")
    assert [f.__name__ for f, _ in found.parts] == ["looks", "copysign"]
    with pytest.raises(UserError, match=r"no such reward.*exact_match"):
        worth("luck")
    with pytest.raises(UserError, match="cannot be imported"):
        worth("math:no_such_thing")
    with pytest.raises(UserError, match="is a function"):
        worth("math:pi")


def test_questions_come_from_rows(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    call = "<|region_token_start|><|x_0|><|y_0|><|x_1|><|y_1|><|region_token_end|>"
    texts = ["<image>\nWhich word?", call, "<image>", "KITE"]
    roles = ("user", "assistant")
    row = {
        "messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)],
        "images": ["a.png", "a.png_0,0,40,40"],
        "meta": {"type": "region"},
    }
    made = problem_of(read_row(row), folder=tmp_path)
    assert (made.question, made.answer, made.type) == ("Which word?", "KITE", "region")
    assert [image.size for image in made.images] == [(84, 56)]
    (tmp_path / "rows.json").write_text(json.dumps([row] * 3))
    config = make_reinforce_config(
        {"out": "o", "steps": 1, "sources": [{"path": str(tmp_path / "rows.json")}]}
    )
    assert [p.answer for p in at_step(problems_of(config), 5, 2)] == ["KITE"] * 2
    with pytest.raises(UserError, match="no questions to ask"):
        problems_of(make_reinforce_config({"out": "o", "steps": 1}))
    (tmp_path / "none.json").write_text("[]")
    empty = Source(path=tmp_path / "none.json")
    with pytest.raises(UserError, match="a source has no questions"):
        problems_of(make_reinforce_config({"out": "o", "steps": 1, "sources": [empty]}))
    again = row | {"messages": [{"role": "user", "content": "<image><clip_image>?"},
                                {"role": "assistant", "content": "x"}],
                   "images": ["a.png"], "clip_images": ["a.png"]}  # fmt: skip
    with pytest.raises(UserError, match="already shows a re-encoded picture"):
        problem_of(read_row(again), folder=tmp_path)


def test_each_step_asks_what_it_would_have_asked(tmp_path: Path) -> None:
    made = [Problem(str(i), str(i)) for i in range(7)]
    stream = endless([(made, 1.0)], seed=3)
    one = [p.question for step in range(6) for p in at_step(stream, step, 3)]
    fresh = endless([(made, 1.0)], seed=3)
    assert [p.question for p in at_step(fresh, 4, 3)] == one[12:15]
    assert set(one) == {p.question for p in made}


def test_wrong_configs_are_said(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("out: o\nsteps: 2\nupdate: {clap: 0.1}\ntemprature: 1\n")
    with pytest.raises(UserError, match=r"update\.clap, did you mean clip\?.*mean temperature\?"):
        read_reinforce_config(path)
    path.write_text("out: o\nsteps: 2\n")
    assert read_reinforce_config(path, ["update.clip=0.1"]).update.clip == 0.1
    for wrong, why in (
        ({"steps": 0}, "greater than or equal to 1"),
        ({"group": 1}, "greater than or equal to 2"),
        ({"temperature": 0}, "greater than 0"),
        ({"rewards": []}, "without a reward"),
        ({"trainable": ["model"], "frozen": ["visual"]}, "either trainable or frozen"),
    ):
        with pytest.raises(UserError, match=why):
            make_reinforce_config({"out": "o", "steps": 2, **wrong})
    path.write_text("- a\n")
    with pytest.raises(UserError, match="a table of keys and values"):
        read_reinforce_config(path)
    path.write_text("a: [\n")
    with pytest.raises(UserError, match="is no YAML"):
        read_reinforce_config(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_reinforce_config(tmp_path / "none.yaml")


def test_the_course_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot_reinforcement(tmp_path) is None
    rows = [
        {"step": i, "reward": 0.1 * i, "accuracy": 0.5, "looks": 1 - 0.1 * i,
         "types": {"none": {"looks": 0.5}}}
        for i in range(1, 4)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    path = plot_reinforcement(tmp_path)
    assert path is not None
    assert path.stat().st_size > 5000
