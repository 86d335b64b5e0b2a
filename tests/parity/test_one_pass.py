"""One pass is the same function: losses and gradients of the release's training forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.parity.goldens import MODES, golden, train_modes
from tests.parity.test_forward import TOLERANCE, _gradients_apart, model_of

TRAINED = [
    (variant, case, mode)
    for variant, case, mode in train_modes()
    if case.startswith(("train", "align"))
]


@pytest.mark.parametrize(("variant", "case", "mode"), TRAINED)
def test_loss_and_gradients_equal_the_release(
    variant: str, case: str, mode: str, figures: Callable[..., None]
) -> None:
    gold, model = golden(variant), model_of(variant)
    for name, value in (MODES[mode] | {"para_mask_ratio": 1.0}).items():
        setattr(model.config, name, value)
    inputs = gold.inputs(case)
    if mode.endswith("mrope"):
        inputs["position_ids"] = gold.mrope(case)
    norms = gold.meta["cases"][case]["modes"][mode].get("grad_norms")
    with torch.set_grad_enabled(bool(norms)):
        output = model(**inputs, passes="one", labelled_only=True)
    want = gold.expected[f"{case}/{mode}/loss"]
    apart = {"loss": abs(float(output.loss.detach()) - float(want))}
    if norms:
        model.zero_grad()
        output.loss.backward()
        apart["gradients"] = _gradients_apart(model, gold, f"{case}/{mode}", norms)
    figures("parity of the one-pass step", case=f"{variant}/{case}/{mode}", **apart)
    assert max(apart.values()) <= TOLERANCE, apart
