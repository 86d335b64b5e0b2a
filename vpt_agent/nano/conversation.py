"""Conversations as token ids with labels and M-RoPE positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from vpt_agent.nano.tokenizer import KIND, SYSTEM, token_id
from vpt_agent.tokens.table import IM_END, IM_START, IMAGE_PAD, VISION_END, VISION_START

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

Ints = NDArray[np.int64]
_ASK: Final = f"{VISION_START}{IMAGE_PAD}{VISION_END}"
_HEAD: Final = f"{IM_START}system\n{SYSTEM}{IM_END}\n"
_REPLY: Final = f"{IM_START}assistant\n"
END: Final = IM_END
LOOK: Final = f"\n{IM_START}user\n{_ASK}{IM_END}\n{_REPLY}"


def question_text(question: str, trigger: bool) -> str:
    """Conversation up to the first reply."""
    phrase = f"\n{KIND.trigger}" if trigger else ""
    return f"{_HEAD}{IM_START}user\n{_ASK}\n{question}{phrase}{IM_END}\n{_REPLY}"


def region_text(cells: tuple[int, int, int, int]) -> str:
    """The action that asks for a region, given as inclusive grid cells."""
    x0, y0, x1, y1 = cells
    corners = f"{KIND.x_token(x0)}{KIND.y_token(y0)}{KIND.x_token(x1)}{KIND.y_token(y1)}"
    return f"{KIND.start}{corners}{KIND.end}"


def crop_question_text() -> str:
    """Only the second half of a look: a crop to be read."""
    return LOOK.removeprefix("\n")


@dataclass(frozen=True)
class Encoded:
    """Token ids (length), labels (length, -100 where none) and positions (3, length)."""

    ids: Ints
    labels: Ints
    positions: Ints


class Encoder:
    """Turns pieces of text, some of them to be learnt, into model input."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image = token_id(tokenizer, IMAGE_PAD)
        self._known: dict[str, list[int]] = {}

    def ids_of(self, text: str) -> list[int]:
        """Ids of one piece; pieces begin and end at special tokens or line ends."""
        known = self._known.get(text)
        if known is None:
            known = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if len(self._known) < 50_000:
                self._known[text] = known
        return known

    def encode(self, pieces: list[tuple[str, bool]], grids: list[tuple[int, int]]) -> Encoded:
        """Encode (text, learnt) pieces; `grids` gives visual token rows and columns per image."""
        ids: list[int] = []
        labels: list[int] = []
        positions: list[Ints] = []
        sizes = iter(grids)
        position = 0
        for text, learnt in pieces:
            for token in self.ids_of(text):
                if token == self.image:
                    rows, columns = next(sizes)
                    count = rows * columns
                    ids += [token] * count
                    labels += [-100] * count
                    y, x = np.divmod(np.arange(count), columns)
                    positions.append(np.stack((np.zeros_like(x), y, x)) + position)
                    position += max(rows, columns)
                else:
                    ids.append(token)
                    labels.append(token if learnt else -100)
                    positions.append(np.full((3, 1), position))
                    position += 1
        return Encoded(
            np.array(ids), np.array(labels), np.concatenate(positions, axis=1).astype(np.int64)
        )
