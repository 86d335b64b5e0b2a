"""X3 in bfloat16: more rows round otherwise, so the tolerance is of the largest logit."""

from __future__ import annotations

import torch

from tests.unit.engine.conftest import ENCODERS, KINDS, Kit
from vpt_agent.engine.core import Engine
from vpt_agent.model.testing import tiny_model
from vpt_agent.vision.policy import ImagePolicy

TOLERANCE = 0.05


def test_a_batch_in_bfloat16_is_near_its_single_runs() -> None:
    model, processor = tiny_model(encoders=ENCODERS, seed=4)
    policy = ImagePolicy(kind="fit", longest=84, crop_longest=56)
    half = model.eval().to(torch.bfloat16)
    kit = Kit(half, processor.tokenizer, Engine(half, policy), policy)
    alone = [kit.fresh().session().append(kit.conversation(k, i)) for i, k in enumerate(KINDS)]
    engine = kit.fresh()
    feeds = [engine.session().feed(kit.conversation(k, i)) for i, k in enumerate(KINDS)]
    together = engine.drive(feeds)
    assert max(engine.counters.rows_per_forward) >= 3, "rows did share passes"
    for fed, wanted in zip(together, alone, strict=True):
        logits = torch.cat([f.logits for f in fed if f.logits is not None])[-1]
        apart = (logits - wanted[-1]).abs().max() / wanted.abs().max()
        assert float(apart) < TOLERANCE
