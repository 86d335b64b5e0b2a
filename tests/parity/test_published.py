"""The baseline of the measurements is the published procedure: its tokens equal the golden
generations, and it calls the language model as often, with as many tokens, as the release did."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.parity.goldens import VARIANTS, Golden, golden
from vpt_agent.bench.published import Prompt, PublishedProcedure
from vpt_agent.model import VPTForConditionalGeneration

FORCED = {
    "gen_forced_start_action": {2: "start", 3: "control"},
    "gen_forced_start_only": {2: "start"},  # the release overwrites the next id itself
    "gen_forced_full": {0: "start", 1: "control", 2: "end", 3: "im_end"},
}
CASES = [
    (variant, case)
    for variant in VARIANTS
    for case, about in golden(variant).meta["cases"].items()
    if case.startswith("gen_") and about["prompt_shape"][0] == 1
]


@cache
def model_of(variant: str) -> VPTForConditionalGeneration:
    return VPTForConditionalGeneration.from_pretrained(golden(variant).path).eval()


def prompt_of(files: Golden, case: str) -> Prompt:
    inputs = files.inputs(case)
    looks = {}
    if "clip_pixel_values" in inputs:
        grid = inputs["clip_images_grid_thw"]
        looks["clip"] = {"pixel_values": inputs["clip_pixel_values"], "grid_thw": grid}
    for kind, name in (("dino", "detection_images"), ("sam", "seg_images")):
        if name in inputs:
            looks[kind] = {"pixels": inputs[name]}
    ids = inputs["input_ids"][0].tolist()
    return Prompt(ids, inputs["pixel_values"], inputs["image_grid_thw"], looks)


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize(("variant", "case"), CASES)
def test_the_plain_procedure_equals_the_release(variant: str, case: str, copies: bool) -> None:
    files = golden(variant)
    model = model_of(variant)
    procedure = PublishedProcedure(model, copies=copies)
    row = model.table[files.meta["settings"]["enc"]]
    end = files.meta["token_ids"]["<|im_end|>"]
    names = {"start": row.start, "control": row.control, "end": row.end, "im_end": end}
    forced = {step: names[name] for step, name in FORCED.get(case, {}).items()}
    wanted = files.expected[f"{case}/ids"][0].tolist()
    done = procedure.generate(prompt_of(files, case), len(wanted), forced=forced)
    assert done.ids == wanted
    logits = files.expected[f"{case}/step_logits"][0]
    assert (torch.stack(done.logits)[: len(logits)] - logits).abs().max() < 1e-4
    about = files.meta["cases"][case]
    released = [(call["q_len"], call["past_len"]) for call in about["lm_forward_calls"]]
    assert done.forwards == released
    assert sum(count for count, _ in done.forwards) == about["lm_tokens_total"]
