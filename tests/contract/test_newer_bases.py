"""Contracts X2 and X3 on the newer bases, one-pass training, and the way from a plain checkpoint
through ``vpt-agent train`` to answers. Tiny random weights; Qwen2-VL's own tests stand elsewhere.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.unit.engine.conftest import ENCODERS, KINDS, Kit, picture
from tests.unit.engine.test_batch_contract import runs, story
from tests.unit.engine.test_cache_contract import full_pass, logits
from tests.unit.model.batches import batch
from tests.unit.model.batches import picture as batch_picture
from tests.unit.model.directories import load, plain_qwen
from tests.unit.model.test_one_pass import MIXED, assert_same
from tests.unit.training import world
from vpt_agent import Limits, PerceptionAgent
from vpt_agent.agent import Question
from vpt_agent.cli import app
from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Tokens, Unconditioned, Visual
from vpt_agent.model import add_perception_kind
from vpt_agent.model.masking import MaskRule
from vpt_agent.model.memory import FeatureMemory
from vpt_agent.model.testing import tiny_model
from vpt_agent.review import replay
from vpt_agent.tokens import own_kind
from vpt_agent.tool import ToolContext, perception_tool
from vpt_agent.training import train
from vpt_agent.types import View
from vpt_agent.vision.images import load_views
from vpt_agent.vision.policy import ImagePolicy

NEWER = ("qwen2_5_vl", "qwen3_vl")
TOOLS = ("crop_region", "reencode_clip", "reencode_dino", "reencode_sam")


@cache
def kit_of(base: str, controls: int = 1) -> Kit:
    model, processor = tiny_model(ENCODERS, controls=controls, seed=controls, base=base)
    policy = ImagePolicy.from_manifest(model.config.perception["images"])
    return Kit(model, processor.tokenizer, Engine(model, policy), policy)


# --- X2: full pass = prefill + blocks = token by token --------------------------------------------


@pytest.mark.parametrize("how", ["whole", "parts", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", NEWER)
def test_blocks_equal_the_full_pass(base: str, kind: str, how: str) -> None:
    kit = kit_of(base)
    parts = kit.conversation(kind)
    want = full_pass(kit, parts, kind)
    torch.testing.assert_close(logits(kit, parts, how), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("base", NEWER)
def test_blocks_equal_the_full_pass_with_two_control_tokens(base: str) -> None:
    kit = kit_of(base, 2)
    for kind in ENCODERS:
        parts = kit.conversation(kind)
        want = full_pass(kit, parts, kind)
        torch.testing.assert_close(logits(kit, parts, "tokens"), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("base", NEWER)
def test_fork_and_truncate_leave_the_same_state(base: str) -> None:
    kit = kit_of(base)
    parts, tail = kit.conversation("region"), [Tokens(kit.ids(" again"))]
    straight = kit.fresh().session()
    straight.append(parts)
    wanted = straight.append(tail, logits="all")
    session = kit.fresh().session()
    session.append(parts)
    length = len(session)
    session.append([kit.look(picture(9))])  # a picture, forgotten again
    session.truncate(length)
    torch.testing.assert_close(session.append(tail, logits="all"), wanted, atol=1e-5, rtol=0)
    session.truncate(length)
    forked = session.fork().append(tail, logits="all")
    torch.testing.assert_close(forked, wanted, atol=1e-5, rtol=0)


# --- X3: a batch of N = N single runs -------------------------------------------------------------


@pytest.mark.parametrize("controls", [1, 2])
@pytest.mark.parametrize("base", NEWER)
def test_mixed_batch_equals_single_runs(base: str, controls: int) -> None:
    kit = kit_of(base, controls)
    single = []
    for seed, kind in enumerate(KINDS):
        engine = kit.fresh()
        run = story(engine.session(), kit, kit.conversation(kind, seed), 7 + seed, 5 + 3 * seed)
        single.append(engine.drive([run])[0])
    engine = kit.fresh()
    together = engine.drive(runs(kit, engine))
    for (one_logits, one_ids), (many_logits, many_ids) in zip(single, together, strict=True):
        torch.testing.assert_close(many_logits, one_logits, atol=1e-4, rtol=0)
        assert many_ids == one_ids
    assert max(engine.counters.rows_per_forward) >= 4


@pytest.mark.parametrize("base", NEWER)
def test_rows_apart_in_the_pool_share_a_forward(base: str) -> None:
    """Rows 0 and 2 of one length: no mask is made, and the row between them is not seen."""
    kit = kit_of(base)
    engine = kit.fresh()
    sessions = [engine.session() for _ in range(3)]
    stories = [kit.conversation(kind, 1) for kind in ("clip", "text", "clip")]
    engine.drive([s.feed(p) for s, p in zip(sessions, stories, strict=True)])
    tail = [Tokens(kit.ids("x"))]
    fed = engine.drive([sessions[0].feed(tail), sessions[2].feed(tail)])
    alone = kit.fresh().session().append(kit.conversation("clip", 1) + tail)[-1]
    for answer in fed:
        torch.testing.assert_close(answer[-1].logits[-1], alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("base", NEWER)
def test_a_batch_of_rows_is_its_rows(base: str) -> None:
    model, processor = tiny_model(base=base)
    rows = ([("clip", "")], [], [("dino", ""), ("sam", "")])
    with torch.no_grad():
        for side in ("left", "right"):
            many = batch(model, processor, *rows, padding_side=side)
            together = model(**many, control="causal", passes="one").logits
            # The pictures of a row are numbered by the row: the one alone has the same.
            at = 1
            one = batch(model, processor, rows[0], [])
            alone = model(**one, control="causal").logits[at]
            seen, own = many["attention_mask"][at].bool(), one["attention_mask"][at].bool()
            torch.testing.assert_close(together[at][seen], alone[own], atol=1e-4, rtol=0)


# --- training: one pass = two passes --------------------------------------------------------------


@pytest.mark.parametrize("base", NEWER)
def test_one_pass_is_two(base: str) -> None:
    model, processor = tiny_model(base=base)
    model.config.gradients = "full"
    for control, rule, rows in (
        ("causal", MaskRule(), MIXED),
        ("published", MaskRule(2, 0.5, "embeddings", "row"), MIXED[:4]),
        ("causal", MaskRule(1, 1.0, "attention"), MIXED),
    ):
        inputs = batch(model, processor, *rows, padding_side="right")
        inputs |= {"control": control, "masking": rule}
        assert_same(model, {"passes": "one", "labelled_only": True}, {"passes": "two"}, **inputs)
    assert_same(model, {"passes": "full"}, {"passes": "two"}, **inputs)
    if base == "qwen3_vl":
        assert all(
            p.grad is not None and p.grad.abs().max() > 0
            for p in model.visual.deepstack_merger_list.parameters()
        )


@pytest.mark.parametrize("base", NEWER)
def test_checkpointing_eager_attention_and_remembered_pictures_change_nothing(base: str) -> None:
    model, processor = tiny_model(base=base)
    inputs = batch(model, processor, *MIXED, padding_side="right") | {"control": "causal"}
    want = model.train()(**inputs, passes="one").loss.item()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model(**inputs, passes="one").loss.item() == pytest.approx(want, abs=1e-6)
    model.gradient_checkpointing_disable()
    keys = {"image": list("abcde"), "clip": list("fgh"), "dino": list("ij"), "sam": ["k"]}
    memory = FeatureMemory(10**7)
    for _ in range(2):
        loss = model(**inputs, picture_keys=keys, memory=memory).loss
        assert loss.item() == pytest.approx(want, abs=1e-5)
    assert memory.hits
    masked = inputs | {"masking": MaskRule(1, 1.0, "attention"), "passes": "two"}
    hidden = model(**masked).loss.item()
    model.set_attn_implementation("eager")
    assert model(**inputs, passes="one").loss.item() == pytest.approx(want, abs=1e-5)
    assert model(**masked).loss.item() == pytest.approx(hidden, abs=1e-5)


@pytest.mark.parametrize("base", ["qwen2_vl", *NEWER])
def test_the_engine_runs_with_eager_attention(base: str) -> None:
    model, processor = tiny_model(("clip",), base=base)
    policy = ImagePolicy.from_manifest(model.config.perception["images"])
    kit = Kit(model, processor.tokenizer, Engine(model, policy), policy)
    parts = kit.conversation("clip")
    want = logits(kit, parts, "whole")
    model.set_attn_implementation("eager")
    for how in ("whole", "tokens"):
        torch.testing.assert_close(logits(kit, parts, how), want, atol=1e-4, rtol=0)


# --- the agent, and the way to one ----------------------------------------------------------------


def shot(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("base", NEWER)
def test_the_agent_calls_every_kind_and_batches(base: str) -> None:
    model, processor = tiny_model(ENCODERS, seed=3, base=base)
    agent = PerceptionAgent.from_model(model, processor.tokenizer)
    questions = [
        Question(f"What is it, number {i}?", shot(i), tool_choice=tool, seed=i)
        for i, tool in enumerate([*TOOLS, "none"])
    ]
    options = {"limits": Limits(new_tokens=16, rounds=2), "temperature": 1.0}
    together = agent.run_batch(questions, **options)
    for question, tool, answer in zip(questions, [*TOOLS, None], together, strict=True):
        if tool is not None:
            assert answer.calls[0].name == tool
        single = agent.run_batch([question], **options)[0]
        assert single.trace.record().ids == answer.trace.record().ids
    assert replay(together[1].trace, agent).same


@pytest.mark.parametrize("base", ["qwen2_vl", *NEWER])
def test_from_a_plain_checkpoint_to_answers(tmp_path: Path, base: str) -> None:
    plain_qwen(tmp_path / "model", base=base)
    world.save_rows(tmp_path / "rows", 6)
    rows = json.loads((tmp_path / "rows" / "rows.json").read_text())
    kept = [r for r in rows if not {"detection_images", "seg_images"} & set(r)]
    (tmp_path / "rows" / "rows.json").write_text(json.dumps(kept * 3))
    settings = world.config(
        tmp_path,
        steps=8,
        seed=1,
        model={"encoders": ["clip"], "images": {"kind": "fit", "longest": 96, "upscale": False}},
        data={"hold_out": 0, "rows": 4},
        optim={"learning_rate": 3e-3, "schedule": "constant"},
    )
    (tmp_path / "c.yaml").write_text(settings.to_yaml())
    run = CliRunner().invoke(app, ["train", str(tmp_path / "c.yaml"), "--json"])
    assert run.exit_code == 0, run.output
    lines = [json.loads(x) for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses
    before = load(tmp_path / "model", encoders=["clip"])
    after = load(tmp_path / "out" / "final")
    assert after.config.base == base
    images = after.config.perception["images"]
    assert images["patch"] == before.config.vision_config.patch_size
    changed = {
        name.split(".")[0]
        for name, value in after.state_dict().items()
        if name in (old := before.state_dict())
        and old[name].shape == value.shape
        and "projector" not in name
        and not torch.equal(old[name], value)
    }
    assert changed == {"model", "lm_head"}  # the tower rests, as published; the head is tied
    agent = PerceptionAgent.from_pretrained(tmp_path / "out" / "final", device="cpu")
    answer = agent.run(
        "Which bird?", image=shot(1), tool_choice="reencode_clip", limits=Limits(new_tokens=8)
    )
    assert answer.results[0].ok
    assert not [w for w in answer.warnings if "untrained" in w]


@pytest.mark.parametrize("base", NEWER)
def test_lora_in_bfloat16_with_checkpointing(tmp_path: Path, base: str) -> None:
    pytest.importorskip("peft")
    plain_qwen(tmp_path / "model", base=base)
    world.save_rows(tmp_path / "rows", 6)
    rows = json.loads((tmp_path / "rows" / "rows.json").read_text())
    kept = [r for r in rows if not {"detection_images", "seg_images"} & set(r)]
    (tmp_path / "rows" / "rows.json").write_text(json.dumps(kept))
    settings = world.config(
        tmp_path,
        stage="lora",
        steps=2,
        model={"encoders": ["clip"], "passes": "two"},
        data={"hold_out": 0},
        lora={"rank": 2, "alpha": 4, "also": ["clip_projector", "embed_tokens"]},
        precision="bfloat16",
        gradient_checkpointing=True,
    )
    result = train(settings)
    assert result.steps == 2
    assert result.loss > 0
    agent = PerceptionAgent.from_pretrained(result.checkpoint, device="cpu", dtype="bfloat16")
    answer = agent.run(
        "What is there?", image=shot(2), tool_choice="crop_region", limits=Limits(new_tokens=8)
    )
    assert answer.calls[0].name == "crop_region"


@perception_tool(name="closer", needs={"view", "control"})
def closer(context: ToolContext) -> View:
    """Look at the whole picture again, at a size of its own."""
    return context.require_view()


@pytest.mark.parametrize("base", NEWER)
def test_a_kind_of_ones_own_on_the_base_tower(base: str) -> None:
    model, processor = tiny_model((), base=base)
    policy = ImagePolicy.from_manifest(model.config.perception["images"])
    kind = own_kind("closer", payload="control", input_size=4 * policy.step)
    add_perception_kind(model, processor, kind, tool=closer)
    made = batch(model, processor, [("closer", "")])
    row = model.table["closer"]
    # 84 x 56 pixels at a longer side of four visual tokens.
    assert int((made["input_ids"] == row.placeholder).sum()) == 12
    with torch.no_grad():
        want = model(**made, control="causal").logits[0]
    engine = Engine(model, policy)
    pad, ids = model.config.image_token_id, made["input_ids"][0].tolist()
    first, again = ids.index(pad), ids.index(row.placeholder)
    (shown,) = engine.look("base", [picture_view(100, 56, 56)])
    (closely,) = engine.look("closer", [picture_view(1, 84, 56)])
    assert shown.grid is not None
    session = engine.session()
    session.append([Tokens(ids[:first])])
    session.append([Visual(pad, shown.tokens, shown.grid)])
    session.append([Tokens(ids[first + len(shown.tokens) : again])])
    got = session.append(
        [
            Unconditioned(row.placeholder, closely.tokens, "closer"),
            Tokens(ids[again + len(closely.tokens) :]),
        ],
        logits="all",
    )
    torch.testing.assert_close(got, want[again:], atol=1e-4, rtol=0)


def picture_view(seed: int, width: int, height: int) -> View:
    return load_views(batch_picture(seed, width, height))[0]
