"""X1 in bfloat16: the release's figures are float32, so the tolerance is of the largest logit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.parity.goldens import golden
from vpt_agent.model import VPTForConditionalGeneration

TOLERANCE = 0.1
"""Of the largest logit; and of the loss 0.01 of its value. The tiny random models round more than
trained ones: their logits are near each other, and no layer brings errors back."""


@pytest.mark.parametrize("variant", ["clip_tied", "dino_tied"])
def test_forward_in_bfloat16_stays_near_the_release(
    variant: str, figures: Callable[..., None]
) -> None:
    gold = golden(variant)
    model = VPTForConditionalGeneration.from_pretrained(gold.path, dtype=torch.bfloat16)
    for case, about in gold.meta["cases"].items():
        if "run2_mask0" not in about.get("modes", {}):
            continue
        model.config.para_mask_id = 0
        with torch.no_grad():
            output = model(**gold.inputs(case))
        columns = gold.expected[f"{case}/logit_positions"].long()
        wanted = gold.value(case, "run2_mask0", "logits")
        assert wanted is not None
        apart = (output.logits[:, columns] - wanted).abs().max() / wanted.abs().max()
        loss = gold.expected[f"{case}/run2_mask0/loss"]
        lost = (output.loss - loss).abs().max() / loss
        figures(
            "parity in bfloat16", case=f"{variant}/{case}", logits=float(apart), loss=float(lost)
        )
        assert float(apart) < TOLERANCE
        assert float(lost) < 0.01
