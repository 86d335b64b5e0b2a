"""Models without perception tokens: the same questions, another view, an answer at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

from vpt_agent.agent import PerceptionAgent
from vpt_agent.nano.domain import make_domain_scene
from vpt_agent.nano.domain.table import TABLE
from vpt_agent.nano.second import pool as pool_module
from vpt_agent.nano.second.batches import PLAN
from vpt_agent.nano.second.model import Second, build_second
from vpt_agent.nano.second.pool import DomainPool, draw_domain_shard
from vpt_agent.nano.second.text import END, SecondEncoder, second_tokenizer
from vpt_agent.nano.second.train import WEIGHTS
from vpt_agent.nano.second_baseline import BaselineBatches, View, main, visual_tokens
from vpt_agent.nano.tokenizer import token_id
from vpt_agent.types import Limits

SCENES = 5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pool, and a stage see that has learnt nothing."""
    out = tmp_path_factory.mktemp("work")
    (out / "pool").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "SHARD", SCENES)
        draw_domain_shard(out / "pool", 0)
    torch.manual_seed(5)
    model = Second(build_second(second_tokenizer()))
    (out / "see").mkdir()
    save_file({k: v.clone() for k, v in model.state_dict().items()}, out / "see" / WEIGHTS)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("view", ["global", "large"])
def test_batches_ask_the_same_and_never_call(work: Path, view: View) -> None:
    encoder = SecondEncoder(second_tokenizer())
    batches = BaselineBatches(view, work / "pool", encoder, size=3, pack=False)
    pool = DomainPool(work / "pool")
    known = {
        (asked.question, asked.answer) for _, record in pool.records for asked in record.asked
    } | {(tag.question, tag.answer) for _, record in pool.records for tag in record.scene.tags}
    calls = {token_id(encoder.tokenizer, kind.start) for kind in TABLE.kinds}
    model = Second(build_second(encoder.tokenizer)).eval()
    shown = set()
    assert set(batches.plan) <= set(PLAN["talk"])
    for number in range(len(batches.plan)):
        batch = batches.batch(pool, number)
        shown |= {k for k in ("spot", "spot_again") if k in batch}
        for key in shown & batch.keys():
            # Only visual tokens are looked at; the last to look says the first of the answer.
            assert (batch["input_ids"][batch[key]] == encoder.image).all()
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            assert not calls & set(ids.tolist())
            text = encoder.tokenizer.decode(ids)
            answer = encoder.tokenizer.decode(labels[labels != -100])
            assert answer.endswith(END)
            assert any(q in text and a == answer.removesuffix(END) for q, a in known)
        if batches.plan[number] == "clip":
            with torch.no_grad():
                loss, found = model(batch)
            assert torch.isfinite(loss)
            assert f"{batch['name']}_answer" in found
    assert shown == ({"spot"} if view == "global" else {"spot", "spot_again"})


@pytest.mark.slow
@pytest.mark.parametrize("view", ["global", "large"])
def test_questions_about_a_view_in_one_row_are_the_rows_apart(work: Path, view: View) -> None:
    encoder, pool = SecondEncoder(second_tokenizer()), DomainPool(work / "pool")
    torch.manual_seed(0)
    model = Second(build_second(encoder.tokenizer)).eval()
    for number in range(4):
        told = {}
        for pack in (False, True):
            batches = BaselineBatches(view, work / "pool", encoder, size=3, pack=pack)
            batch = batches.batch(pool, number)
            model.zero_grad()
            loss, metrics = model(batch)
            loss.backward()
            gradient = model.vpt.model.embed_tokens.weight.grad.clone()
            told[pack] = (batch["input_ids"].numel(), float(loss.detach()), metrics, gradient)
        (tokens, loss, metrics, gradient), (fewer, same, others, near) = told[False], told[True]
        assert fewer < tokens
        assert same == pytest.approx(loss, rel=1e-3)  # the forward pass is in bfloat16
        assert others == pytest.approx(metrics, abs=0.02, nan_ok=True)
        assert float((gradient - near).norm() / gradient.norm()) < 0.01


def test_the_same_number_is_the_same_batch(work: Path) -> None:
    batches = BaselineBatches("global", work / "pool", SecondEncoder(second_tokenizer()), size=3)
    pool = DomainPool(work / "pool")
    first, again, other = (batches.batch(pool, n) for n in (4, 4, 12))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])


def train(work: Path, view: View, arguments: Sequence[str] = ()) -> list[float]:
    small = ("--size", "2", "--threads", "1")
    main(["--view", view, "--out", str(work), *small, *arguments])
    state = next((work / f"baseline-{view}").glob("checkpoint-*/trainer_state.json"))
    return [line["step"] for line in json.loads(state.read_text())["log_history"]]


@pytest.mark.parametrize("view", ["global", "large"])
def test_it_trains_and_answers_with_its_own_view(
    work: Path, view: View, capsys: pytest.CaptureFixture[str]
) -> None:
    train(work, view, ["--steps", "2"])
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert folder == work / f"baseline-{view}" / "checkpoint"
    agent = PerceptionAgent.from_pretrained(folder, device="cpu")
    assert set(agent.abilities.untrained) == {kind.name for kind in TABLE.kinds}
    pool = DomainPool(work / "pool")
    tokens = []
    for seed in range(SCENES):
        answer = agent.run(
            "Count the tags.",
            make_domain_scene(seed).image,
            tool_choice="none",
            limits=Limits(new_tokens=2),
        )
        assert not answer.calls
        tokens.append(answer.usage.visual_tokens)
    # The agent sees as much as training did.
    assert np.mean(tokens) == pytest.approx(visual_tokens(pool, view))
    assert (np.mean(tokens) > 200) == (view == "large")


def test_it_goes_on_from_its_checkpoint(work: Path) -> None:
    train(work, "global", ["--steps", "1"])
    checkpoint = work / "baseline-global" / "checkpoint-1" / "model.safetensors"
    state = load_file(checkpoint)
    name = "vpt.model.norm.weight"
    marked = state[name] + 5.0  # what a later step could not do by itself
    save_file({**state, name: marked}, checkpoint)
    train(work, "global", ["--steps", "2", "--rate", "1e-4", "--resume"])
    assert (work / "baseline-global" / "checkpoint-2").is_dir()
    after = load_file(work / "baseline-global" / WEIGHTS)[name]
    assert torch.allclose(after, marked, atol=0.1)
