"""Rows to ids: safety of text, spans, and lengths under strict rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from vpt_agent.data import Dropped, Encoded, RowEncoder, Rules, labels_of, read_row
from vpt_agent.errors import UserError
from vpt_agent.prompt.vpt import VPTLayout
from vpt_agent.tokens import PerceptionTable, own_kind
from vpt_agent.types import Box, View
from vpt_agent.vision import PUBLISHED_POLICY

GOLDEN = Path(__file__).parents[2] / "parity" / "golden"
CALL = "<|clip_action_start|><|clip_action|><|clip_action_end|>"
REGION = "<|region_token_start|><|x_1|><|y_0|><|x_2|><|y_3|><|region_token_end|>"
WHOLE = View("image_1", Image.new("RGB", (56, 56)), "image_1", Box(0, 0, 56, 56), (56, 56))
PART = View("crop_1", Image.new("RGB", (28, 28)), "image_1", Box(0, 0, 28, 28), (56, 56), "image_1")
VIEWS = {"<image>": (WHOLE, PART), "<clip_image>": (WHOLE,)}


@cache
def layout() -> VPTLayout:
    tokenizer = AutoTokenizer.from_pretrained(str(GOLDEN / "clip_tied"))
    return VPTLayout(tokenizer, PerceptionTable.published(["clip"]))


def encoder(max_length: int = 2048, rules: Rules = "strict") -> RowEncoder:
    return RowEncoder(layout(), PUBLISHED_POLICY, max_length=max_length, rules=rules)


def row_of(*texts: str, rules: Rules = "strict") -> Any:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    lists = {
        "images": ["a"] * sum(t.count("<image>") for t in texts),
        "clip_images": ["a"] * sum(t.count("<clip_image>") for t in texts),
        "seg_images": ["a"] * sum(t.count("<seg_image>") for t in texts),
    }
    return read_row({"messages": messages} | lists, where="line 1", rules=rules)


def encode(*texts: str, max_length: int = 2048, rules: Rules = "strict") -> Encoded:
    got = encoder(max_length, rules).encode(row_of(*texts, rules=rules), VIEWS)
    assert isinstance(got, Encoded)
    return got


def text_of(ids: Sequence[int]) -> str:
    return layout().raw_text([i for i in ids if i >= 0])


def test_spans_say_what_each_token_is() -> None:
    got = encode("<image>\nq", f"see {CALL}.", "<clip_image>", "ok")
    spans = [(s.source, s.view, s.kind, s.call_id) for s in got.record.spans]
    assert spans == [
        ("given", None, None, None),
        ("visual", "image_1", None, None),
        ("given", None, None, None),
        ("sampled", None, None, None),
        ("sampled", None, "clip", "call_1"),
        ("forced", None, "clip", "call_1"),
        ("sampled", None, "clip", "call_1"),
        ("sampled", None, None, None),
        ("given", None, None, None),
        ("visual", "image_1", "clip", "call_1"),
        ("given", None, None, None),
        ("sampled", None, None, None),
    ]
    assert got.record.views == ("image_1",)
    assert text_of(got.labels) == (
        "see <|clip_action_start|><|clip_action_end|>.<|im_end|>ok<|im_end|>"
    )
    assert got.labels == labels_of(got.record, encoder().table)


def test_a_crop_belongs_to_its_region_call() -> None:
    got = encode("<image>\nq", REGION, "<image>", "ok")
    visual = [s for s in got.record.spans if s.source == "visual"]
    assert [(s.view, s.call_id, len(s.ids)) for s in visual] == [
        ("image_1", None, 4), ("crop_1", "call_1", 4)]  # fmt: skip
    assert got.record.views == ("image_1", "crop_1")


def test_a_picture_belongs_to_the_call_of_a_kind_that_shows_it() -> None:
    """By the kinds' properties: a grid kind of one's own is no ``region``, a turned picture no
    crop, and what a call answered in words leaves no claim on later pictures."""
    from vpt_agent.model import add_perception_kind
    from vpt_agent.model.testing import tiny_model
    from vpt_agent.tool import perception_tool

    @perception_tool
    def zoom(region: list[int]) -> str:
        """Look closer."""
        return ""

    @perception_tool
    def turn() -> str:
        """Turn the picture."""
        return ""

    model, processor = tiny_model(())
    own = [own_kind("zoom", payload="grid"), own_kind("turn", payload="none")]
    for kind, tool in zip(own, (zoom, turn), strict=True):
        add_perception_kind(model, processor, kind, tool=tool)
    rows = RowEncoder(VPTLayout(processor.tokenizer, processor.table), PUBLISHED_POLICY)
    where, how = own[0].call_text(region=(0, 0, 3, 3)), own[1].call_text()

    def ties(*texts: str, pictures: Sequence[View]) -> list[tuple[str | None, str | None]]:
        got = rows.encode(row_of(*texts), {"<image>": tuple(pictures)})
        assert isinstance(got, Encoded)
        return [(s.view, s.call_id) for s in got.record.spans if s.source == "visual"]

    given = ("image_1", None)
    assert ties("<image>q", where, "<image>", "ok", pictures=(WHOLE, PART)) == [
        given, ("crop_1", "call_1")]  # fmt: skip
    assert ties("<image>q", how + where, "<image><image>", "ok", pictures=(WHOLE, PART, WHOLE)) == [
        given, ("crop_1", "call_2"), ("image_1", "call_1")]  # fmt: skip
    assert ties("<image>q", how, "done", "so?", "<image>", "ok", pictures=(WHOLE, WHOLE)) == [
        given, given]  # fmt: skip


def test_text_becomes_no_token_of_ours_under_strict_rules() -> None:
    added = set(layout().tokenizer.get_added_vocab().values())
    got = encode(f"say {CALL}<|im_end|>", "no <|im_end|> <|vision_start|>")
    words = [i for i in got.labels if i >= 0]
    assert words.pop() == layout().end
    assert not added & set(words)
    assert f"say {CALL}<|im_end|><|im_end|>\n<|im_start|>assistant" in text_of(got.record.ids)
    start = encoder().table["clip"].start
    assert start not in got.record.ids
    raw = encode(f"say {CALL}", "x", rules="published")
    assert start in raw.record.ids


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("q", "<|seg_action_start|>"), r"cannot stand there; where: line 1.*<\|seg_action_start"),
        (("q", "<|clip_image_pad|>"), r"cannot stand there.*expected: calls of region, clip"),
        (("q", "<|clip_action_start|>no"), r"a call in a row cannot be read.*not well formed"),
        (("q", f"{REGION[:-20]}"), r"a call in a row cannot be read.*not well formed"),
        (("q", "<|region_token_start|><|x_9|>"), r"a call in a row cannot be read"),
        (("<seg_image>", "a"), r"a perception kind that the model does not have.*<seg_image>"),
        (("<clip_image><clip_image>", "a"), r"too few pictures.*none left for <clip_image>"),
    ],
)
def test_what_is_refused(texts: tuple[str, ...], message: str) -> None:
    row = row_of(*texts)
    with pytest.raises(UserError, match=message):
        encoder().encode(row, VIEWS)


def test_a_torn_call_is_words_under_published_rules() -> None:
    got = encode("q", "<|clip_action_start|><|clip_action|> and", rules="published")
    assert all(s.call_id is None for s in got.record.spans)
    # The label rule is by token: a control token carries no loss wherever it stands.
    assert text_of(got.labels) == "<|clip_action_start|> and<|im_end|>"


def test_answers_lose_their_tail() -> None:
    whole = encode("<image>\nq", "a b c d e f g h")
    length = len(whole.record.ids)
    for cut in (1, 3):
        got = encode("<image>\nq", "a b c d e f g h", max_length=length - cut)
        assert got.record.ids == whole.record.ids[:-cut]
        assert got.labels == whole.labels[:-cut]
        assert got.cut == cut


def test_later_turns_are_left_out_whole_with_their_pictures() -> None:
    first = encode("q", "yes")
    enc = encoder(len(first.record.ids) + 5)
    got = enc.encode(row_of("q", "yes", "<image>\nand?", "no"), VIEWS)
    assert isinstance(got, Encoded)
    assert got.record.ids == first.record.ids
    assert got.record.views == ()
    assert got.cut > 0
    assert enc.counts == {"rows": 1, "shortened": 1}


@pytest.mark.parametrize(
    ("texts", "room", "reason"),
    [
        (("<image>\nq", "yes"), 10, "prompt"),
        (("q", CALL, "<clip_image>", "ok"), -1, "call"),  # the call's end of turn
        (("q", f"{CALL} x y z", "<clip_image>", "ok"), -3, "call"),
        (("q", CALL, "<clip_image>", "ok"), 4, "call"),  # parted from its result
    ],
)
def test_rows_that_would_be_torn_are_dropped_and_counted(
    texts: tuple[str, ...], room: int, reason: str
) -> None:
    turn = encode(*texts[:2])
    enc = encoder(room if reason == "prompt" else len(turn.record.ids) + room)
    got = enc.encode(row_of(*texts), VIEWS)
    whole = len(encode(*texts).record.ids)
    assert got == Dropped(reason, whole, "line 1")  # type: ignore[arg-type]
    enc.encode(row_of("q", "a"), VIEWS)
    assert enc.counts["rows"] == 2
    assert enc.counts[f"dropped: {reason}"] >= 1


def test_no_cut_ever_tears_a_call_or_a_picture() -> None:
    texts = ("<image>\nq", "yes", "and?", f"see {REGION}", "<image>", "ok then", "so?", "a b c")
    whole = encode(*texts)
    length = len(whole.record.ids)
    kept = []
    for limit in range(1, length + 1):
        got = encoder(limit).encode(row_of(*texts), VIEWS)
        if isinstance(got, Encoded):
            kept.append(limit)
            assert len(got.record.ids) + got.cut == length
            assert got.record.ids == whole.record.ids[: len(got.record.ids)]
            for span, full in zip(got.record.spans, whole.record.spans, strict=False):
                assert span == full or span.source == "sampled"
            calls = sum(s.call_id is not None and s.source != "visual" for s in got.record.spans)
            shown = sum(s.call_id is not None and s.source == "visual" for s in got.record.spans)
            assert (calls, shown) in ((0, 0), (1, 1))
    assert kept[-1] == length
    assert 5 < len(kept) < length


def test_a_prompt_needs_room_for_its_answer() -> None:
    row = row_of("<image>\nq", "a b c")
    assert text_of(encoder().prompt(row, VIEWS).answer) == "a b c<|im_end|>"
    with pytest.raises(UserError, match=r"too long; where: line 1; got: \d+ \+ \d+ tokens"):
        encoder(20).prompt(row, VIEWS)


def test_a_length_has_tokens() -> None:
    with pytest.raises(UserError, match=r"at least one token; where: max_length; got: 0"):
        encoder(0)


def test_calls_from_outside_carry_no_loss() -> None:
    texts = ("<image>\nq", f"{REGION}{CALL}", "<image><clip_image>", "ok")
    row = row_of(*texts)
    learnt = encode(*texts)
    got = encoder().encode(replace(row, meta={"forced_calls": [1]}), VIEWS)
    assert isinstance(got, Encoded)
    assert got.record.ids == learnt.record.ids
    calls = [(s.source, s.call_id) for s in got.record.spans if s.call_id and s.view is None]
    assert calls[:2] == [("forced", "call_1"), ("sampled", "call_2")]
    assert text_of(got.labels) == ("<|clip_action_start|><|clip_action_end|><|im_end|>ok<|im_end|>")


def test_the_text_of_a_call_is_one_token_a_character() -> None:
    kind = own_kind("lookup", payload="text", pattern="[A-Z0-9]{1,4}", argument="key")
    tokenizer = AutoTokenizer.from_pretrained(str(GOLDEN / "clip_tied"))
    tokenizer.add_tokens([kind.start, kind.end])
    own = VPTLayout(tokenizer, PerceptionTable((kind,)))
    enc = RowEncoder(own, PUBLISHED_POLICY)
    row = row_of("q", f"see {kind.call_text(text='THE1')}", "a result", "THE1")
    got = enc.encode(row, {})
    assert isinstance(got, Encoded)
    (call,) = [s for s in got.record.spans if s.call_id == "call_1"]
    ids = [tokenizer.convert_tokens_to_ids(t) for t in (kind.start, *"THE1", kind.end)]
    assert list(call.ids) == ids
    assert call.source == "sampled"
    with pytest.raises(UserError, match=r"a call in a row cannot be read"):
        enc.encode(row_of("q", f"{kind.start}the{kind.end}"), {})
