"""The last layer only where its states are read: the same losses and gradients, fewer queries."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.model.batches import batch
from tests.unit.model.test_one_pass import MIXED, assert_same, parts, step
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.model.lastlayer import asked
from vpt_agent.model.masking import MaskRule


@pytest.fixture
def queries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of a row that the last layer's MLP got, call by call."""
    model, _ = parts(1)
    seen: list[int] = []
    mlp = type(model.model.layers[-1].mlp)
    plain = mlp.forward
    last = {id(parts(n)[0].model.layers[-1].mlp) for n in (1, 2)}

    def counted(self: Any, x: torch.Tensor) -> Any:
        if id(self) in last:
            seen.append(x.shape[1])
        return plain(self, x)

    monkeypatch.setattr(mlp, "forward", counted)
    return seen


def few(inputs: dict[str, Any], keep: int = 3) -> dict[str, Any]:
    """The same batch with the last labels of each row only, and none in the second one."""
    labels = inputs["labels"].clone()
    for number, row in enumerate(labels):
        known = (row != -100).nonzero().flatten()
        row[known[: -keep or None]] = -100
        if number == 1:
            row[:] = -100
    return inputs | {"labels": labels}


@pytest.mark.parametrize("controls", [1, 2])
@pytest.mark.parametrize("control", ["causal", "published"])
@pytest.mark.parametrize(
    "rule",
    [MaskRule(), MaskRule(2, 0.5, "embeddings", "row"), MaskRule(1, 0.5, "attention", "row")],
    ids=str,
)
def test_a_narrow_last_layer_is_the_same_function(
    controls: int, control: str, rule: MaskRule, queries: list[int]
) -> None:
    model, processor = parts(controls)
    rows = MIXED if control == "causal" else MIXED[:4]
    inputs = few(batch(model, processor, *rows, padding_side="right"))
    inputs |= {"control": control, "masking": rule}
    assert_same(model, {"passes": "one", "labelled_only": True}, {"passes": "two"}, **inputs)
    length = inputs["input_ids"].shape[1]
    narrow = [n for n in queries if n < length // 4]
    assert len(narrow) >= 2  # before the control tokens, and behind them


def test_rows_without_calls_are_narrowed_too(queries: list[int]) -> None:
    model, processor = parts(1)
    inputs = few(batch(model, processor, [], [], [], padding_side="right"))
    assert_same(model, {"passes": "one", "labelled_only": True}, {"passes": "full"}, **inputs)
    assert queries[0] == 3


def test_a_hooked_or_changed_layer_runs_as_transformers_has_it(queries: list[int]) -> None:
    model, processor = parts(1)
    inputs = few(batch(model, processor, *MIXED, padding_side="right"))
    wanted = step(model, **inputs, passes="one", labelled_only=True)
    narrowed = list(queries)
    queries.clear()
    hook = model.model.layers[-1].register_forward_hook(lambda *_: None)
    try:
        loss, _ = step(model, **inputs, passes="one", labelled_only=True)
    finally:
        hook.remove()
    assert loss == pytest.approx(wanted[0], abs=1e-6)
    assert min(queries) > max(narrowed)


def test_autocast_gives_the_same_loss_to_its_rounding() -> None:
    model, processor = parts(1)
    inputs = few(batch(model, processor, *MIXED, padding_side="right"))
    exact = step(model, **inputs, passes="full")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = step(model, **inputs, passes="one", labelled_only=True)[0]
    assert rounded == pytest.approx(exact, rel=0.05)


def test_which_columns_are_asked_for() -> None:
    wanted = torch.zeros(3, 8, dtype=torch.bool)
    wanted[0, [1, 5]] = True
    wanted[2, 7] = True
    assert asked(wanted).tolist() == [[1, 5], [-1, -1], [7, -1]]
    assert asked(torch.zeros(2, 4, dtype=torch.bool)).tolist() == [[-1], [-1]]
    assert asked(torch.ones(2, 4, dtype=torch.bool)) is None


def test_the_states_of_a_narrow_pass_are_those_of_a_whole_one() -> None:
    model: VPTForConditionalGeneration
    model, processor = parts(1)
    inputs = few(batch(model, processor, *MIXED, padding_side="right"))
    with torch.no_grad():
        one = model(**inputs, passes="one", labelled_only=True)
        two = model(**inputs)
    here = inputs["labels"][:, 1:] != -100
    assert torch.allclose(one.logits, two.logits[:, :-1][here], atol=1e-5)
    assert torch.allclose(one.controls, two.controls, atol=1e-5)
