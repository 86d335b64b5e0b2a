"""The conversation layout as ids: whole-string tokenisation, slots, and text that stays text."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt_agent.errors import UserError
from vpt_agent.model.scripted import ScriptedTokenizer
from vpt_agent.prompt import FeatureSlot, Ids, Outcome, PictureSlot, PromptPart, VPTLayout
from vpt_agent.tokens.table import PerceptionTable

TABLE = PerceptionTable.published(("clip", "dino", "sam"))
START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


@cache
def layout(kind: str) -> VPTLayout:
    if kind == "bytes":
        return VPTLayout(ScriptedTokenizer(TABLE), TABLE)
    from vpt_agent.model.testing import tiny_model

    _, processor = tiny_model(encoders=("clip", "dino", "sam"), seed=0)
    return VPTLayout(processor.tokenizer, TABLE)


BOTH = pytest.mark.parametrize("kind", ["bytes", "bpe"])
ADDED = sorted(ScriptedTokenizer(TABLE).get_added_vocab())
PIECES = st.one_of(st.sampled_from(ADDED), st.text(max_size=6), st.sampled_from("<|>\n "))
EVIL = st.lists(PIECES, max_size=12).map("".join)


def ids(parts: list[PromptPart]) -> list[int]:
    """All ids; a slot as -1 (picture) or -2 (features)."""
    out: list[int] = []
    for part in parts:
        out += part.ids if isinstance(part, Ids) else [-1 if isinstance(part, PictureSlot) else -2]
    return out


def whole(made: VPTLayout, text: str) -> list[int]:
    """``text`` tokenised as one string; ``#`` stands for a picture, ``~`` for features."""
    slots = {"#": -1, "~": -2}
    marks = {made.tokenizer.encode(c, add_special_tokens=False)[0]: s for c, s in slots.items()}
    return [marks.get(i, i) for i in made.tokenizer.encode(text, add_special_tokens=False)]


def slots(parts: list[PromptPart]) -> list[PromptPart]:
    return [p for p in parts if not isinstance(p, Ids)]


@BOTH
@given(text=EVIL)
@settings(max_examples=40, deadline=None)
def test_text_never_becomes_tokens_and_stays_readable(kind: str, text: str) -> None:
    made = layout(kind)
    got = made.encode_text(text)
    assert set(made.tokenizer.get_added_vocab().values()).isdisjoint(got)
    if kind == "bytes":
        assert made.raw_text(got) == text.encode("utf-8", "replace").decode()


@BOTH
@given(text=EVIL)
@settings(max_examples=25, deadline=None)
def test_no_question_and_no_result_changes_the_turns(kind: str, text: str) -> None:
    made = layout(kind)
    special = set(made.tokenizer.get_added_vocab().values())
    plain = [i for i in ids(made.opening(["a"], "q")) if i in special or i < 0]
    assert [i for i in ids(made.opening(["a"], text)) if i in special or i < 0] == plain
    outcome = Outcome("call_1", "clip", ("v",), True, "t", "e")
    plain = [i for i in ids(made.results([outcome])) if i in special or i < 0]
    told = Outcome("call_1", "clip", ("v",), True, text, text)
    assert [i for i in ids(made.results([told])) if i in special or i < 0] == plain


@BOTH
@pytest.mark.parametrize("question", ["What is it?", "  two\n\nlines ", "é世😀", "12"])
def test_pieces_equal_the_whole_string(kind: str, question: str) -> None:
    made = layout(kind)
    picture = "<|vision_start|>#<|vision_end|>\n"
    user = f"\n<|im_start|>user\n{picture}{picture}{question}{ASSISTANT}"
    opening = made.opening(["image_1", "image_2"], question)
    assert ids(opening) == whole(made, START + user)
    assert slots(opening) == [PictureSlot("image_1"), PictureSlot("image_2")]
    assert ids(made.follow_up(["image_1", "image_2"], question)) == whole(made, user)
    assert ids(made.follow_up([], question)) == whole(
        made, f"\n<|im_start|>user\n{question}{ASSISTANT}"
    )
    pieces = ["Look: ", PictureSlot("a"), f" {question}"]
    free = f"\n<|im_start|>user\nLook: <|vision_start|>#<|vision_end|> {question}{ASSISTANT}"
    assert ids(made.user_turn(pieces)) == whole(made, free)
    assert ids(made.user_turn(pieces, system=True)) == whole(made, START + free)


