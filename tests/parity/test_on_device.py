"""X1 where a device chooses the tokens: logits and greedy generations are the release's.

``VPT_TEST_DEVICE`` names the device (benchmarks/gpu.py sets it to cuda, in float32 without TF32);
without it this runs on the CPU, where the same step is made by the same code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.goldens import MODES, VARIANTS, Golden, golden
from tests.parity.test_generation import CASES, FORCED, generate, rows_of
from vpt_agent.engine import Engine, Sampler, Sampling, TurnRules, decode_turn
from vpt_agent.engine.parts import Part
from vpt_agent.engine.session import Session
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.tokens import Grammar
from vpt_agent.vision.policy import ImagePolicy

DEVICE = os.environ.get("VPT_TEST_DEVICE", "cpu")
TOLERANCE = 1e-4
FREE = [(variant, case) for variant, case in CASES if case not in FORCED]
FULL = [
    (variant, case)
    for variant in VARIANTS
    for case, about in golden(variant).meta["cases"].items()
    if "run2_mask0" in about.get("modes", {})
]
elsewhere = pytest.mark.skipif(
    DEVICE == "cpu", reason="needs an accelerator; test_forward and test_generation are for the CPU"
)


class Here(Golden):
    """Golden files with their inputs on the device."""

    def inputs(self, case: str) -> dict[str, Tensor]:
        return {name: value.to(DEVICE) for name, value in super().inputs(case).items()}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Products of float32 in float32."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@cache
def model_of(variant: str) -> VPTForConditionalGeneration:
    model = VPTForConditionalGeneration.from_pretrained(golden(variant).path, dtype=torch.float32)
    return model.to(DEVICE).eval()


@pytest.mark.gpu
@elsewhere
@pytest.mark.parametrize(("variant", "case"), FULL)
def test_logits_and_loss(variant: str, case: str) -> None:
    files, model = Here(variant), model_of(variant)
    for name, value in MODES["run2_mask0"].items():
        setattr(model.config, name, value)
    with torch.no_grad():
        output = model(**files.inputs(case))
    columns = files.expected[f"{case}/logit_positions"].long()
    wanted = files.value(case, "run2_mask0", "logits")
    assert wanted is not None
    got = output.logits[:, columns.to(DEVICE)].float().cpu()
    assert float((got - wanted).abs().max()) < TOLERANCE
    assert float((output.loss.cpu() - files.expected[f"{case}/run2_mask0/loss"]).abs()) < TOLERANCE


@pytest.mark.gpu
@elsewhere
@pytest.mark.parametrize(("variant", "case"), CASES)
def test_bare_sessions(variant: str, case: str) -> None:
    files, engine = Here(variant), Engine(model_of(variant), ImagePolicy())
    row = engine.table[files.meta["settings"]["enc"]]
    end = files.meta["token_ids"]["<|im_end|>"]
    names = {"start": row.start, "control": row.control, "end": row.end, "im_end": end}
    forced = {step: names[name] for step, name in FORCED.get(case, {}).items()}
    wanted = files.expected[f"{case}/ids"].tolist()
    runs = [
        generate(engine.session(), parts, len(wanted[0]), forced)
        for parts in rows_of(case, files, engine)
    ]
    got = engine.drive(runs)
    assert [ids for ids, _ in got] == wanted
    expected = files.expected[f"{case}/step_logits"]
    logits = torch.stack([logits[: expected.shape[1]] for _, logits in got]).cpu()
    assert float((logits - expected).abs().max()) < TOLERANCE


def turn(session: Session, parts: list[Part], rules: TurnRules) -> Iterator[Any]:
    fed = yield from session.feed(parts)
    told = yield from decode_turn(session, fed[-1].logits[-1], Sampler(Sampling()), rules)
    return [i for span in told.spans for i in span.ids], told.ahead


@pytest.mark.parametrize(("variant", "case"), FREE)
def test_tokens_that_the_device_chose(variant: str, case: str) -> None:
    files = Here(variant)
    engine = Engine(model_of(variant), ImagePolicy(), decoding="device")
    wanted = files.expected[f"{case}/ids"].tolist()
    rules = TurnRules(
        grammar=Grammar(engine.table),
        end=-1,
        stop=frozenset(),
        starts=frozenset(),
        max_new_tokens=len(wanted[0]),
        max_calls=99,
    )
    got = engine.drive(
        [turn(engine.session(), parts, rules) for parts in rows_of(case, files, engine)]
    )
    assert [ids for ids, _ in got] == wanted
    assert all(ahead == len(wanted[0]) - 1 for _, ahead in got)
