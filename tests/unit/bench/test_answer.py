"""One answer measured: both ways say the same, every pass is counted, the parts are the whole."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vpt_agent.bench.answer import (
    Loaded,
    Ours,
    Published,
    Settings,
    bench_answer,
    picture,
)
from vpt_agent.bench.forced import call_length, forced_agent, kind_of
from vpt_agent.bench.limits import Costs, Work
from vpt_agent.bench.machine import Rates
from vpt_agent.bench.published import Prompt, PublishedProcedure
from vpt_agent.bench.shapes import FORTY_M, TextShape, VisionShape, random_model
from vpt_agent.bench.split import PARTS
from vpt_agent.engine import Tokens
from vpt_agent.errors import InternalError, UserError
from vpt_agent.model.testing import tiny_model

SMALL = Settings(image=84, new_tokens=6, repeats=1, splits=1)


@pytest.fixture(scope="module", params=["clip", "dino", "sam", "region"])
def figures(request: pytest.FixtureRequest) -> dict[str, Any]:
    kind = request.param
    loaded = Loaded(*tiny_model((kind,) if kind != "region" else ("clip",)))
    return {"kind": kind} | bench_answer(loaded, Settings(**(vars(SMALL) | {"force": kind})))


def test_both_ways_say_the_same(figures: dict[str, Any]) -> None:
    assert figures["tokens_equal"]
    ours, published = figures["ours"], figures["published"]
    assert 2 * ours["tokens"] < published["tokens"]
    # Ours: the prompt; the call's start, and its rest (of a region each coordinate that the grammar
    # leaves open); the result with the call's end; each further word but the last.
    inner = ours["passes"] - 1 - 1 - (SMALL.new_tokens - 1)
    assert inner == 2 if figures["kind"] != "region" else 2 <= inner <= 6
    # Published: everything twice, each token of the call but the last by itself.
    words = 6 if figures["kind"] == "region" else 3
    assert published["passes"] == 2 * (1 + words + 1 + SMALL.new_tokens - 1)


def test_the_parts_are_the_whole(figures: dict[str, Any]) -> None:
    parts = figures["ours"]["parts"]
    assert tuple(parts) == PARTS
    assert all(seconds >= 0 for seconds in parts.values())
    assert parts["vision"] > 0
    assert parts["decode"] > 0
    assert (parts["tool"] > 0) == (figures["kind"] != "region")
    assert 0 < figures["rest"]["share"]["median"] < 1
    assert figures["rest"]["turns"] == 2
    assert set(figures["published"]["parts"]) == {
        "image", "vision", "copies", "prefill", "decode", "rest",
    }  # fmt: skip


def test_limits_and_aims(figures: dict[str, Any]) -> None:
    limits = figures["limits"]
    assert set(limits["share"]) == {"vision", "prefill", "decode", "append"}
    assert 0 < limits["share_of_all"] < 1
    assert [aim["wanted"] for aim in figures["aims"]] == [2.6, 0.02, 0.001, 0.8]
    for aim in figures["aims"]:
        better = aim["figure"] >= aim["wanted"]
        assert aim["met"] == (better if aim["at_least"] else aim["figure"] <= aim["wanted"])


def test_a_baseline_in_another_dtype_has_the_aim_of_the_fastest_dtype() -> None:
    half = Loaded(*tiny_model(("clip",)))
    half.model.to(torch.bfloat16)
    found = bench_answer(half, SMALL, baseline=Loaded(*tiny_model(("clip",))))
    assert (found["dtype"], found["baseline_dtype"]) == ("bfloat16", "float32")
    assert found["aims"][0]["wanted"] == 5.0


def test_a_model_of_several_kinds_is_measured_by_the_one_that_is_forced() -> None:
    dino = Settings(**(vars(SMALL) | {"force": "dino"}))
    found = bench_answer(Loaded(*tiny_model(("clip", "dino", "sam"))), dino)
    assert found["tokens_equal"]
    with pytest.raises(UserError, match=r"published procedure cannot compute this.*one control"):
        bench_answer(Loaded(*tiny_model(("clip",), controls=2)), SMALL)


def test_the_shape_of_a_forced_answer() -> None:
    loaded = Loaded(*tiny_model(("clip",)))
    ours = Ours(loaded, SMALL, picture(84))
    first, second = ours.run(), ours.run()
    assert [c.kind for c in first.calls] == ["clip"]
    assert first.usage.encoder_calls == second.usage.encoder_calls == 1
    assert first.usage.reused_features == 1  # clip looks through the base tower
    turns = [e for e in first.trace.events if e.type == "decoded"]
    lengths = [sum(len(s.ids) for s in e.spans) for e in turns]
    assert lengths == [call_length(ours.kind, 1), SMALL.new_tokens]
    assert first.text == second.text
    ours.close()


def test_a_kind_that_cannot_be_forced() -> None:
    model, _ = tiny_model(("clip",))
    with pytest.raises(UserError, match=r"no such perception kind.*got: sam.*region, clip"):
        kind_of(model, "sam")
    kind = type("Row", (), {"payload": "text", "name": "lookup"})()
    with pytest.raises(UserError, match=r"only calls of a fixed length.*lookup"):
        call_length(kind, 1)


def test_other_passes_than_the_published_ones_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Published, "expected_forwards", lambda self: [(1, 0)])
    with pytest.raises(InternalError, match="other passes than the published procedure"):
        bench_answer(Loaded(*tiny_model(("clip",))), SMALL)


def test_a_control_token_needs_one_before_it() -> None:
    model, _ = tiny_model(("clip",))
    control = model.table["clip"].control
    with pytest.raises(UserError, match="a control token has no token before it"):
        PublishedProcedure(model).generate(Prompt([control, 5]), 1)


def test_banned_and_stop_ids_of_the_published_procedure() -> None:
    model, _ = tiny_model(("clip",))
    procedure = PublishedProcedure(model)
    free = procedure.generate(Prompt([40, 41]), 3).ids
    banned = procedure.generate(Prompt([40, 41]), 1, banned=[free[0]]).ids
    assert banned != free[:1]
    assert procedure.generate(Prompt([40, 41]), 3, stop=frozenset({free[0]})).ids == free[:1]


def test_the_picture_is_a_jpeg_with_detail() -> None:
    image = Image.open(io.BytesIO(picture(56)))
    assert (image.format, image.size) == ("JPEG", (56, 56))
    assert picture(56) == picture(56) != picture(56, seed=1)
    assert image.convert("L").histogram().count(0) < 200


SHAPE = (TextShape(64, 3, 4, 2, 96, 600, (2, 3, 3)), VisionShape(2, 32, 2))


def test_costs_are_those_that_torch_counts() -> None:
    model, processor = random_model(*SHAPE)
    costs = Costs.of(model)
    patches, past, new = 64, 40, 30
    pixels, grid = torch.randn(patches, 1176), torch.tensor([[1, 8, 8]])
    plain = sdpa_kernel(SDPBackend.MATH)  # whose products are counted
    with plain, torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.encode_images(pixels, grid)
    assert costs.vision(patches).flops == pytest.approx(counter.get_total_flops(), rel=0.03)
    agent = forced_agent(model, processor, new_tokens=2)
    session = agent.engine.session()
    session.append([Tokens(range(past))])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        session.append([Tokens(range(new))], logits="last")
    # torch counts masked pairs of query and key as well.
    pairs = 4.0 * costs.depth * costs.width
    wanted = costs.block(new, past).flops + pairs * (new * new - new * (new + 1) / 2)
    assert wanted == pytest.approx(counter.get_total_flops(), rel=0.03)
    weights = sum(p.numel() for p in [*model.model.parameters()])
    cache = 2 * costs.depth * costs.kv_width * (past + new)
    assert costs.block(new, past).bytes == 4 * (weights + cache)  # tied: the head is the embedding
    agent.close()


def test_a_limit_is_the_longer_of_reading_and_computing() -> None:
    rates = Rates("float32", bytes_per_second=10.0, flops_per_second=100.0)
    assert Work(1000.0, 20.0).seconds(rates) == 10.0
    assert Work(100.0, 200.0).seconds(rates) == 20.0
    assert Work(1.0, 2.0) + Work(3.0, 4.0) == Work(4.0, 6.0)


def test_the_forty_million_shape() -> None:
    with torch.device("meta"):
        model, processor = random_model(*FORTY_M, device="meta")
    assert 38e6 < sum(p.numel() for p in model.parameters()) < 42e6
    assert processor.policy.plan((448, 448)).visual_tokens == 256