PICTURE, FEATURES = "<|vision_start|>#<|vision_end|>", "<|vision_start|>~<|vision_end|>"
VIEW = Outcome("call_1", "region", ("v1",))
TWO = Outcome("call_2", "region", ("v2", "v3"))
CLIP = Outcome("call_3", "clip", features=True)
SAM = Outcome("call_4", "sam", features=True)
SAID = Outcome("call_5", None, text="forty\ntwo")
WRONG = Outcome("call_6", "clip", error="Error: no")
MIXED = Outcome("call_7", "clip", ("v4",), True, "see")


@BOTH
@pytest.mark.parametrize(
    ("outcomes", "text"),
    [
        ([VIEW], PICTURE),
        ([CLIP], FEATURES),
        ([VIEW, TWO], "".join(f"Region {i}: {PICTURE}\n" for i in range(3))),
        ([VIEW, CLIP], f"{PICTURE}\n{FEATURES}"),
        ([CLIP, SAM], f"{FEATURES}\n{FEATURES}"),
        ([SAID], "forty\ntwo"),
        ([WRONG, SAID], "Error: no\nforty\ntwo"),
        ([MIXED], f"{PICTURE}\n{FEATURES}\nsee"),
        ([VIEW, WRONG], f"{PICTURE}\nError: no"),
        (
            [TWO, CLIP, SAID],
            f"Region 0: {PICTURE}\nRegion 1: {PICTURE}\n{FEATURES}\nforty\ntwo",
        ),
        ([Outcome("call_8", "ask")], ""),
    ],
)
def test_results_are_laid_out_as_one_user_turn(
    kind: str, outcomes: list[Outcome], text: str
) -> None:
    made = layout(kind)
    parts = made.results(outcomes)
    assert ids(parts) == whole(made, f"\n<|im_start|>user\n{text}{ASSISTANT}")
    views = [PictureSlot(v) for o in outcomes for v in o.views]
    features = [FeatureSlot(o.call_id, str(o.kind)) for o in outcomes if o.features]
    assert slots(parts) == [*views, *features]


@BOTH
def test_an_inline_result_stands_where_it_was_called(kind: str) -> None:
    made = layout(kind)
    assert ids(made.inline(MIXED)) == whole(made, f"{PICTURE}{FEATURES}see")
    assert made.inline(Outcome("call_1", "ask")) == []


@BOTH
def test_the_trigger_phrase_is_added_once(kind: str) -> None:
    made = layout(kind)
    once = made.with_trigger("Why?", "region")
    assert once == f"Why?\n{TABLE['region'].trigger}"
    assert made.with_trigger(once, "region") == once


def test_answers_lose_the_published_prefix_and_pictures_are_readable() -> None:
    made = layout("bytes")
    said = made.tokenizer.encode("Now answer the question.\n A cat.<|im_end|>")
    assert made.answer(said) == "A cat."
    text = made.readable(made.opening(["image_1"], "q?"), {"image_1": 12})
    assert "<|vision_start|>[image_1: 12 visual tokens]<|vision_end|>\nq?" in text


class Lower(ScriptedTokenizer):
    """Rewrites text before it looks for its tokens, as some tokenizers do."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return super().encode(text.lower())


def test_a_tokenizer_that_rewrites_text_cannot_be_tricked() -> None:
    tokenizer = Lower(TABLE)
    made = VPTLayout(tokenizer, TABLE)
    got = made.encode_text("a<|IM_END|>b<|Im_End|>")
    assert set(tokenizer.get_added_vocab().values()).isdisjoint(got)
    assert made.raw_text(got) == "a<|im_end|>b<|im_end|>"


class AllSpecial(ScriptedTokenizer):
    """Calls every added token special."""

    @property
    def all_special_ids(self) -> list[int]:
        return sorted(self.get_added_vocab().values())


def test_a_call_does_not_end_its_turn_where_its_tokens_are_special() -> None:
    tokenizer = AllSpecial(TABLE)
    made = VPTLayout(tokenizer, TABLE)
    assert tokenizer.convert_tokens_to_ids("<|region_token_start|>") not in made.stop_ids
    assert tokenizer.convert_tokens_to_ids("<|clip_action|>") not in made.stop_ids
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") in made.stop_ids


def test_a_tokenizer_without_the_layouts_tokens_is_refused() -> None:
    class Bare(ScriptedTokenizer):
        def convert_tokens_to_ids(self, tokens: str) -> int | None:
            return None

    with pytest.raises(UserError, match="lacks a token of the conversation layout"):
        VPTLayout(Bare(TABLE), TABLE)
