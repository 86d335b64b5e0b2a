"""The measured behaviour of the release, and which test answers for each entry of it."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from tests.parity.goldens import ROOT

BEHAVIOUR: dict[str, Any] = json.loads((ROOT / "behaviour.json").read_text())
TOLERANCE = 1e-4
ENCODERS = ("clip", "dino", "sam")
KINDS = {"dino": "detection", "sam": "seg", "clip": "clip"}
PAD, IM_START, IM_END, START, CONTROL, END = 376, 377, 378, 409, 410, 411

SIZES = "preprocess [w,h] -> size after image_resolution=512 -> grid_thw -> LM tokens"
SEEDS = "train_b2_mask1_ratio0.5_loss_by_seed(first rand, loss)"
TWO_RUN1 = "two_encoders_in_one_batch_run1(no error = placeholders keep raw token embeddings)"
DINO_MOVED = "dino_image_row_changed_when_action_row_without_image_comes_first_maxdiff"

ACCOUNT: dict[str, str] = {
    "batch2_action_staggered_by_1_step": "test_rows_may_call_at_any_step",
    "batch2_action_staggered_by_2_steps": "test_rows_may_call_at_any_step",
    "batch2_action_only_in_row0": "test_rows_may_call_at_any_step",
    "batch2_row1_unaffected_by_row0_action_maxdiff": "test_rows_do_not_touch_each_other",
    "row0_alone_vs_in_left_padded_batch_maxdiff_logits": "test_rows_do_not_touch_each_other",
    "gen_r2_b2_left_pad_per_row": "test_rows_of_different_lengths_need_no_padding",
    "start_then_eos": "test_a_call_that_began_is_completed",
    "start_then_wrong_token_at_length_limit": "test_the_length_limit_leaves_no_wrong_token",
    "para_mask_rows_with_5_and_7_turns": "test_rows_with_different_numbers_of_turns",
    "no_mask_rows_with_5_and_7_turns": "test_rows_with_different_numbers_of_turns",
    "rng_draws_per_forward": "test_masking_draws_as_often",
    SEEDS: "test_masking_by_seed",
    "train_b2_mask1_ratio1_loss": "test_masking_in_train_and_eval_mode",
    "train_b2_mask0_loss": "test_masking_in_train_and_eval_mode",
    "mask_applies_in_eval_mode_too": "test_masking_in_train_and_eval_mode",
    "para1_span_text": "test_what_is_masked",
    "para3_span_text": "test_what_is_masked",
    "para_span_positions": "test_what_is_masked",
    "clip_two_action_rows_one_image": "test_a_call_without_its_picture_takes_no_others",
    "clip_two_action_rows_one_image_reversed": "test_a_call_without_its_picture_takes_no_others",
    "clip_image_but_no_action_token": "test_a_picture_that_nobody_asked_for",
    "run1_clip_image_but_no_action_token": "test_a_picture_that_nobody_asked_for",
    "static_cache_generate": "test_one_cache_and_no_cache_give_the_same",
    "use_cache_false_generate": "test_one_cache_and_no_cache_give_the_same",
    "with_cache": "test_one_cache_and_no_cache_give_the_same",
    "beam_search_2": "test_transformers_generation_is_refused",
    "region_run2_equals_run1": "test_a_row_without_actions_needs_one_pass",
    "train_positions_are_arange_maxdiff": "test_published_positions_count_up",
    "rope_index_clip_pad_positions": "test_mrope_positions",
    "rope_index_image_pad_positions": "test_mrope_positions",
    "rope_delta": "test_mrope_positions",
    "clip_projector_is_h_plus_(h.c)c_maxdiff": "test_the_projector_is_the_formula",
    "clip_projector_no_condition_is_identity": "test_the_projector_is_the_formula",
    "dino_row_with_image_first_then_action_row_without_image":
        "test_a_call_without_its_picture_takes_no_others",
    "dino_action_row_without_image_first": "test_a_call_without_its_picture_takes_no_others",
    "dino_alone_loss": "test_a_call_without_its_picture_takes_no_others",
    "dino_row0_changed_by_row1_without_image_maxdiff":
        "test_a_call_without_its_picture_takes_no_others",
    DINO_MOVED: "test_a_call_without_its_picture_takes_no_others",
    "two_encoders_in_one_batch_run2": "test_an_encoder_that_the_model_lacks",
    TWO_RUN1: "test_an_encoder_that_the_model_lacks",
    SIZES: "tests/parity/test_regions.py::test_sizes_of_whole_pictures",
    "dino processor output": "test_encoder_inputs",
    "sam processor output": "test_encoder_inputs",
    "sam padding value / valid rows": "test_encoder_inputs",
    **{
        f"{enc}_tied: {entry}": test
        for enc in ENCODERS
        for entry, test in {
            "round-2 prompt starts with the round-1 prompt": "test_prompt_of_round_two",
            "next ids are start, action, end, im_end": "test_prompt_of_round_two",
            "max |round-1 step logits - round-2 prefill logits| over the 4 steps":
                "test_decoding_and_prefill_agree",
            "prompt from a first pass truncated at the start token, max diff":
                "tests/parity/test_forward.py::test_forward_equals_the_release",
        }.items()
    },
}  # fmt: skip
"""Entry → the test here, or ``file::test``, that answers for it."""


def join(*batches: dict[str, Tensor]) -> dict[str, Tensor]:
    """One batch of several: right padded, pictures one after the other."""
    fill = {"input_ids": PAD, "attention_mask": 0, "labels": -100}
    length = max(b["input_ids"].shape[1] for b in batches)
    joined = {}
    for name in dict.fromkeys(k for b in batches for k in b):
        tensors = [b[name] for b in batches if name in b]
        if name in fill:
            tensors = [
                torch.nn.functional.pad(t, (0, length - t.shape[1]), value=fill[name])
                for t in tensors
            ]
        joined[name] = torch.cat(tensors)
    return joined
