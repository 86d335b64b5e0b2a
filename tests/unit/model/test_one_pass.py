"""One pass, two passes, attention masks, pictures encoded once: the same function each time."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests.unit.model.batches import NO_PICTURE, batch
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.forward import _attention_mask
from vpt_agent.model.masking import MaskRule, hidden_stretches
from vpt_agent.model.memory import FeatureMemory
from vpt_agent.model.testing import tiny_model

MIXED = (
    [("clip", "")],
    [],
    [("dino", ""), ("sam", "")],
    [("clip", NO_PICTURE)],
    [("clip", ""), ("clip", ""), ("dino", "")],
)


@cache
def parts(controls: int = 1) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    model, processor = tiny_model(controls=controls)
    model.config.gradients = "full"
    return model, processor


def step(
    model: VPTForConditionalGeneration, **inputs: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**inputs).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


def assert_same(model: VPTForConditionalGeneration, one: Any, two: Any, **inputs: Any) -> None:
    loss_one, grads_one = step(model, **inputs, **one)
    loss_two, grads_two = step(model, **inputs, **two)
    assert loss_one == pytest.approx(loss_two, abs=1e-5)
    assert grads_one.keys() == grads_two.keys()
    for name, grad in grads_one.items():
        torch.testing.assert_close(grad, grads_two[name], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("controls", [1, 2])
@pytest.mark.parametrize("control", ["causal", "published"])
@pytest.mark.parametrize(
    "rule",
    [
        MaskRule(),
        MaskRule(1),
        MaskRule(2, 0.5, "embeddings", "row"),
        MaskRule(1, 1.0, "attention"),
        MaskRule(1, 0.5, "attention", "row"),
    ],
    ids=str,
)
def test_one_pass_is_two(controls: int, control: str, rule: MaskRule) -> None:
    model, processor = parts(controls)
    rows = MIXED if control == "causal" else MIXED[:4]
    inputs = batch(model, processor, *rows, padding_side="right")
    inputs |= {"control": control, "masking": rule}
    assert_same(model, {"passes": "one", "labelled_only": True}, {"passes": "two"}, **inputs)


def test_two_full_passes_are_the_same_function() -> None:
    model, processor = parts()
    inputs = batch(model, processor, *MIXED, padding_side="right")
    assert_same(model, {"passes": "full"}, {"passes": "two"}, **inputs)
    plain = batch(model, processor, [], [], padding_side="right")
    assert_same(model, {"passes": "full"}, {"passes": "one"}, **plain)


def test_rows_padded_on_the_left_go_the_ordinary_way() -> None:
    model, processor = parts()
    inputs = batch(model, processor, *MIXED, padding_side="left")
    assert_same(model, {"passes": "one"}, {"passes": "two"}, **inputs)


def test_gradient_checkpointing_and_eager_attention_change_nothing() -> None:
    model, processor = tiny_model()
    model.config.gradients = "full"
    inputs = batch(model, processor, *MIXED, padding_side="right") | {"control": "causal"}
    plain = step(model.train(), **inputs, passes="one")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checked = step(model, **inputs, passes="one")
    assert checked[0] == pytest.approx(plain[0], abs=1e-6)
    for name, grad in plain[1].items():
        torch.testing.assert_close(grad, checked[1][name], atol=1e-5, rtol=1e-5, msg=name)
    model.gradient_checkpointing_disable()
    model.set_attn_implementation("eager")
    assert step(model, **inputs, passes="one")[0] == pytest.approx(plain[0], abs=1e-5)


def test_attention_masks_leave_the_control_state_as_the_only_way() -> None:
    model, processor = parts()
    inputs = batch(model, processor, [("clip", "")], padding_side="right")
    ids = inputs["input_ids"]
    at = int((ids[0] == model.table["clip"].control).nonzero())
    hidden = hidden_stretches(
        ids,
        first_controls={0: at},
        rule=MaskRule(1, 1.0, "attention"),
        start_id=model.config.para_start_id,
        end_id=model.config.para_end_id,
    )
    ((first, end),) = hidden.values()
    second = (ids[0] == model.config.para_start_id).nonzero()[1]
    assert (first, end) == (int(second) + 1, at)  # the question, and all up to the call
    n = ids.shape[1]
    seen = _attention_mask(torch.zeros(1, n, 8), None, hidden)[0, 0]
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    assert not seen[at:, first:at].any()
    assert torch.equal(seen[:at], causal[:at])
    assert torch.equal(seen[at:, at:], causal[at:, at:])
    assert torch.equal(seen[at:, :first], causal[at:, :first])
    with torch.no_grad():
        free = model(**inputs).logits
        shut = model(**inputs, masking=MaskRule(1, 1.0, "attention")).logits
    assert torch.allclose(free[:, :at], shut[:, :at], atol=1e-5)
    assert not torch.allclose(free[:, at + 1 :], shut[:, at + 1 :], atol=1e-3)


def test_draws_are_by_row_or_by_batch() -> None:
    model, processor = parts()
    inputs = batch(model, processor, *([("clip", "")] for _ in range(6)), padding_side="right")
    where: dict[str, set[int]] = {"row": set(), "batch": set()}
    for draw, counts in where.items():
        for seed in range(6):
            torch.manual_seed(seed)
            rule = MaskRule(1, 0.5, "attention", draw)  # type: ignore[arg-type]
            found = hidden_stretches(
                inputs["input_ids"],
                first_controls=dict.fromkeys(range(6), 200),
                rule=rule,
                start_id=model.config.para_start_id,
                end_id=model.config.para_end_id,
            )
            counts.add(len(found))
    assert where["batch"] == {0, 6}
    assert where["row"] - {0, 6}


def test_the_same_picture_is_encoded_once() -> None:
    model, processor = parts()
    inputs = batch(model, processor, [("clip", ""), ("dino", "")], [("clip", "")])
    calls: list[int] = []
    encode = model.encode_images

    def counted(pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        calls.append(len(grid_thw))
        return encode(pixel_values, grid_thw)

    with torch.no_grad():
        want = model(**inputs).loss
        model.encode_images = counted  # type: ignore[method-assign]
        keys = {"image": ["a", "b"], "clip": ["c", "d"], "dino": ["e"]}
        memory = FeatureMemory(10**7)
        try:
            for _ in range(2):
                got = model(**inputs, picture_keys=keys, memory=memory).loss
                assert float(got) == pytest.approx(float(want), abs=1e-6)
            assert calls == [2, 2]  # nothing the second time
            small = FeatureMemory(1)
            model(**inputs, picture_keys=keys, memory=small)
            assert small.used == 0
            with pytest.raises(UserError, match=r"keys differ in number.*1 keys, 2 pictures"):
                model(**inputs, picture_keys={"image": ["a"]})
        finally:
            del model.encode_images


def test_what_cannot_be_is_said() -> None:
    model, processor = parts()
    inputs = batch(model, processor, [("clip", "")])
    with pytest.raises(UserError, match=r"no such number of passes; got: three"):
        model(**inputs, passes="three")
    without = {k: v for k, v in inputs.items() if k != "labels"}
    with pytest.raises(UserError, match=r"labelled_only needs labels"):
        model(**without, labelled_only=True)
    with pytest.raises(UserError, match=r"no such mask.*mask_id 3"):
        MaskRule(3)
    with pytest.raises(UserError, match=r"hide the question only"):
        MaskRule(2, how="attention")
