"""Bare sessions equal the golden generations: round 1, round 2, forced calls, padded batches.

Greedy, no end of sequence, no constraint, as FACTS section 14 says; left-padded rows of the
release are plain rows of different lengths here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

from tests.parity.goldens import VARIANTS, Golden, golden
from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Part, Tokens, Unconditioned, Visual
from vpt_agent.engine.session import Session
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.vision.policy import ImagePolicy

# Tokens that the release's driver forced, by step. ``start_only`` forces the start alone; the
# release then overwrites the next id with the control token, as the grammar does here.
FORCED = {
    "gen_forced_start_action": {2: "start", 3: "control"},
    "gen_forced_start_only": {2: "start", 3: "control"},
    "gen_forced_b2_same_step": {2: "start", 3: "control"},
    "gen_forced_full": {0: "start", 1: "control", 2: "end", 3: "im_end"},
}
CASES = [
    (variant, case)
    for variant in VARIANTS
    for case in golden(variant).meta["cases"]
    if case.startswith("gen_")
]


@cache
def model_of(variant: str) -> VPTForConditionalGeneration:
    return VPTForConditionalGeneration.from_pretrained(golden(variant).path).eval()


def rows_of(case: str, files: Golden, engine: Engine) -> Iterator[list[Part]]:
    """Each row of a case as parts, its padding left out."""
    inputs = files.inputs(case)
    model, kind = engine.model, files.meta["settings"]["enc"]
    row_of_kind = engine.table[kind]
    with torch.no_grad():
        pictures = iter(
            zip(
                model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"]),
                inputs["image_grid_thw"].tolist(),
                strict=True,
            )
        )
        again: Iterator[Tensor] = iter(())
        if "clip_pixel_values" in inputs:
            again = iter(
                model.encode(
                    "clip",
                    pixel_values=inputs["clip_pixel_values"],
                    grid_thw=inputs["clip_images_grid_thw"],
                )
            )
        for name in ("detection_images", "seg_images"):
            if name in inputs:
                again = iter(model.encode(kind, pixels=inputs[name]))
    image_pad = model.config.image_token_id
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        parts: list[Part] = []
        row = ids[mask.bool()].tolist()
        at = 0
        while at < len(row):
            if row[at] == image_pad:
                features, grid = next(pictures)
                parts.append(Visual(image_pad, features, tuple(grid)))
                at += len(features)
            elif row[at] == row_of_kind.placeholder:
                parts.append(Unconditioned(row_of_kind.placeholder, next(again), kind))
                at += len(parts[-1].features)
            else:
                parts.append(Tokens([row[at]]))
                at += 1
        yield parts


def generate(session: Session, parts: list[Part], steps: int, forced: dict[int, int]):
    """Greedy decoding on a bare session: ids, and raw logits [steps, vocab]."""
    fed = yield from session.feed(parts)
    ids, logits = [], []
    for step in range(steps):
        logits.append(fed[-1].logits[-1])
        ids.append(forced.get(step, int(logits[-1].argmax())))
        if step + 1 < steps:
            fed = yield from session.feed([Tokens([ids[-1]])])
    return ids, torch.stack(logits)


@pytest.mark.parametrize(("variant", "case"), CASES)
def test_greedy_session_equals_the_release(
    variant: str, case: str, figures: Callable[..., None]
) -> None:
    files = golden(variant)
    model = model_of(variant)
    engine = Engine(model, ImagePolicy())
    row = engine.table[files.meta["settings"]["enc"]]
    names = {
        "start": row.start,
        "control": row.control,
        "end": row.end,
        "im_end": files.meta["token_ids"]["<|im_end|>"],
    }
    forced = {step: names[name] for step, name in FORCED.get(case, {}).items()}
    wanted_ids = files.expected[f"{case}/ids"].tolist()
    wanted = files.expected[f"{case}/step_logits"]
    runs = [
        generate(engine.session(), parts, len(wanted_ids[0]), forced)
        for parts in rows_of(case, files, engine)
    ]
    got = engine.drive(runs)
    assert [ids for ids, _ in got] == wanted_ids
    logits = torch.stack([logits[: wanted.shape[1]] for _, logits in got])
    difference = (logits - wanted).abs().max().item()
    released = files.meta["cases"][case]["lm_tokens_total"]
    figures(
        "generation: largest difference of logits, and positions computed",
        case=f"{variant}/{case}",
        logits=difference,
        positions=engine.counters.tokens,
        published=released,
    )
    assert difference < 1e-4
    # One pass where the release made two (its padded positions counted in its favour).
    assert 2 * engine.counters.tokens <= released
