"""The published conversation layout as token ids (FACTS: template of the VPT models).

A turn is written as pieces: text of ours, text of the user's, and slots for pictures. Text from
outside can never become a special or perception token, whatever it spells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vpt_agent.errors import UserError
from vpt_agent.tokens.table import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    VISION_END,
    VISION_START,
    PerceptionTable,
)

SYSTEM = "You are a helpful assistant."


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


class _Writer:
    """Collects pieces; plain neighbours are tokenised together, as one string would be."""

    def __init__(self, layout: VPTLayout) -> None:
        self.layout = layout
        self.parts: list[PromptPart] = []
        self._ids: list[int] = []
        self._plain = ""

    def plain(self, text: str) -> None:
        self._plain += text

    def special(self, token: str) -> None:
        self._end_plain()
        self._ids.append(self.layout.ids[token])

    def slot(self, slot: PictureSlot | FeatureSlot) -> None:
        self.special(VISION_START)
        self.parts.append(Ids(tuple(self._ids)))
        self._ids = []
        self.parts.append(slot)
        self.special(VISION_END)

    def _end_plain(self) -> None:
        if self._plain:
            self._ids += self.layout.encode_text(self._plain)
            self._plain = ""

    def done(self) -> list[PromptPart]:
        self._end_plain()
        if self._ids:
            self.parts.append(Ids(tuple(self._ids)))
        return self.parts


class VPTLayout:
    """Renders conversations for one tokenizer and table."""

    def __init__(
        self, tokenizer: Tokenizer, table: PerceptionTable, *, system: str = SYSTEM
    ) -> None:
        self.tokenizer, self.table, self.system = tokenizer, table, system
        self.ids = {}
        for token in (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD):
            found = tokenizer.convert_tokens_to_ids(token)
            if found is None:
                raise UserError(
                    "the tokenizer lacks a token of the conversation layout",
                    got=token,
                    fix="use the tokenizer that belongs to the checkpoint",
                )
            self.ids[token] = found
        self.end = self.ids[IM_END]
        self.image_pad = self.ids[IMAGE_PAD]
        # As published: generation ends at the end of turn or at any special token.
        # A tokenizer may call perception tokens special too; a call must not end its turn.
        spelled = {tokenizer.convert_tokens_to_ids(t) for t in table.tokens_to_add()[1]}
        self.stop_ids = (frozenset(tokenizer.all_special_ids) - spelled) | {self.end}
        # Of one character there is nothing to break up.
        vocab = {t: i for t, i in tokenizer.get_added_vocab().items() if len(t) > 1}
        added = sorted(vocab, key=len, reverse=True)
        self._added = re.compile("|".join(re.escape(t) for t in added)) if added else None
        self._added_ids = frozenset(vocab.values())

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; what spells an added token is broken up into ordinary ones."""
        # Half of a surrogate pair is no text; a tokenizer would fail on it.
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = []
        start = 0
        while self._added is not None and (found := self._added.search(text, start)):
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

    # --- turns ----------------------------------------------------------------------------

    def opening(self, views: Sequence[str], question: str) -> list[PromptPart]:
        """System turn, the first user turn, and the opening of the assistant's."""
        w = _Writer(self)
        w.special(IM_START)
        w.plain(f"system\n{self.system}")
        w.special(IM_END)
        self._user(w, views, question)
        return w.done()

    def user_turn(
        self, pieces: Sequence[str | PictureSlot | FeatureSlot], *, system: bool = False
    ) -> list[PromptPart]:
        """A user turn of text and slots in this order, and the opening of the assistant's.

        ``system`` puts the system turn before it. What :meth:`opening` and :meth:`follow_up` are
        for questions, this is for turns whose pictures stand anywhere (data rows).
        """
        w = _Writer(self)
        if system:
            w.special(IM_START)
            w.plain(f"system\n{self.system}")
            w.special(IM_END)
        w.plain("\n")
        w.special(IM_START)
        w.plain("user\n")
        for piece in pieces:
            if isinstance(piece, str):
                w.plain(piece)
            else:
                w.slot(piece)
        self._open_assistant(w)
        return w.done()

    def follow_up(self, views: Sequence[str], question: str) -> list[PromptPart]:
        """A later user turn; the assistant's end of turn stands before it already."""
        w = _Writer(self)
        self._user(w, views, question)
        return w.done()

    def _user(self, w: _Writer, views: Sequence[str], question: str) -> None:
        w.plain("\n")
        w.special(IM_START)
        w.plain("user\n")
        for view in views:
            w.slot(PictureSlot(view))
            w.plain("\n")
        w.plain(question)
        self._open_assistant(w)

    def _open_assistant(self, w: _Writer) -> None:
        w.special(IM_END)
        w.plain("\n")
        w.special(IM_START)
        w.plain("assistant\n")

    def results(self, outcomes: Sequence[Outcome]) -> list[PromptPart]:
        """The user turn that brings the results of one assistant turn's calls.

        One view or feature block alone stands bare; several views are numbered ``Region i:``
        on lines of their own, as published.
        """
        w = _Writer(self)
        w.plain("\n")
        w.special(IM_START)
        w.plain("user\n")
        views = [v for o in outcomes for v in o.views]
        features = [o for o in outcomes if o.features]
        texts = [t for o in outcomes for t in (o.text, o.error) if t]
        if len(views) > 1:
            for index, view in enumerate(views):
                w.plain(f"Region {index}: ")
                w.slot(PictureSlot(view))
                w.plain("\n")
        elif views:
            w.slot(PictureSlot(views[0]))
            if features or texts:
                w.plain("\n")
        for index, outcome in enumerate(features):
            assert outcome.kind is not None
            w.slot(FeatureSlot(outcome.call_id, outcome.kind))
            if texts or index + 1 < len(features):
                w.plain("\n")
        w.plain("\n".join(texts))
        self._open_assistant(w)
        return w.done()

    def inline(self, outcome: Outcome) -> list[PromptPart]:
        """An inline kind's result, right behind its end token."""
        w = _Writer(self)
        for view in outcome.views:
            w.slot(PictureSlot(view))
        if outcome.features and outcome.kind is not None:
            w.slot(FeatureSlot(outcome.call_id, outcome.kind))
        w.plain("\n".join(t for t in (outcome.text, outcome.error) if t))
        return w.done()

    def with_trigger(self, question: str, kind: str) -> str:
        """The question with the kind's trigger phrase on a line of its own, unless it has it."""
        phrase = self.table[kind].trigger
        if not phrase or phrase in question:
            return question
        return f"{question}\n{phrase}"

    # --- text of the model ----------------------------------------------------------------

    def text(self, ids: Sequence[int]) -> str:
        """What the model said: special tokens left out, perception tokens kept as text."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def raw_text(self, ids: Sequence[int]) -> str:
        """What the ids spell, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def answer(self, ids: Sequence[int]) -> str:
        """The final answer: :meth:`text` without the published prefix of region answers."""
        text = self.text(ids)
        for kind in self.table.kinds:
            if kind.answer_prefix and text.startswith(kind.answer_prefix):
                text = text[len(kind.answer_prefix) :]
        return text.strip()

    def readable(self, parts: Sequence[PromptPart], counts: Mapping[str, int]) -> str:
        """The prompt as one string, pictures as ``[view: n visual tokens]``."""
        out = []
        for part in parts:
            if isinstance(part, Ids):
                out.append(self.tokenizer.decode(list(part.ids), skip_special_tokens=False))
            else:
                name = part.view if isinstance(part, PictureSlot) else part.call_id
                out.append(f"[{name}: {counts.get(name, 0)} visual tokens]")
        return "".join(out)
