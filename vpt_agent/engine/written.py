"""Decoding of calls that a model writes as JSON: free outside, the tool's schema inside.

Outside a call nothing is constrained. Once ``<tool_call>`` stands in the text (and not in what the
model thinks), only tokens that can still become a call of an offered tool, with arguments that fit
its schema, are allowed, as far as `llguidance <https://github.com/guidance-ai/llguidance>`_ knows
the schema's words; the strict check before a call runs knows all of them. Tokens that alone can
come next are forced. See docs/decisions/constrained-json.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import JsonValue
from torch import Tensor

from vpt_agent.engine.vocabulary import Vocabulary, allowed_by
from vpt_agent.errors import ToolDefinitionError
from vpt_agent.tokens.table import CALL_END, CALL_START, THINK_END, THINK_START

TAIL = 48
"""Bytes of the text that are looked at for a tag; longer than any tag."""

SEPARATORS = {"whitespace_flexible": False, "item_separator": ",[ ]?", "key_separator": ":[ ]?"}
"""A space behind commas and colons or none: both habits of models, and no endless spaces."""


@dataclass(frozen=True, eq=False)
class WrittenState:
    """Where a turn stands. ``kind`` is not None inside a call: then ``before`` are ids of the
    opening tag that are still to come, ``after`` those of the closing one, and ``matcher`` reads
    the JSON between them (None behind it). ``tail`` is the end of the text outside calls."""

    kind: str | None = None
    matcher: Any = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    tail: bytes = b""
    thinking: bool = False


@dataclass(frozen=True)
class Offered:
    """A tool as the grammar sees it: its name and the JSON Schema of its arguments."""

    name: str
    schema: Mapping[str, JsonValue]


@dataclass
class WrittenGrammar:
    """The calls of one turn (see :class:`vpt_agent.engine.decode.CallGrammar`).

    ``tools`` may be called. ``must``: the turn begins with a call of one of these. ``constrained``
    False leaves the model free inside calls too. ``thinking``: the prompt has begun a thought.
    A matcher keeps its place, so a grammar is for one turn.
    """

    vocabulary: Vocabulary | None
    tools: Sequence[Offered]
    must: Sequence[Offered] = ()
    thinking: bool = False
    tags: tuple[bytes, bytes] = (CALL_START.encode(), CALL_END.encode())
    _fresh: Any = field(default=None, init=False)

    @property
    def start(self) -> WrittenState:
        """The state before anything was said."""
        if not self.must or self.vocabulary is None:
            return WrittenState(thinking=self.thinking)
        # A thought that the prompt began is ended unthought: a call was asked for.
        thought = f"{THINK_END}\n\n".encode() if self.thinking else b""
        tag = tuple(self.vocabulary.ids(thought + self.tags[0] + b"\n"))
        return WrittenState("call", self._matcher(self.must), before=tag)

    def _matcher(self, tools: Sequence[Offered]) -> Any:
        assert self.vocabulary is not None
        made = self.vocabulary.matcher(call_grammar(tools))
        if made.is_error():
            raise ToolDefinitionError(
                "the schema of a tool's arguments cannot constrain a call",
                where=", ".join(t.name for t in tools),
                got=made.get_error().splitlines()[0],
                fix="simplify the schema, or load the model with constrained=False",
            )
        return made

    def _begun(self, rest: bytes) -> WrittenState | None:
        """The state behind an opening tag whose last token went on with ``rest``; None if no call
        goes on so."""
        assert self.vocabulary is not None
        if self._fresh is None:
            self._fresh = self._matcher(self.tools)
        matcher = self._fresh.deep_copy()
        text = rest.lstrip()
        if not text:
            # The line break that belongs to the tag, unless it came with it.
            line = () if rest else tuple(self.vocabulary.ids(b"\n"))
            return WrittenState("call", matcher, before=line)
        ids = self.vocabulary.ids(text)
        if matcher.validate_tokens(ids) < len(ids) or not matcher.consume_tokens(ids):
            return None
        return WrittenState("call", matcher)

    def step(self, state: WrittenState, token_id: int) -> tuple[WrittenState, None]:
        """Read one id. Calls are read from the whole text when the turn has ended."""
        if self.vocabulary is None:
            return state, None
        if state.kind is not None:
            return self._inside(state, token_id), None
        tail = state.tail + self.vocabulary.text([token_id])
        if state.thinking:
            over = THINK_END.encode() in tail
            return WrittenState(thinking=not over, tail=b"" if over else tail[-TAIL:]), None
        _, tag, rest = tail.partition(self.tags[0])
        if tag and self.tools:
            # What cannot go on as a call stays text; the reader will say what is wrong with it.
            return self._begun(rest) or WrittenState(), None
        thinking = THINK_START.encode() in tail
        return WrittenState(thinking=thinking, tail=b"" if thinking else tail[-TAIL:]), None

    def _inside(self, state: WrittenState, token_id: int) -> WrittenState:
        if state.before:
            return replace(state, before=state.before[1:])
        if state.matcher is None:
            return replace(state, after=state.after[1:]) if state.after[1:] else WrittenState()
        if not state.matcher.consume_token(token_id):
            return WrittenState()  # only where nothing constrains: the reader will say what it is
        if state.matcher.is_stopped():
            assert self.vocabulary is not None
            closing = tuple(self.vocabulary.ids(self.tags[1]))
            return WrittenState("call", after=closing)
        return state

    def allowed(self, state: WrittenState) -> Tensor | None:
        """The ids that may come next, bool [size]; None outside a call."""
        return None if state.matcher is None else allowed_by(state.matcher)

    def forced(self, state: WrittenState) -> int | None:
        """The one id that may come next, if that is known."""
        if state.before or state.after:
            return (state.before or state.after)[0]
        ahead = [] if state.matcher is None else state.matcher.compute_ff_tokens()
        return ahead[0] if ahead else None

    def finish(self, state: WrittenState) -> None:
        """What it means that the ids end here: that is for the reader of the text to say."""

    def banned(self, state: WrittenState, full: bool) -> frozenset[int]:
        """Ids that would begin a call where none may begin (``full``), or one that is none."""
        if self.vocabulary is None or state.kind is not None or state.thinking:
            return frozenset()
        none = full or not self.tools
        return frozenset(
            token
            for token, rest in self.vocabulary.completing(state.tail, self.tags[0])
            if none or (rest.strip() and self._begun(rest) is None)
        )


def call_grammar(tools: Sequence[Offered]) -> str:
    """A call of any of ``tools`` and a line break, as llguidance's Lark."""
    lines = ['start: call "\\n"']
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
        schema = dict(tool.schema) | {"x-guidance": SEPARATORS | {"lenient": True}}
        lines.append(f'call_{i}: {head} args_{i} "}}"')
        lines.append(f"args_{i}: %json {json.dumps(schema)}")
    return "\n".join(lines)
