"""Conversations of stock models: rendered by the model's own chat template, piece by piece.

A conversation in a cache only grows, while a template renders it as a whole. So what is new is
rendered behind a stand-in for the assistant's last turn, and cut off there: the turn itself stays
the tokens that the model said. Text from outside travels as marks through the template and is
tokenised afterwards, where it can never become a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vpt_agent.errors import UserError
from vpt_agent.prompt.words import Ids, Outcome, PictureSlot, PromptPart, Tokenizer, Words
from vpt_agent.tokens.table import (
    CALL_END,
    CALL_START,
    RESPONSE_END,
    RESPONSE_START,
    THINK_END,
    THINK_START,
)

Message = dict[str, Any]
Schema = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Schema] | None, bool], str]
"""Messages, tools (OpenAI's form) and whether the assistant's turn is opened, to text. Raises
:class:`UserError` for what the template refuses."""

ResultForm = Literal["tool", "text", "user"]
"""How results are told: in messages of the role ``tool`` with their pictures; with their text only,
and the pictures in a user message behind them; or in a user message altogether."""

SYSTEM = "You are a helpful assistant."
_MARK = re.compile("\ue000(\\d+)\ue001")
_PROBE: Schema = {
    "type": "function",
    "function": {
        "name": "vpt_probe",
        "description": "Nothing.",
        "parameters": {"type": "object", "properties": {}},
    },
}


@dataclass(frozen=True)
class Shown:
    """A picture of the conversation, and the words in front of it (none: an empty text)."""

    view: str
    label: str = ""


class _Marks:
    """Texts from outside, as marks that no template touches."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> str:
        self.texts.append(text)
        return f"\ue000{len(self.texts) - 1}\ue001"


class ChatLayout:
    """Renders turns for one tokenizer and template. What the template can do is found out once, by
    rendering small conversations with it.

    ``render`` renders (see :data:`Render`); ``image_token`` is what stands for a picture in the
    rendered text; ``eos`` the id that ends a turn if the template does not say.
    """

    def __init__(
        self, tokenizer: Tokenizer, render: Render, *, image_token: str, eos: int | None = None
    ) -> None:
        self.tokenizer, self.render, self.image_token = tokenizer, render, image_token
        self.words = Words(tokenizer)
        pad = tokenizer.convert_tokens_to_ids(image_token)
        if pad is None:
            raise UserError(
                "the tokenizer lacks the token that stands for a picture",
                got=image_token,
                fix="use the tokenizer that belongs to the checkpoint",
            )
        self.image_pad = pad
        ask = self._message("user", ["?"])
        opened = self.render([ask], None, True)
        self.takes_tools = "vpt_probe" in self._tried([ask], [_PROBE])
        self.takes_system = "a?b" in self._tried([self._message("system", ["a?b"]), ask], None)
        self.thinking = opened.rfind(THINK_START) > opened.rfind(THINK_END)
        self.end = self._end(eos)
        self.result_form = self._result_form()
        # Tags of calls and thoughts may be special tokens too; they must not end a turn.
        tags = {CALL_START, CALL_END, THINK_START, THINK_END, RESPONSE_START, RESPONSE_END}
        kept = {tokenizer.convert_tokens_to_ids(tag) for tag in tags}
        self.stop_ids = (frozenset(tokenizer.all_special_ids) - kept) | {self.end}

    # --- what the template can do ---------------------------------------------------------

    def _tried(self, messages: Sequence[Message], tools: Sequence[Schema] | None) -> str:
        """The rendered text; nothing where the template refuses."""
        try:
            return self.render(messages, tools, True)
        except UserError:
            return ""

    def _end(self, eos: int | None) -> int:
        """The id behind the assistant's words."""
        behind = self._behind([self._message("user", ["?"])])
        found = self.words.added(behind)
        if found is not None and not behind[: found.start()].strip():
            token = self.tokenizer.convert_tokens_to_ids(found.group())
            if token is not None and found.group() != self.image_token:
                return token
        if eos is None:
            raise UserError(
                "neither the chat template nor the tokenizer says what ends a turn",
                fix="use a tokenizer with an end-of-sequence token",
            )
        return eos

    def _result_form(self) -> ResultForm:
        if not self.takes_tools:
            return "user"
        for form in ("tool", "text"):
            picture: list[str | Shown] = [Shown("p")] if form == "tool" else []
            message = self._message("tool", [*picture, "a?b"])
            try:
                text = self._behind([message], [_PROBE])
            except UserError:
                continue
            # A template that does not know parts prints the list, or leaves the picture out.
            whole = text.count("a?b") == 1 and "'type'" not in text and '"type"' not in text
            if whole and text.count(self.image_token) == len(picture):
                return "tool" if form == "tool" else "text"
        return "user"

    def _behind(self, messages: Sequence[Message], tools: Sequence[Schema] | None = None) -> str:
        """What the template puts behind an assistant's words, ``messages`` included."""
        words = "vpt_words"
        ask = self._message("user", ["?"])
        for content in (words, [{"type": "text", "text": words}]):
            said = {"role": "assistant", "content": content}
            try:
                text = self.render([ask, said, *messages], tools, True)
            except UserError:
                continue
            if text.count(words) == 1 and "'type'" not in text.split(words)[0][-40:]:
                return text.split(words)[1]
        raise UserError(
            "the chat template cannot render a conversation",
            got="the assistant's words do not stand in it, or it refuses the roles",
            fix="use the chat template that belongs to the checkpoint",
        )

    # --- turns ----------------------------------------------------------------------------

    @staticmethod
    def _message(role: str, content: Sequence[str | Shown]) -> Message:
        parts: list[Message] = []
        for piece in content:
            if isinstance(piece, str):
                parts.append({"type": "text", "text": piece})
            else:
                parts.append({"type": "image"})
        # Plain text stays a plain string: some templates take nothing else from some roles.
        if all(isinstance(piece, str) for piece in content):
            return {"role": role, "content": "".join(str(piece) for piece in content)}
        return {"role": role, "content": parts}

    def opening(
        self, pictures: Sequence[Shown], question: str, tools: Sequence[Schema] = ()
    ) -> list[PromptPart]:
        """The beginning of a conversation, up to the assistant's first word."""
        marks = _Marks()
        content = _asked(pictures, question, marks)
        offered = [self._plain_schema(tool) for tool in tools]
        messages: list[Message] = []
        if offered and not self.takes_tools:
            section = f"{SYSTEM}\n\n{tools_section(offered)}"
            if self.takes_system:
                messages.append(self._message("system", [marks(section)]))
            else:
                content = [marks(f"{section}\n\n"), *content]
        messages.append(self._message("user", content))
        text = self.render(messages, offered if self.takes_tools and offered else None, True)
        return self._pieces(text, marks, pictures)

    def follow_up(
        self, pictures: Sequence[Shown], question: str, tools: Sequence[Schema] = ()
    ) -> list[PromptPart]:
        """A later question, behind the assistant's end of turn; ``tools`` are new ones."""
        marks = _Marks()
        content = _asked(pictures, question, marks)
        if tools:
            section = tools_section([self._plain_schema(tool) for tool in tools])
            content = [marks(f"{section}\n\n"), *content]
        return self._later([self._message("user", content)], marks, pictures)

    def results(self, outcomes: Sequence[Outcome], shown: Mapping[str, Shown]) -> list[PromptPart]:
        """What the calls of the last turn gave, and the opening of the next."""
        marks = _Marks()
        messages: list[Message] = []
        behind: list[str | Shown] = []
        for outcome in outcomes:
            text = "\n".join(t for t in (outcome.text, outcome.error) if t)
            pictures = _labelled([shown[v] for v in outcome.views], marks)
            if self.result_form == "user":
                pieces = [*pictures, *([marks(text)] if text else [])]
                behind += [f"{RESPONSE_START}\n", *pieces, f"\n{RESPONSE_END}\n"]
            elif self.result_form == "tool":
                messages.append(self._message("tool", [*pictures, marks(text)]))
            else:
                names = ", ".join(outcome.views)
                said = text or (f"shown below: {names}" if names else "done")
                messages.append(self._message("tool", [marks(said)]))
                behind += pictures
        if behind:
            if isinstance(behind[-1], str) and self.result_form == "user":
                behind[-1] = behind[-1].rstrip("\n")
            messages.append(self._message("user", behind))
        order = [shown[v] for outcome in outcomes for v in outcome.views]
        return self._later(messages, marks, order)

    def _later(
        self, messages: Sequence[Message], marks: _Marks, pictures: Sequence[Shown]
    ) -> list[PromptPart]:
        tools = [_PROBE] if self.takes_tools else None
        parts = self._pieces(self._behind(messages, tools), marks, pictures)
        if isinstance(parts[0], Ids) and parts[0].ids[:1] == (self.end,):
            parts[0] = Ids(parts[0].ids[1:])  # it stands there already
        return parts

    def _plain_schema(self, tool: Schema) -> Schema:
        """A tool's schema without what could become a special token, or a mark of ours."""
        text = json.dumps(tool, ensure_ascii=False)
        text = text.replace("\ue000", "").replace("\ue001", "")
        while (found := self.words.added(text)) is not None:
            text = f"{text[: found.start() + 1]} {text[found.start() + 1 :]}"
        cleaned: Schema = json.loads(text)
        return cleaned

    def _pieces(self, text: str, marks: _Marks, pictures: Sequence[Shown]) -> list[PromptPart]:
        """Rendered text as ids and slots, in order."""
        writer = self.words.writer()
        waiting = list(pictures)
        for index, piece in enumerate(_MARK.split(text)):
            if index % 2:
                writer.plain(marks.texts[int(piece)])
                continue
            while (found := self.words.added(piece)) is not None:
                writer.plain(piece[: found.start()])
                if found.group() == self.image_token and waiting:
                    writer.slot(PictureSlot(waiting.pop(0).view))
                else:
                    writer.special(found.group())
                piece = piece[found.end() :]
            writer.plain(piece)
        if waiting:
            raise UserError(
                "the chat template leaves pictures out",
                got=f"{len(pictures) - len(waiting)} places for {len(pictures)} pictures",
                expected=f"one {self.image_token} for each",
                fix="use the chat template that belongs to the checkpoint",
            )
        return writer.done()

    # --- text of the model ----------------------------------------------------------------

    def raw_text(self, ids: Sequence[int]) -> str:
        """What the ids spell, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def text(self, ids: Sequence[int]) -> str:
        """What the model said, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def readable(self, parts: Sequence[PromptPart], counts: Mapping[str, int]) -> str:
        """A prompt as one text, pictures as ``[view: n visual tokens]``."""
        return self.words.readable(parts, counts)


def _asked(pictures: Sequence[Shown], question: str, marks: _Marks) -> list[str | Shown]:
    return [*_labelled(pictures, marks), marks(question)]


def _labelled(pictures: Sequence[Shown], marks: _Marks) -> list[str | Shown]:
    """Pictures behind their labels, each on a line of its own; bare ones in a row."""
    pieces: list[str | Shown] = []
    for picture in pictures:
        if picture.label:
            pieces += [marks(f"{picture.label}: "), picture, marks("\n")]
        else:
            pieces.append(picture)
    return pieces


def tools_section(tools: Sequence[Schema]) -> str:
    """How a model whose template knows no tools is told of them."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        "# Tools\n\nThese functions can be called to help with the user's question, described by "
        f"JSON Schema:\n<tools>\n{lines}\n</tools>\n\nTo call one, write its name and arguments as "
        f'JSON between tags, and nothing after it:\n{CALL_START}\n{{"name": "...", "arguments": '
        f"{{...}}}}\n{CALL_END}\nWhat it gives comes back in {RESPONSE_START} tags. Call one only "
        "where the answer needs it; otherwise answer at once."
    )


def without_thoughts(text: str, *, thinking: bool = False) -> str:
    """What a model said when it had thought; ``thinking``: its prompt had begun the thought."""
    if THINK_END in text:
        return text.rpartition(THINK_END)[2].strip()
    if thinking or THINK_START in text:
        return text.partition(THINK_START)[0].strip() if not thinking else ""
    return text.strip()
