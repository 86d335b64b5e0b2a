"""What prompts are made of, and text as token ids: text from outside is never a special token."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


class Tokenizer(Protocol):
    """What is needed of a tokenizer: transformers' ones have it."""

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Text to ids; spelled added tokens become their own ids."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = ...) -> str:
        """Ids to text."""

    def get_added_vocab(self) -> dict[str, int]:
        """Added tokens to ids."""

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """Id of one token, or None."""

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the special tokens."""


@dataclass(frozen=True)
class Ids:
    """Ready token ids."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class PictureSlot:
    """Where the visual tokens of a view go, through the base tower."""

    view: str


@dataclass(frozen=True)
class FeatureSlot:
    """Where the visual tokens that call ``call_id`` returned go."""

    call_id: str
    kind: str


PromptPart = Ids | PictureSlot | FeatureSlot


@dataclass(frozen=True)
class Outcome:
    """What one call gives the conversation: views to show, features, text, or an error line."""

    call_id: str
    kind: str | None
    views: tuple[str, ...] = ()
    features: bool = False
    text: str | None = None
    error: str | None = None


class Words:
    """Plain text, spelled tokens and slots of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Of one character there is nothing to break up.
        vocab = {t: i for t, i in tokenizer.get_added_vocab().items() if len(t) > 1}
        self._ids = vocab
        self._added_ids = frozenset(vocab.values())
        longest_first = sorted(vocab, key=len, reverse=True)
        pattern = "|".join(re.escape(t) for t in longest_first) or r"(?!)"
        self._added = re.compile(pattern)

    def added(self, text: str, start: int = 0) -> re.Match[str] | None:
        """Where ``text`` next spells an added token."""
        return self._added.search(text, start)

    def plain(self, text: str) -> list[int]:
        """Ids of plain text; what spells an added token is broken up into ordinary ones."""
        # Half of a surrogate pair is no text; a tokenizer would fail on it.
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = []
        start = 0
        while found := self.added(text, start):
            # Cut behind the first character: neither piece spells this token any more.
            cut = found.start() + 1
            ids += self._ordinary(text[start:cut])
            start = cut
        return ids + self._ordinary(text[start:])

    def _ordinary(self, text: str) -> list[int]:
        """Ids of a piece that spells no added token; halved where the tokenizer's own rewriting
        (case, width) makes it spell one all the same."""
        ids = self.tokenizer.encode(text, add_special_tokens=False) if text else []
        if len(text) < 2 or self._added_ids.isdisjoint(ids):
            return ids
        middle = len(text) // 2
        return self._ordinary(text[:middle]) + self._ordinary(text[middle:])

    def writer(self) -> Writer:
        """A new writer."""
        return Writer(self.plain, self._ids.__getitem__)

    def readable(self, parts: Sequence[PromptPart], counts: Mapping[str, int]) -> str:
        """A prompt as one text, pictures as ``[view: n visual tokens]``."""
        out = []
        for part in parts:
            if isinstance(part, Ids):
                out.append(self.tokenizer.decode(list(part.ids), skip_special_tokens=False))
            else:
                name = part.view if isinstance(part, PictureSlot) else part.call_id
                out.append(f"[{name}: {counts.get(name, 0)} visual tokens]")
        return "".join(out)


class Writer:
    """Collects pieces; plain neighbours are tokenised together, as one text would be.

    ``encode`` gives the ids of plain text, ``lookup`` the id of a spelled token.
    """

    def __init__(self, encode: Callable[[str], list[int]], lookup: Callable[[str], int]) -> None:
        self.encode, self.lookup = encode, lookup
        self.parts: list[PromptPart] = []
        self._ids: list[int] = []
        self._plain = ""

    def plain(self, text: str) -> None:
        """Text."""
        self._plain += text

    def special(self, token: str) -> None:
        """An added token, by its spelling."""
        self._end_plain()
        self._ids.append(self.lookup(token))

    def slot(self, slot: PictureSlot | FeatureSlot) -> None:
        """A place for visual tokens."""
        self._end_plain()
        if self._ids:
            self.parts.append(Ids(tuple(self._ids)))
        self._ids = []
        self.parts.append(slot)

    def _end_plain(self) -> None:
        if self._plain:
            self._ids += self.encode(self._plain)
            self._plain = ""

    def done(self) -> list[PromptPart]:
        """What was written."""
        self._end_plain()
        if self._ids:
            self.parts.append(Ids(tuple(self._ids)))
        return self.parts
