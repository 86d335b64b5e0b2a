"""Calls that a model writes as text: found, read kindly, and never an exception.

The spelling is the one of Hermes and Qwen, ``<tool_call>{"name": ..., "arguments": {...}}
</tool_call>``. Read besides: the same object in a code fence or bare in the text, OpenAI's
``{"function": {"name", "arguments"}}`` and ``{"tool_calls": [...]}``, the ``<function=name>
<parameter=key>`` form of Qwen's coder models, several calls in a row, a missing closing tag.
Reading is tolerant (:mod:`vpt_agent.tool.lenient`); whether a call may run is for its tool's schema
to say, in :func:`vpt_agent.tool.execute`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from vpt_agent.errors import CallErrorKind
from vpt_agent.tool.lenient import UnreadableError, read_json
from vpt_agent.tool.text import one_line
from vpt_agent.types import ToolCall

MOST_CALLS = 64
"""How many calls one text may hold; what comes after them is one error."""

_OPEN = re.compile(r"<\s*(tool_call|function_call)\s*>", re.IGNORECASE)
_CLOSE = re.compile(r"<\s*/\s*(tool_call|function_call)\s*>", re.IGNORECASE)
_FENCE = re.compile(r"```[ \t]*([\w+-]*)[ \t]*\n?")
_NAMES = ("name", "tool_name", "tool", "function")
_VALUES = ("arguments", "parameters", "args", "input")
_KEYS = "|".join((*_NAMES, *_VALUES, "id", "type", "tool_calls"))
_BARE = re.compile(rf"(?:\[\s*)?\{{\s*[\"'\u201c\u2018]?(?:{_KEYS})[\"'\u201d\u2019]?\s*:")
_START = re.compile(f"{_OPEN.pattern}|{_FENCE.pattern}|{_BARE.pattern}", re.IGNORECASE)
_FUNCTION = re.compile(r"<function=([^>\n]*)>")
_PARAMETER = re.compile(
    r"<parameter=([^>\n]*)>\n?(.*?)(?:\n?</parameter>|(?=<parameter=)|\Z)", re.DOTALL
)
_THOUGHT = re.compile(r"</think>", re.IGNORECASE)
_THINKING = re.compile(r"<think>", re.IGNORECASE)
_PARTIAL = re.compile(
    r"(?:<[a-z_\s]*|`{1,2}|(?:\[\s*(?:\{\s*)?|\{\s*)[\"'\u201c\u2018]?\w{0,12}[\"'\u201d\u2019]?\s*)\Z",
    re.IGNORECASE,
)
_LONGEST_BEGINNING = 48
_MARKS = re.compile(r"(?:\s|```[\w+-]*)+")
_BETWEEN = re.compile(r"(?:\s|```[\w+-]*|[,;])+")
_FENCE_END = re.compile(r"\s*```")


@dataclass(frozen=True)
class WrittenCall:
    """A call as it was meant. ``text`` is what was written, ``repairs`` what was mended."""

    name: str
    arguments: Mapping[str, JsonValue]
    text: str = ""
    repairs: tuple[str, ...] = ()
    id: str | None = None

    def as_call(self, id: str) -> ToolCall:
        """The call for :func:`vpt_agent.tool.execute`, under an id of ours."""
        return ToolCall(id, self.name, self.arguments, "json", repairs=self.repairs)


@dataclass(frozen=True)
class WrittenError:
    """Something that began as a call and cannot be read as one: ``message`` for the model."""

    kind: CallErrorKind
    message: str
    text: str = ""
    name: str | None = None


@dataclass(frozen=True)
class Written:
    """A model's turn: ``text`` without its calls, and the calls and errors in order."""

    text: str
    items: tuple[WrittenCall | WrittenError, ...] = ()

    @property
    def calls(self) -> tuple[WrittenCall, ...]:
        """Those that can be read."""
        return tuple(item for item in self.items if isinstance(item, WrittenCall))

    @property
    def errors(self) -> tuple[WrittenError, ...]:
        """Those that cannot."""
        return tuple(item for item in self.items if isinstance(item, WrittenError))


