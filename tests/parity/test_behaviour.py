"""How the release behaves (golden/behaviour.json), entry by entry: the same, or better.

Where the release crashes or goes silently wrong, ours works or gives one clear error. The table in
``behaviour.py`` says which test answers for each entry; an entry without one fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.parity.behaviour import (
    ACCOUNT,
    BEHAVIOUR,
    CONTROL,
    DINO_MOVED,
    ENCODERS,
    END,
    IM_END,
    IM_START,
    KINDS,
    SEEDS,
    START,
    TOLERANCE,
    TWO_RUN1,
    join,
)
from tests.parity.goldens import ROOT, golden
from tests.parity.test_generation import generate, rows_of
from vpt_agent.data import RowEncoder, read_row, row_views
from vpt_agent.engine.core import Engine
from vpt_agent.engine.decode import TurnRules, decode_turn
from vpt_agent.engine.parts import Tokens
from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.model.masking import zeroed_positions
from vpt_agent.model.tokenizer import load_tokenizer
from vpt_agent.prompt.vpt import VPTLayout
from vpt_agent.tokens import Grammar, PerceptionTable
from vpt_agent.types import Box, View
from vpt_agent.vision import PUBLISHED_POLICY, ImagePolicy, dino_pixels, sam_pixels


def test_every_entry_is_accounted_for() -> None:
    assert set(ACCOUNT) == set(BEHAVIOUR)
    root = Path(__file__).parents[2]
    for answer in set(ACCOUNT.values()):
        file, _, name = answer.rpartition("::")
        source = (root / file if file else Path(__file__)).read_text(encoding="utf-8")
        assert f"def {name}(" in source, answer


@cache
def _model(variant: str) -> VPTForConditionalGeneration:
    return VPTForConditionalGeneration.from_pretrained(golden(variant).path).eval()


@pytest.fixture
def model_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., VPTForConditionalGeneration]:
    """A golden model, with config fields set for one test."""

    def get(variant: str, **config: object) -> VPTForConditionalGeneration:
        model = _model(variant)
        for name, value in config.items():
            monkeypatch.setattr(model.config, name, value)
        return model

    with torch.no_grad():
        yield get


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# --- decoding ------------------------------------------------------------------------------


def decode(*forced: dict[int, int], case: str = "gen_r1_b2") -> tuple[list[list[int]], Tensor]:
    """Ten greedy steps of the rows of ``case`` together, ``forced`` ids by step for each."""
    engine = Engine(_model("clip_tied"), ImagePolicy())
    rows = list(rows_of(case, golden("clip_tied"), engine))
    pairs = zip(rows, forced, strict=True)
    done = engine.drive([generate(engine.session(), parts, 10, f) for parts, f in pairs])
    return [ids for ids, _ in done], torch.stack([logits for _, logits in done])


def call_at(step: int) -> dict[int, int]:
    return {step: START, step + 1: CONTROL}


def test_rows_may_call_at_any_step() -> None:
    assert BEHAVIOUR["batch2_action_staggered_by_1_step"] == "RuntimeError"
    by_two = BEHAVIOUR["batch2_action_staggered_by_2_steps"]
    assert decode(call_at(2), call_at(4))[0] == by_two
    assert decode(call_at(2), {})[0] == BEHAVIOUR["batch2_action_only_in_row0"]
    first, second = decode(call_at(2), call_at(3))[0]
    assert first == by_two[0]
    # The second row alone would say the same.
    assert second == decode({}, call_at(3))[0][1]
    assert second[3:5] == [START, CONTROL]


def test_rows_do_not_touch_each_other() -> None:
    _, together = decode(call_at(2), {})
    _, apart_from_calls = decode({}, {})
    assert apart(together[1], apart_from_calls[1]) < TOLERANCE
    _, alone = decode(call_at(2), case="gen_r1")
    assert apart(together[0], alone[0]) < TOLERANCE


def test_rows_of_different_lengths_need_no_padding() -> None:
    files = golden("clip_tied")
    mask = files.inputs("gen_r2_b2")["attention_mask"]
    assert (mask == 0).sum(1).tolist() == BEHAVIOUR["gen_r2_b2_left_pad_per_row"]
    engine = Engine(_model("clip_tied"), ImagePolicy())
    sessions = [engine.session() for _ in range(2)]
    rows = rows_of("gen_r2_b2", files, engine)
    engine.drive([s.feed(parts) for s, parts in zip(sessions, rows, strict=True)])
    assert [len(s) for s in sessions] == mask.sum(1).tolist()


def turn_after_start(max_new_tokens: int) -> tuple[list[int], list[Any]]:
    """A turn that must begin with the start token, of a model that wants to say its end at once."""
    engine = Engine(_model("clip_tied"), ImagePolicy())
    session = engine.session()
    (parts,) = rows_of("gen_r1", golden("clip_tied"), engine)
    logits = session.append([*parts, Tokens([319, 199])])[-1]
    rules = TurnRules(
        grammar=Grammar(engine.table),
        end=IM_END,
        stop=frozenset({IM_END}),
        starts=frozenset({START}),
        first=frozenset({START}),
        banned=frozenset(range(len(logits))) - {IM_END},
        max_new_tokens=max_new_tokens,
        max_calls=4,
    )
    (turn,) = engine.drive([decode_turn(session, logits, Sampler(Sampling()), rules)])
    return [i for span in turn.spans for i in span.ids], turn.items


def test_a_call_that_began_is_completed() -> None:
    case = BEHAVIOUR["start_then_eos"]
    assert case["new_ids"][2:] == [START, case["im_end"]], "the release ends inside the call"
    ids, items = turn_after_start(20)
    assert ids[:3] == [START, case["action"], END]
    assert set(ids[3:]) <= {IM_END}
    assert [item.parsed.kind for item in items] == ["clip"]


@pytest.mark.parametrize("limit", [1, 2])
def test_the_length_limit_leaves_no_wrong_token(limit: int) -> None:
    assert BEHAVIOUR["start_then_wrong_token_at_length_limit"][-1] not in (CONTROL, END)
    ids, items = turn_after_start(limit)
    assert ids == [START, CONTROL][:limit]
    assert not [item for item in items if hasattr(item, "parsed")], "no call was completed"


def test_one_cache_and_no_cache_give_the_same(
    model_of: Callable[..., VPTForConditionalGeneration],
) -> None:
    assert BEHAVIOUR["static_cache_generate"] == "NameError"
    wanted = BEHAVIOUR["with_cache"]
    assert wanted == BEHAVIOUR["use_cache_false_generate"]
    (ids,), _ = decode(call_at(2), case="gen_r1")  # the engine's pool has a fixed size
    assert ids == wanted
    model = model_of("clip_tied", positions="mrope", num_inner_forward_run=2, para_mask_id=0)
    inputs = golden("clip_tied").inputs("gen_r1")
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([wanted])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    said = model(**inputs).logits[0, length - 1 : -1].argmax(-1).tolist()
    assert [i for step, i in enumerate(said) if step not in (2, 3)] == wanted[:2] + wanted[4:]


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}]
)
def test_transformers_generation_is_refused(
    options: dict[str, Any], model_of: Callable[..., VPTForConditionalGeneration]
) -> None:
    assert BEHAVIOUR["beam_search_2"] == [1, 70], "the release gives ids, but runs no call"
    inputs = golden("clip_tied").inputs("gen_r1")
    with pytest.raises(UserError, match=r"generate\(\) cannot run perception calls.*Perception"):
        model_of("clip_tied").generate(**inputs, **options)


@pytest.mark.parametrize("enc", ENCODERS)
def test_decoding_and_prefill_agree(
    enc: str, model_of: Callable[..., VPTForConditionalGeneration], figures: Callable[..., None]
) -> None:
    files, model = golden(f"{enc}_tied"), model_of(f"{enc}_tied", para_mask_id=0)
    engine = Engine(model, ImagePolicy())
    (parts,) = rows_of("gen_r1", files, engine)
    said = {0: START, 1: CONTROL, 2: END, 3: IM_END}
    ((_, steps),) = engine.drive([generate(engine.session(), parts, 4, said)])
    inputs = files.inputs("gen_r2")
    first = files.inputs("gen_r1")["input_ids"].shape[1]
    prefill = model(**inputs, position_ids=files.mrope("gen_r2")).logits[0, first - 1 : first + 3]
    difference = apart(steps, prefill)
    figures("round-1 decoding and round-2 prefill, logits", kind=enc, ours=difference,
            release=BEHAVIOUR[f"{enc}_tied: max |round-1 step logits - round-2 prefill logits|"
                              " over the 4 steps"])  # fmt: skip
    assert difference < TOLERANCE


# --- prompts and inputs --------------------------------------------------------------------


@pytest.mark.parametrize("enc", ENCODERS)
def test_prompt_of_round_two(enc: str) -> None:
    table = PerceptionTable.published([enc])
    tokenizer, added = load_tokenizer(str(golden(f"{enc}_tied").path), table)
    assert not added
    encoder = RowEncoder(VPTLayout(tokenizer, table), PUBLISHED_POLICY)
    kind = table[enc]
    ask = "<image>\nWhat color is the cat?"
    call = f"{kind.start}{kind.control}{kind.end}"

    def prompt(*texts: str) -> list[int]:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        again = {f"{KINDS[enc]}_images": ["a.png"]} if len(texts) > 2 else {}
        row = read_row({"messages": messages, "images": ["a.png"], **again})
        return encoder.prompt(row, row_views(row, folder=ROOT / "images")).record.ids

    first, second = prompt(ask, ""), prompt(ask, call, kind.tag, "")
    assert second[: len(first)] == first
    assert second[len(first) :][:4] == [START, CONTROL, END, IM_END]
    for case in ("gen_r1", "gen_r2"):  # and so it is in the release's own inputs
        inputs = golden(f"{enc}_tied").inputs(case)["input_ids"][0].tolist()
        mine = prompt(f"{ask} {kind.trigger}", "") if case == "gen_r1" else prompt(
            f"{ask} {kind.trigger}", call, kind.tag, "")  # fmt: skip
        assert inputs == mine


def picture(width: int, height: int) -> View:
    size = (width, height)
    return View("v", Image.effect_noise(size, 80).convert("RGB"), "v", Box(0, 0, *size), size)


def test_encoder_inputs() -> None:
    for size, detection, seg in zip(
        [(640, 480), (1024, 768)],
        BEHAVIOUR["dino processor output"],
        BEHAVIOUR["sam processor output"],
        strict=True,
    ):
        assert list(dino_pixels(picture(*size), PUBLISHED_POLICY)[None].shape) == detection
        assert list(sam_pixels(picture(*size), PUBLISHED_POLICY)[None].shape) == seg
    value, rows, columns = BEHAVIOUR["sam padding value / valid rows"]
    pixels = sam_pixels(picture(1024, 768), PUBLISHED_POLICY)
    assert torch.all(pixels[:, rows:] == value)
    assert pixels.shape[2] == columns
    assert not torch.any(torch.all(pixels[:, :rows] == value, dim=0).all(dim=1))


def test_published_positions_count_up(
    model_of: Callable[..., VPTForConditionalGeneration],
) -> None:
    assert BEHAVIOUR["train_positions_are_arange_maxdiff"] == 0
    model = model_of("clip_tied", positions="published", para_mask_id=0)
    inputs = golden("clip_tied").inputs("train_b2")
    shape = inputs["input_ids"].shape
    counted = model(**inputs, position_ids=torch.arange(shape[1]).expand(shape))
    assert torch.equal(model(**inputs).logits, counted.logits)


def test_mrope_positions(model_of: Callable[..., VPTForConditionalGeneration]) -> None:
    inputs = golden("clip_tied").inputs("train_b1")
    ids = inputs["input_ids"][0]
    positions = model_of("clip_tied").rope_positions(ids, inputs["image_grid_thw"])
    clip = _model("clip_tied").table["clip"].placeholder
    image = _model("clip_tied").config.image_token_id
    assert positions[:, ids == clip].tolist() == BEHAVIOUR["rope_index_clip_pad_positions"]
    assert positions[:, ids == image].tolist() == BEHAVIOUR["rope_index_image_pad_positions"]
    # The release counts padding into the length; a session has none, and its next token goes
    # where the rest of the difference says.
    (padding,) = (inputs["attention_mask"] == 0).sum(1).tolist()
    last = int(positions[:, : len(ids) - padding].max())
    assert last + 1 - len(ids) == BEHAVIOUR["rope_delta"][0][0]
    engine = Engine(_model("clip_tied"), ImagePolicy())
    session = engine.session()
    session.append(next(rows_of("train_b1", golden("clip_tied"), engine)))
    assert session.next_position - len(session) == BEHAVIOUR["rope_delta"][0][0] + padding


# --- the forward of training ---------------------------------------------------------------


def test_the_projector_is_the_formula(
    model_of: Callable[..., VPTForConditionalGeneration],
) -> None:
    assert BEHAVIOUR["clip_projector_no_condition_is_identity"] is True
    model, inputs = model_of("clip_tied"), golden("clip_tied").inputs("train_b1")
    seen = (inputs["clip_pixel_values"], inputs["clip_images_grid_thw"])
    (tokens,) = model.encode_images(*seen)
    (features,) = model.encode("clip", pixel_values=seen[0], grid_thw=seen[1])
    assert torch.equal(features, tokens)
    control = torch.randn(1, tokens.shape[1], generator=torch.Generator().manual_seed(0))
    c = model.projector("clip").condition(control[None])[0]  # [D]
    want = tokens + (tokens @ c)[:, None] * c
    assert apart(model.condition("clip", tokens, control), want) < TOLERANCE


def test_a_row_without_actions_needs_one_pass(
    model_of: Callable[..., VPTForConditionalGeneration],
) -> None:
    assert BEHAVIOUR["region_run2_equals_run1"] is True
    inputs = golden("clip_tied").inputs("train_region_b1")
    two = model_of("clip_tied", num_inner_forward_run=2, para_mask_id=0)(**inputs).loss
    one = model_of("clip_tied", num_inner_forward_run=1)(**inputs).loss
    assert torch.equal(one, two)


def test_rows_with_different_numbers_of_turns(
    model_of: Callable[..., VPTForConditionalGeneration],
) -> None:
    assert BEHAVIOUR["para_mask_rows_with_5_and_7_turns"] == "RuntimeError"
    files = golden("clip_tied")
    five, seven = files.inputs("train_b1"), files.inputs("train_two_actions")
    batch = join(five, seven)
    assert (batch["input_ids"] == IM_START).sum(1).tolist() == [5, 7]
    plain = model_of("clip_tied", para_mask_id=0)(**batch)
    assert abs(float(plain.loss) - BEHAVIOUR["no_mask_rows_with_5_and_7_turns"]) < TOLERANCE
    model = model_of("clip_tied", para_mask_id=1, para_mask_ratio=1.0)
    masked = model(**batch).logits
    n = five["input_ids"].shape[1]
    assert apart(masked[0, :n], model(**five).logits[0]) < TOLERANCE
    assert apart(masked[1], model(**seven).logits[0]) < TOLERANCE
    assert apart(masked[0], plain.logits[0]) > 0.1


@pytest.mark.parametrize("mask_id", [0, 1, 2])
def test_masking_draws_as_often(
    mask_id: int, model_of: Callable[..., VPTForConditionalGeneration]
) -> None:
    model = model_of("clip_tied", para_mask_id=mask_id, para_mask_ratio=0.5)
    draws = BEHAVIOUR["rng_draws_per_forward"][f"mask_id{mask_id}"]
    torch.manual_seed(0)
    sequence = [float(torch.rand(1)) for _ in range(4)]
    torch.manual_seed(0)
    model(**golden("clip_tied").inputs("train_b2"))
    assert sequence.index(float(torch.rand(1))) == draws


@pytest.mark.parametrize("seed", sorted(BEHAVIOUR[SEEDS]))
def test_masking_by_seed(seed: str, model_of: Callable[..., VPTForConditionalGeneration]) -> None:
    drawn, loss = BEHAVIOUR[SEEDS][seed]
    model = model_of("clip_tied", para_mask_id=1, para_mask_ratio=0.5)
    torch.manual_seed(int(seed))
    assert abs(float(torch.rand(1)) - drawn) < 1e-3
    torch.manual_seed(int(seed))
    got = model(**golden("clip_tied").inputs("train_b2")).loss
    assert abs(float(got) - loss) < TOLERANCE


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask_id", [0, 1])
def test_masking_in_train_and_eval_mode(
    mask_id: int, training: bool, model_of: Callable[..., VPTForConditionalGeneration]
) -> None:
    assert BEHAVIOUR["mask_applies_in_eval_mode_too"] is True
    key = "train_b2_mask1_ratio1_loss" if mask_id else "train_b2_mask0_loss"
    model = model_of("clip_tied", para_mask_id=mask_id, para_mask_ratio=1.0)
    model.train(training)
    try:
        loss = model(**golden("clip_tied").inputs("train_b2")).loss
    finally:
        model.eval()
    assert abs(float(loss) - BEHAVIOUR[key]) < TOLERANCE


def test_what_is_masked() -> None:
    tokenizer, _ = load_tokenizer(str(golden("clip_tied").path))
    ids = golden("clip_tied").inputs("train_b1")["input_ids"]

    def masked(mask_id: int) -> set[int]:
        found = zeroed_positions(
            ids, rows=[0], spared=[], mask_id=mask_id, ratio=1.0, start_id=IM_START, end_id=IM_END
        )
        assert found is not None
        return set(found[0].nonzero().flatten().tolist())

    def text(positions: set[int]) -> str:
        return str(tokenizer.decode(ids[0, sorted(positions)]))

    first, both = masked(1), masked(2)
    assert [min(first), max(first)] == BEHAVIOUR["para_span_positions"]
    assert text(first) == BEHAVIOUR["para1_span_text"]
    shown = re.escape(BEHAVIOUR["para3_span_text"].removesuffix("<|c..."))
    assert re.match(shown, text(both - first))


def test_a_picture_that_nobody_asked_for(
    model_of: Callable[..., VPTForConditionalGeneration],
) -> None:
    assert BEHAVIOUR["clip_image_but_no_action_token"] == "AssertionError"
    inputs = golden("clip_tied").inputs("train_b1")
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == CONTROL, 5)
    with pytest.raises(UserError, match=r"no call that asked for it.*num_inner_forward_run=1"):
        model_of("clip_tied", num_inner_forward_run=2, para_mask_id=0)(**inputs)
    loss = model_of("clip_tied", num_inner_forward_run=1)(**inputs).loss
    assert abs(float(loss) - BEHAVIOUR["run1_clip_image_but_no_action_token"]) < TOLERANCE


def without_picture(enc: str) -> dict[str, Tensor]:
    """The row of ``train_b1`` up to the end of its first assistant turn: a call, no result."""
    inputs = golden(f"{enc}_tied").inputs("train_b1")
    end = int((inputs["input_ids"][0] == IM_END).nonzero()[2]) + 1
    cut = {k: inputs[k][:, :end] for k in ("input_ids", "attention_mask", "labels")}
    return cut | {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}


@pytest.mark.parametrize("enc", ["clip", "dino"])
def test_a_call_without_its_picture_takes_no_others(
    enc: str, model_of: Callable[..., VPTForConditionalGeneration]
) -> None:
    for key in ("clip_two_action_rows_one_image", "clip_two_action_rows_one_image_reversed"):
        assert BEHAVIOUR[key] == "IndexError"
    assert BEHAVIOUR[DINO_MOVED] > 9, "the release gives the picture to the other row"
    model = model_of(f"{enc}_tied", num_inner_forward_run=2, para_mask_id=0)
    shown, bare = golden(f"{enc}_tied").inputs("train_b1"), without_picture(enc)
    alone, alone_bare = model(**shown), model(**bare)
    if enc == "dino":
        assert abs(float(alone.loss) - BEHAVIOUR["dino_alone_loss"][0]) < TOLERANCE
    n = bare["input_ids"].shape[1]
    for batch, (row, other) in ((join(shown, bare), (0, 1)), (join(bare, shown), (1, 0))):
        logits = model(**batch).logits
        assert apart(logits[row], alone.logits[0]) < TOLERANCE
        assert apart(logits[other, :n], alone_bare.logits[0]) < TOLERANCE


@pytest.mark.parametrize("runs", [1, 2])
def test_an_encoder_that_the_model_lacks(
    runs: int, model_of: Callable[..., VPTForConditionalGeneration]
) -> None:
    assert BEHAVIOUR["two_encoders_in_one_batch_run2"] == "AssertionError"
    assert BEHAVIOUR[TWO_RUN1] > 10, "the release ignores the second encoder's pictures"
    inputs = golden("clip_tied").inputs("train_b1")
    inputs["detection_images"] = torch.zeros(1, 3, 224, 224)
    with pytest.raises(UserError, match=r"cannot re-encode with that kind; got: dino.*clip"):
        model_of("clip_tied", num_inner_forward_run=runs)(**inputs)
