"""Weights of eight bits: which are changed, what that costs in bytes, and answers with them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vpt_agent.agent import PerceptionAgent
from vpt_agent.bench.limits import Costs
from vpt_agent.errors import MissingExtraError, UserError
from vpt_agent.model.testing import tiny_model
from vpt_agent.model.weights import check_weights, stored_bytes, use_weights
from vpt_agent.types import Limits

LIMITS = Limits(new_tokens=20)


def test_names_and_the_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unknown weights"):
        check_weights("int3")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingExtraError, match=r"torchao's, which is not installed"):
        check_weights("int8")
    check_weights("own")
    model, _ = tiny_model(("clip",))
    before = stored_bytes(model)
    use_weights(model, "own")
    assert stored_bytes(model) == before == 4 * sum(p.numel() for p in model.parameters())


def test_layers_take_a_quarter_and_answers_stay_close() -> None:
    pytest.importorskip("torchao")
    model, processor = tiny_model(("clip",), seed=4)
    ids = torch.tensor([[5, 9, 2, 11, 40]])
    with torch.inference_mode():
        exact = model(ids).logits
    plain = Costs.of(model)
    use_weights(model, "int8")
    costs = Costs.of(model)
    assert costs.head_bytes == plain.head_bytes
    # Whole numbers and a scale a row, beside norms and biases, which stay.
    assert 0.25 * plain.layer_bytes < costs.layer_bytes < 0.32 * plain.layer_bytes
    with torch.inference_mode():
        close = model(ids).logits
    assert not torch.equal(close, exact)
    assert float((close - exact).abs().max()) < 0.05 * float(exact.abs().max())
    told = []
    for way in ("host", "device"):
        agent = PerceptionAgent.from_model(model, processor.tokenizer, decoding=way)
        picture = Image.new("RGB", (84, 56), "red")
        answer = agent.run("What is it?", picture, tool_choice="reencode_clip", limits=LIMITS)
        told.append((answer.trace.record().ids, len(answer.calls)))
    assert told[0] == told[1]
    assert told[0][1] >= 1


def test_a_checkpoint_with_weights_of_eight_bits() -> None:
    pytest.importorskip("torchao")
    agent = PerceptionAgent.from_pretrained(weights="int8", device="cpu")
    plain = PerceptionAgent.from_pretrained(device="cpu")
    assert stored_bytes(agent.model) < stored_bytes(plain.model)
    with pytest.raises(UserError, match="no products of eight-bit floats"):
        PerceptionAgent.from_pretrained(weights="float8", device="cpu")


def test_a_stock_model_keeps_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    monkeypatch.setattr("vpt_agent.model.weights.check_weights", lambda name: None)
    with pytest.raises(UserError, match="are for models with perception tokens"):
        PerceptionAgent.from_pretrained(tmp_path, weights="int8", device="cpu")