def read_calls(text: str, *, cut: bool = False) -> Written:
    """The calls in ``text`` and what was said around them. Takes any text, raises nothing.

    ``cut``: the text was ended from outside (a limit of tokens), so a call at its end may lack
    something that matters: only a complete one is taken. Without it the model ended its turn
    itself, or a stop string did, and missing brackets are added. Nothing inside ``<think>`` is a
    call. A text without calls is given back as it is.
    """
    scan = _Scan(text, cut, at=_after_thinking(text))
    scan.run()
    if not scan.items:
        return Written(text)
    pieces = [piece.strip() for piece in (*scan.said, text[scan.kept :])]
    return Written("\n".join(piece for piece in pieces if piece), tuple(scan.items))


def read_arguments(text: str, *, cut: bool = False) -> WrittenCall | WrittenError:
    """Arguments that came apart from the name, as servers send them (``name`` is left empty)."""
    if not text.strip():
        return WrittenCall("", {}, text)
    try:
        found = read_json(text, close=not cut)
    except UnreadableError as error:
        return _unreadable(error, text)
    rest = text[found.end :].strip()
    if rest:
        return WrittenError(
            "invalid_json", f"the arguments are no JSON: {one_line(rest, 40)!r} follows them", text
        )
    made = _arguments(found.value)
    if isinstance(made, WrittenError):
        return made
    return WrittenCall("", made[0], text, (*found.repairs, *made[1]))


def settled(text: str) -> int:
    """How many characters of a text that is still being written are surely no part of a call.

    For streaming: show ``text[:settled(text)]``, hold back the rest.
    """
    begun = _START.search(text, _after_thinking(text))
    if begun is not None:
        return begun.start()
    tail = max(0, len(text) - _LONGEST_BEGINNING)
    partial = _PARTIAL.search(text, tail)
    return len(text) if partial is None else partial.start()


def _after_thinking(text: str) -> int:
    """Where the model's words begin; the end of ``text`` if its thinking has no end."""
    ended = 0
    for found in _THOUGHT.finditer(text):
        ended = found.end()
    return len(text) if _THINKING.search(text, ended) else ended


@dataclass
class _Scan:
    """Goes through a text once. ``kept`` is the end of what was taken as calls."""

    text: str
    cut: bool
    at: int = 0
    kept: int = 0
    said: list[str] = field(default_factory=list)
    items: list[WrittenCall | WrittenError] = field(default_factory=list)

    def run(self) -> None:
        tries = 0
        while found := _START.search(self.text, self.at):
            if len(self.items) >= MOST_CALLS or tries >= 4 * MOST_CALLS:
                self.too_many(found.start())
                return
            tries += 1
            if _OPEN.match(self.text, found.start()):
                self.tagged(found.start(), found.end())
            else:
                self.untagged(found)

    def too_many(self, start: int) -> None:
        if self.items:
            message = f"a turn holds at most {MOST_CALLS} calls; the others were not read"
            self.take(start, len(self.text), [WrittenError("limit", message)])

    def take(self, start: int, end: int, items: list[WrittenCall | WrittenError]) -> None:
        self.said.append(self.text[self.kept : start])
        self.items += items
        self.at = self.kept = end

    def tagged(self, start: int, inside: int) -> None:
        """One tag, which may hold several calls."""
        items: list[WrittenCall | WrittenError] = []
        at = self.past_marks(inside)
        function = _FUNCTION.match(self.text, at)
        if function is not None:
            at = self.parameters(function, items)
        while not function and at < len(self.text) and not _tag_at(self.text, at):
            try:
                found = read_json(self.text, at, close=not self.cut)
            except UnreadableError as error:
                at = self.after_tag(at)
                items.append(_unreadable(error, self.text[inside:at]))
                break
            raw = self.text[at : found.end]
            items += _calls(found.value, raw, found.repairs, flat=True)
            at = self.past_marks(found.end, separators=True)
        if not items:
            message = "the call is cut off" if at >= len(self.text) else "the call is empty"
            items.append(WrittenError("invalid_json", message, self.text[start:at]))
        closing = _CLOSE.match(self.text, at)
        self.take(start, closing.end() if closing else at, items[:MOST_CALLS])

    def past_marks(self, at: int, *, separators: bool = False) -> int:
        """Past spaces and code fences, and past what stands between several values."""
        found = (_BETWEEN if separators else _MARKS).match(self.text, at)
        return found.end() if found else at

    def after_tag(self, at: int) -> int:
        """Where an unreadable call ends: at its closing tag, or where the next one opens."""
        marks = [found.start() for p in (_CLOSE, _OPEN) if (found := p.search(self.text, at))]
        return min(marks, default=len(self.text))

    def parameters(self, function: re.Match[str], items: list[WrittenCall | WrittenError]) -> int:
        """The form of Qwen's coder models: values are texts, which the schema turns to numbers."""
        at = self.after_tag(function.end())
        body = self.text[function.end() : at]
        whole = "</function>" in body
        body = body.split("</function>")[0]
        raw = self.text[function.start() : at]
        name = function.group(1).strip()
        if self.cut and not whole:
            items.append(WrittenError("invalid_json", "the call is cut off", raw, name))
        else:
            values: dict[str, JsonValue] = {
                found.group(1).strip(): found.group(2) for found in _PARAMETER.finditer(body)
            }
            items.append(WrittenCall(name, values, raw))
        return at

    def untagged(self, found: re.Match[str]) -> None:
        """An object in a fence or bare in the text: a call only if it has a call's shape."""
        start = found.start()
        fence = _FENCE.match(self.text, start)
        begin = fence.end() if fence else start
        try:
            value = read_json(self.text, begin, close=not self.cut)
        except UnreadableError:
            # Most of what stands in fences is no call: without a tag, nothing says it was meant.
            self.at = found.end()
            return
        raw = self.text[begin : value.end]
        items = _calls(value.value, raw, value.repairs, flat=False)
        if not items or not all(isinstance(item, WrittenCall) for item in items):
            self.at = found.end()
            return
        end = value.end
        closing = _FENCE_END.match(self.text, end) if fence else None
        self.take(start, closing.end() if closing else end, items[:MOST_CALLS])


