"""Tokenizer and conversations of the nano model."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoTokenizer, Qwen2Tokenizer

from vpt_agent.nano.alphabet import SYMBOLS
from vpt_agent.nano.conversation import END, LOOK, Encoder, question_text, region_text
from vpt_agent.nano.model import build_model
from vpt_agent.nano.tokenizer import (
    ACTION_TOKENS,
    PAD_SPECIAL,
    QWEN_SPECIAL,
    REGION_TOKENS,
    build_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    """The nano tokenizer, built afresh."""
    return build_tokenizer()


def test_order_of_added_tokens(tokenizer: Qwen2Tokenizer) -> None:
    """Specials, then pads, then region and action tokens, one id after another to the end."""
    names = [*QWEN_SPECIAL, *PAD_SPECIAL, *REGION_TOKENS, *ACTION_TOKENS]
    ids = [tokenizer.convert_tokens_to_ids(name) for name in names]
    assert ids == list(range(len(tokenizer) - len(names), len(tokenizer)))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


@pytest.mark.parametrize("text", [SYMBOLS, SYMBOLS[::-1], "AB7QX", "THEREGION", "2345"])
def test_answers_are_spelled(tokenizer: Qwen2Tokenizer, text: str) -> None:
    """One token for each character of an answer."""
    assert len(tokenizer(text)["input_ids"]) == len(text)


def test_any_text_and_reload(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    """Any text survives, and a saved tokenizer gives the same ids."""
    text = "Größe 漢字 \U0001f600\tx\n\n  y <|x_3|><|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == ids


def test_region_text(tokenizer: Qwen2Tokenizer) -> None:
    """A region is six tokens."""
    assert len(tokenizer(region_text((0, 15, 3, 15)))["input_ids"]) == 6


def test_pieces_match_the_whole_and_rope(tokenizer: Qwen2Tokenizer) -> None:
    """Pieces tokenise as the whole string does; positions are transformers' own."""
    encoder = Encoder(tokenizer)
    pieces = [
        (question_text("What does the red tag say?", True), False),
        (region_text((1, 2, 3, 4)) + END, True),
        (LOOK, False),
        ("AB7QX" + END, True),
    ]
    grids = [(8, 7), (5, 8)]
    encoded = encoder.encode(pieces, grids)
    parts = "".join(text for text, _ in pieces).split("<|image_pad|>")
    pads = ["<|image_pad|>" * (rows * columns) for rows, columns in grids]
    whole = parts[0] + pads[0] + parts[1] + pads[1] + parts[2]
    assert tokenizer(whole)["input_ids"] == encoded.ids.tolist()
    learnt = encoded.labels[encoded.labels != -100].tolist()
    assert tokenizer.decode(learnt) == region_text((1, 2, 3, 4)) + END + "AB7QX" + END
    ids = torch.tensor(encoded.ids)[None]
    positions, _ = build_model(tokenizer).model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == encoder.image).int(),
        image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids]),
    )
    assert torch.equal(positions[:, 0], torch.tensor(encoded.positions))
