"""The whole-sequence forward beyond the golden cases, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.unit.model.batches import NO_PICTURE, batch
from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.masking import zeroed_positions
from vpt_agent.model.matching import find_calls
from vpt_agent.model.modeling import token_mean_loss
from vpt_agent.model.testing import tiny_model

Made = tuple[VPTForConditionalGeneration, VPTProcessor]
KINDS = ("clip", "dino", "sam")


@pytest.fixture(scope="module")
def shared() -> Made:
    return tiny_model()


@pytest.fixture
def made(shared: Made) -> Iterator[Made]:
    """The shared model with its config as it was."""
    config = shared[0].config
    kept = (config.num_inner_forward_run, config.positions, config.control, config.para_mask_id)
    yield shared
    (config.num_inner_forward_run, config.positions, config.control, config.para_mask_id) = kept


@pytest.mark.parametrize("kind", KINDS)
def test_one_call_is_the_same_under_both_rules(made: Made, kind: str) -> None:
    model, processor = made
    inputs = batch(model, processor, [(kind, "")])
    with torch.no_grad():
        one, other = (model(**inputs, control=rule) for rule in ("published", "causal"))
    assert torch.allclose(one.logits, other.logits, atol=1e-5)
    assert one.loss == pytest.approx(float(other.loss), abs=1e-5)


def test_later_calls_see_earlier_ones_under_the_causal_rule(made: Made) -> None:
    model, processor = made
    rows = [[("clip", ""), ("dino", "")], [("sam", "")]]
    inputs = batch(model, processor, *rows)
    with torch.no_grad():
        causal = model(**inputs, control="causal")
        published = model(**inputs, control="published")
    assert torch.allclose(causal.controls[[0, 2]], published.controls[[0, 2]], atol=1e-5)
    assert not torch.allclose(causal.controls[1], published.controls[1], atol=1e-3)
    # Cut after the first round, the first state is the only one: nothing later reaches it.
    first = batch(model, processor, [("clip", "")])
    with torch.no_grad():
        alone = model(**first, control="causal")
    assert torch.allclose(alone.controls[0], causal.controls[0], atol=1e-5)
    count = len(alone.features)
    assert torch.allclose(alone.features, causal.features[:count], atol=1e-4)


@pytest.mark.parametrize("control", ["published", "causal"])
def test_left_and_right_padding_agree(made: Made, control: str) -> None:
    model, processor = made
    rows = [[("clip", "")], [("dino", ""), ("sam", "")], []]
    with torch.no_grad():
        right, left = (
            model(**inputs, control=control).logits[inputs["attention_mask"].bool()]
            for inputs in (
                batch(model, processor, *rows, padding_side="right"),
                batch(model, processor, *rows, padding_side="left"),
            )
        )
    assert torch.allclose(right, left, atol=1e-4)


def test_gradients_by_finite_differences(made: Made) -> None:
    """The published gradients run through both passes, and the state is not detached."""
    model, processor = made
    inputs = batch(model, processor, [("dino", "")])
    weight = model.projector("dino").linear_condition.weight
    model.zero_grad()
    model(**inputs).loss.backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    slope = float((weight.grad * direction).sum())
    step, losses = 1e-3, []
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * step * direction
            losses.append(float(model(**inputs).loss))
            weight -= sign * step * direction
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=0.05, abs=1e-4)


def test_alignment_leaves_calls_alone(made: Made) -> None:
    model, processor = made
    model.config.num_inner_forward_run = 1
    inputs = batch(model, processor, [("dino", "")])
    with torch.no_grad():
        output = model(**inputs)
        plain = model.encode("dino", pixels=inputs["detection_images"])
    assert output.controls is None
    assert torch.allclose(output.features, plain[0], atol=1e-6)


def test_kinds_by_name_are_the_published_arguments(made: Made) -> None:
    model, processor = made
    inputs = batch(model, processor, [("dino", ""), ("clip", "")])
    with torch.no_grad():
        named = model(**inputs).logits
        again = {
            "dino": {"pixels": inputs.pop("detection_images")},
            "clip": {
                "pixel_values": inputs.pop("clip_pixel_values"),
                "grid_thw": inputs.pop("clip_images_grid_thw"),
            },
        }
        assert torch.equal(named, model(**inputs, perception_inputs=again).logits)


def test_outputs(made: Made) -> None:
    model, processor = made
    inputs = batch(model, processor, [("clip", "")])
    with torch.no_grad():
        full = model(**inputs)
        last = model(**inputs, logits_to_keep=2)
        as_tuple = model(**inputs, return_dict=False, use_cache=False)
    assert full.logits.dtype == torch.float32
    assert torch.allclose(last.logits, full.logits[:, -2:], atol=1e-6)
    assert last.loss == pytest.approx(float(full.loss), abs=1e-6)
    assert torch.equal(as_tuple[0], full.loss)
    unlabelled = {k: v for k, v in inputs.items() if k != "labels"}
    assert model(**unlabelled).loss is None
    ids, said = inputs["input_ids"][0], full.logits[0]
    by_hand = -said[:-1].log_softmax(-1).gather(1, ids[1:, None]).mean()
    assert float(full.loss) == pytest.approx(float(by_hand), abs=1e-5)
    nothing = torch.full_like(inputs["labels"], -100)
    nothing[0, 5] = 7
    only = token_mean_loss(full.logits, nothing)
    assert float(only) == pytest.approx(float(-said[4].log_softmax(-1)[7]), abs=1e-5)


def test_features_are_reused_from_the_base_tower(made: Made) -> None:
    model, processor = made
    inputs = batch(model, processor, [("clip", "")])
    look = {"pixel_values": inputs["clip_pixel_values"], "grid_thw": inputs["clip_images_grid_thw"]}
    with torch.no_grad():
        (tokens,) = model.encode_images(**look)
        (features,) = model.encode("clip", **look)
    assert torch.equal(model.features_from_base("clip", tokens), features)
    with pytest.raises(UserError, match=r"does not use the base tower.*dino.*encode\(\)"):
        model.features_from_base("dino", tokens)


def test_condition_is_the_formula(made: Made) -> None:
    """Paper section 3.3: f + (f . c) c, with c = linear(LN(control states))."""
    model, _ = made
    torch.manual_seed(1)
    features, control = torch.randn(5, 64), torch.randn(1, 64)
    projector = model.projector("sam")
    with torch.no_grad():
        c = projector.linear_condition(projector.layernorm_condition(control))[0]
        got = model.condition("sam", features, control)
        both = model.condition_many("sam", [features, features[:2]], control.expand(2, 1, 64))
    assert torch.allclose(got, features + (features @ c)[:, None] * c, atol=1e-5)
    assert torch.allclose(both, torch.cat([got, got[:2]]), atol=1e-5)
    with pytest.raises(UserError, match=r"control states of the wrong shape.*\[1, 64\]"):
        model.condition("sam", features, torch.randn(2, 64))


def test_a_boolean_mask_reaches_the_attention_as_it_is(made: Made) -> None:
    """Rows of a batch at different stages: what a mask hides has no influence at all."""
    model, _ = made
    torch.manual_seed(2)
    embeds = torch.randn(1, 6, 64)
    positions = torch.arange(6).expand(3, 1, 6)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    seen[:, 2] = False
    seen[2, 2] = True
    with torch.no_grad():
        hidden = model.run_language_model(embeds, positions, seen[None, None])
        kept = [0, 1, 3, 4, 5]
        without = model.run_language_model(embeds[:, kept], positions[:, :, kept])
    assert torch.allclose(hidden[:, kept], without, atol=1e-5)


def test_a_cache_with_and_without_a_mask(made: Made) -> None:
    model, _ = made
    torch.manual_seed(3)
    embeds = torch.randn(1, 7, 64)
    positions = torch.arange(7).expand(3, 1, 7)
    with torch.no_grad():
        whole = model.run_language_model(embeds, positions)
        cache = DynamicCache(config=model.config.text_config)
        first = model.run_language_model(embeds[:, :4], positions[:, :, :4], None, cache)
        mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None, 4:6, :6]
        block = model.run_language_model(embeds[:, 4:6], positions[:, :, 4:6], mask, cache)
        last = model.run_language_model(embeds[:, 6:], positions[:, :, 6:], None, cache)
    assert torch.allclose(torch.cat([first, block, last], dim=1), whole, atol=1e-5)


# --- what is refused ------------------------------------------------------------------------


def _no_ids(model: VPTForConditionalGeneration, inputs: dict[str, Tensor]) -> Any:
    return model(**(inputs | {"input_ids": None}))


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "no ids": (_no_ids, "forward needs input_ids"),
    "flat ids": (lambda m, i: m(i["input_ids"][0]), r"input_ids of the wrong shape.*\[B, L\]"),
    "embeddings": (
        lambda m, i: m(**i, inputs_embeds=torch.zeros(1)),
        r"cannot use this.*inputs_embeds.*run_language_model",
    ),
    "a cache": (lambda m, i: m(**i, use_cache=True), r"cannot use this.*use_cache"),
    "rule": (lambda m, i: m(**i, control="none"), r"no such control rule.*published or causal"),
    "positions": (
        lambda m, i: m(**i, position_ids=torch.zeros(2, 2)),
        r"position_ids of the wrong shape.*\(2, 2\).*\(3, 1, \d+\)",
    ),
    "no grids": (
        lambda m, i: m(**(i | {"image_grid_thw": None})),
        "pixel_values and image_grid_thw go together",
    ),
    "grids that do not fit": (
        lambda m, i: m(**(i | {"image_grid_thw": torch.tensor([[1, 2, 2]])})),
        r"patches and grids of the pictures do not fit.*36 patches.*\[\[1, 2, 2\]\]",
    ),
    "half of an input": (
        lambda m, i: m(**(i | {"clip_images_grid_thw": None})),
        r"wrong inputs for this kind's encoder.*clip.*pixel_values.*grid_thw, pixel_values",
    ),
    "another size": (
        lambda m, i: m.encode("dino", pixels=torch.zeros(1, 3, 28, 28)),
        r"wrong shape for this encoder.*dino.*\[N, 3, 56, 56\]",
    ),
    "an unknown kind": (
        lambda m, i: m.encode("depth", pixels=torch.zeros(1)),
        r"cannot re-encode with that kind.*depth.*clip, dino, sam",
    ),
    "region has no encoder": (
        lambda m, i: m.encode("region", pixels=torch.zeros(1)),
        r"cannot re-encode with that kind.*region",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(made: Made, case: str) -> None:
    model, processor = made
    call, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        call(model, batch(model, processor, [("clip", "")]))


def test_refused_sequences(made: Made) -> None:
    model, processor = made
    inputs = batch(model, processor, [("clip", "")])
    control = model.table["clip"].control
    assert control is not None
    begins = {k: v.clone() for k, v in inputs.items()}
    begins["input_ids"][0, 0] = control
    with pytest.raises(UserError, match=r"a control token needs a token before it.*row 0"):
        model(**begins)
    late = {k: v.clone() for k, v in inputs.items()}
    at = int((late["input_ids"][0] == control).nonzero())
    late["input_ids"][0, at], late["input_ids"][0, -1] = 5, control
    with pytest.raises(UserError, match=r"stands before the call that asks for it.*kind clip"):
        model(**late)
    unasked = batch(model, processor, [("clip", NO_PICTURE)])
    unasked |= {k: inputs[k] for k in ("clip_pixel_values", "clip_images_grid_thw")}
    with pytest.raises(UserError, match=r"differ in number.*clip pictures.*1 pictures, 0 places"):
        model(**unasked)


def test_half_a_call_of_two_control_tokens() -> None:
    model, _ = tiny_model(encoders=("clip",), controls=2)
    ids = torch.tensor([[5, model.table["clip"].control, 5]])
    with pytest.raises(UserError, match=r"do not come in whole calls.*a multiple of 2"):
        find_calls(ids, model.table)


def test_masking_needs_the_ids_of_paragraphs() -> None:
    with pytest.raises(UserError, match=r"ids that begin and end a paragraph.*None"):
        zeroed_positions(torch.zeros(1, 4, dtype=torch.long), rows=[0], spared=[], mask_id=1,
                         ratio=1.0, start_id=None, end_id=2)  # fmt: skip


def test_masking_ends_with_a_row_that_was_cut() -> None:
    ids = torch.tensor([[1, 5, 2, 1, 6, 6, 6]])
    zeroed = zeroed_positions(ids, rows=[0], spared=[(0, 5)], mask_id=1, ratio=1.0, start_id=1,
                              end_id=2)  # fmt: skip
    assert zeroed is not None
    assert zeroed.tolist() == [[False] * 4 + [True, False, True]]


def test_a_kind_without_shapes_for_its_encoder() -> None:
    model, _ = tiny_model(encoders=("dino",))
    config = model.config
    config.encoders = {}
    with pytest.raises(CheckpointError, match=r"no shapes for a kind's encoder.*'detection'"):
        VPTForConditionalGeneration(config)