def _tag_at(text: str, at: int) -> bool:
    return _CLOSE.match(text, at) is not None or _OPEN.match(text, at) is not None


def _unreadable(error: UnreadableError, text: str) -> WrittenError:
    if error.cut:
        return WrittenError("invalid_json", "the call is cut off", text)
    return WrittenError("invalid_json", f"the call is no JSON: {error}", text)


def _calls(
    value: JsonValue, raw: str, repairs: tuple[str, ...], *, flat: bool
) -> list[WrittenCall | WrittenError]:
    """What a value means; an empty list if, without a tag, it is no call."""
    entries = list(_entries(value))
    made = [_call(entry, raw, repairs, flat=flat) for entry in entries]
    found = [item for item in made if item is not None]
    return found if flat or len(found) == len(made) else []


def _entries(value: JsonValue) -> Iterator[JsonValue]:
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    if isinstance(value, list):
        yield from value[: MOST_CALLS + 1]
    else:
        yield value


def _call(
    value: JsonValue, raw: str, repairs: tuple[str, ...], *, flat: bool
) -> WrittenCall | WrittenError | None:
    """One entry as a call. ``flat``: its arguments may stand beside the name."""
    if not isinstance(value, dict):
        return _nameless(raw) if flat else None
    id_ = value.get("id")
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name_key = next((k for k in _NAMES if isinstance(value.get(k), str) and value[k]), None)
    value_key = next((k for k in _VALUES if k in value), None)
    if name_key is None:
        return _nameless(raw) if flat else None
    name, id_ = str(value[name_key]).strip(), id_ if isinstance(id_, str) else None
    if value_key is None:
        if not flat:
            return None
        rest = {k: v for k, v in value.items() if k not in (name_key, "id", "type")}
        if rest:
            repairs = (*repairs, "arguments beside the name were taken")
        return WrittenCall(name, rest, raw, repairs, id_)
    made = _arguments(value[value_key])
    if isinstance(made, WrittenError):
        return WrittenError(made.kind, made.message, raw, name) if flat else None
    return WrittenCall(name, made[0], raw, (*repairs, *made[1]), id_)


def _nameless(raw: str) -> WrittenError:
    message = 'a call is {"name": ..., "arguments": {...}}; this has no name'
    return WrittenError("invalid_json", message, raw)


def _arguments(
    value: JsonValue,
) -> tuple[dict[str, JsonValue], tuple[str, ...]] | WrittenError:
    """Arguments as an object; OpenAI's convention has them as its text."""
    if value is None:
        return {}, ()
    if isinstance(value, str):
        if not value.strip():
            return {}, ()
        try:
            found = read_json(value, close=False)
        except UnreadableError as error:
            return _unreadable(error, value)
        value, repairs = found.value, found.repairs
    else:
        repairs = ()
    if not isinstance(value, dict):
        message = "the arguments are no object with names and values"
        return WrittenError("invalid_arguments", message)
    return value, repairs
