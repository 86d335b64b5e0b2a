"""The published conversation layout as token ids (FACTS: template of the VPT models).

A turn is written as pieces: text of ours, text of the user's, and slots for pictures. Text from
outside can never become a special or perception token, whatever it spells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vpt_agent.errors import UserError
from vpt_agent.prompt.words import (
    FeatureSlot,
    Ids,
    Outcome,
    PictureSlot,
    PromptPart,
    Tokenizer,
    Words,
    Writer,
)
from vpt_agent.tokens.table import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    VISION_END,
    VISION_START,
    PerceptionTable,
)

__all__ = [
    "FeatureSlot",
    "Ids",
    "Outcome",
    "PictureSlot",
    "PromptPart",
    "Tokenizer",
    "VPTLayout",
]

SYSTEM = "You are a helpful assistant."


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
        self.words = Words(tokenizer)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; what spells an added token is broken up into ordinary ones."""
        return self.words.plain(text)

    def _writer(self) -> Writer:
        return Writer(self.encode_text, self.ids.__getitem__)

    # --- turns ----------------------------------------------------------------------------

    def opening(self, views: Sequence[str], question: str) -> list[PromptPart]:
        """System turn, the first user turn, and the opening of the assistant's."""
        w = self._writer()
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
        w = self._writer()
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
                _slot(w, piece)
        self._open_assistant(w)
        return w.done()

    def follow_up(self, views: Sequence[str], question: str) -> list[PromptPart]:
        """A later user turn; the assistant's end of turn stands before it already."""
        w = self._writer()
        self._user(w, views, question)
        return w.done()

    def _user(self, w: Writer, views: Sequence[str], question: str) -> None:
        w.plain("\n")
        w.special(IM_START)
        w.plain("user\n")
        for view in views:
            _slot(w, PictureSlot(view))
            w.plain("\n")
        w.plain(question)
        self._open_assistant(w)

    def _open_assistant(self, w: Writer) -> None:
        w.special(IM_END)
        w.plain("\n")
        w.special(IM_START)
        w.plain("assistant\n")

    def results(self, outcomes: Sequence[Outcome]) -> list[PromptPart]:
        """The user turn that brings the results of one assistant turn's calls.

        One view or feature block alone stands bare; several views are numbered ``Region i:``
        on lines of their own, as published.
        """
        w = self._writer()
        w.plain("\n")
        w.special(IM_START)
        w.plain("user\n")
        views = [v for o in outcomes for v in o.views]
        features = [o for o in outcomes if o.features]
        texts = [t for o in outcomes for t in (o.text, o.error) if t]
        if len(views) > 1:
            for index, view in enumerate(views):
                w.plain(f"Region {index}: ")
                _slot(w, PictureSlot(view))
                w.plain("\n")
        elif views:
            _slot(w, PictureSlot(views[0]))
            if features or texts:
                w.plain("\n")
        for index, outcome in enumerate(features):
            assert outcome.kind is not None
            _slot(w, FeatureSlot(outcome.call_id, outcome.kind))
            if texts or index + 1 < len(features):
                w.plain("\n")
        w.plain("\n".join(texts))
        self._open_assistant(w)
        return w.done()

    def inline(self, outcome: Outcome) -> list[PromptPart]:
        """An inline kind's result, right behind its end token."""
        w = self._writer()
        for view in outcome.views:
            _slot(w, PictureSlot(view))
        if outcome.features and outcome.kind is not None:
            _slot(w, FeatureSlot(outcome.call_id, outcome.kind))
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
        return self.words.readable(parts, counts)


def _slot(w: Writer, slot: PictureSlot | FeatureSlot) -> None:
    w.special(VISION_START)
    w.slot(slot)
    w.special(VISION_END)
