"""Conversations of the second version: regions, pictures encoded again, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from vpt_agent.nano.conversation import Encoded, Encoder, Ints
from vpt_agent.nano.domain.ask import every_question
from vpt_agent.nano.domain.table import TABLE
from vpt_agent.nano.tokenizer import SYSTEM, build_tokenizer, token_id
from vpt_agent.tokens.table import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    REENCODE_TRIGGER,
    REGION_TRIGGER,
    VISION_END,
    VISION_START,
)

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

# More than the first version's 480: its merges would not reach the new words.
MERGED: Final = 720
_PICTURE: Final = f"{VISION_START}{IMAGE_PAD}{VISION_END}"
_REPLY: Final = f"{IM_END}\n{IM_START}assistant\n"
_USER: Final = f"\n{IM_START}user\n"
END: Final = IM_END
Cells = tuple[int, int, int, int]


def second_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer: lower-case words of all questions, so that strings on tags never merge."""
    often = [REGION_TRIGGER, REENCODE_TRIGGER, SYSTEM, "system\nuser\nassistant\n"] * 600
    return build_tokenizer([t.lower() for t in (*every_question(), *often)], merged=MERGED)


def opening(question: str, kind: str = "") -> str:
    """Conversation up to the first reply; with a ``kind`` its trigger phrase is appended."""
    phrase = f"\n{TABLE[kind].trigger}" if kind else ""
    head = f"{IM_START}system\n{SYSTEM}{IM_END}{_USER}"
    return f"{head}{_PICTURE}\n{question}{phrase}{_REPLY}"


def regions_call(cells: Sequence[Cells]) -> str:
    """The reply that asks for regions, one after the other."""
    return "".join(TABLE["region"].call_text(region=c) for c in cells) + END


def again_call(kind: str) -> str:
    """The reply that asks for the whole picture encoded again."""
    return TABLE[kind].call_text() + END


def regions_turn(count: int) -> str:
    """The turn that shows crops: one bare, several numbered."""
    shown = _PICTURE if count == 1 else ""
    shown = shown or "".join(f"Region {i}: {_PICTURE}\n" for i in range(count))
    return f"{_USER}{shown}{_REPLY}"


def again_turn(kind: str) -> str:
    """The turn that brings a kind's features."""
    return f"{_USER}{VISION_START}{TABLE[kind].placeholder}{VISION_END}{_REPLY}"


class SecondEncoder(Encoder):
    """As :class:`Encoder`; a kind's placeholder stands for ``again`` tokens at text positions."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        super().__init__(tokenizer)
        kinds = [k for k in TABLE.kinds if k.payload == "control"]
        self.placeholders = {token_id(tokenizer, k.placeholder) for k in kinds}
        self.starts = {k.name: token_id(tokenizer, k.start) for k in kinds}
        self.controls = {token_id(tokenizer, k.control) for k in kinds if k.control}

    def encode_again(
        self, pieces: list[tuple[str, bool]], grids: list[tuple[int, int]], again: int
    ) -> Encoded:
        """Encode (text, learnt) pieces; control tokens carry no loss. ``again`` tokens of features.

        ``grids`` gives visual token rows and columns of every picture of the base tower.
        """
        plain = self.encode(pieces, grids)
        learnt = np.where(np.isin(plain.ids, list(self.controls)), -100, plain.labels)
        at = np.flatnonzero(np.isin(plain.ids, list(self.placeholders)))
        if not at.size:
            return Encoded(plain.ids, learnt, plain.positions)
        place = int(at[0])
        more: Ints = np.arange(1, again)
        ids = np.insert(plain.ids, place + 1, np.full(again - 1, plain.ids[place]))
        labels = np.insert(learnt, place + 1, np.full(again - 1, -100))
        here = plain.positions[:, place : place + 1]
        after = plain.positions[:, place + 1 :] + again - 1
        positions = np.concatenate(
            (plain.positions[:, : place + 1], here + more[None], after), axis=1
        )
        return Encoded(ids, labels, positions)
