"""JSON as models write it: read strictly where it is JSON, tolerantly where it nearly is.

What is mended is said: single and curly quotes, Python's ``True``, ``None`` and tuples, names
without quotes, trailing commas, comments, line breaks in texts, brackets that a stop cut off. What
has two readings is not guessed: a text without its end, or half a number, is an error.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from pydantic import JsonValue

MOST_DEPTH = 64
"""How deep values may be nested; far beyond any schema, and below Python's own limit."""

_SPACE = re.compile(r"\s+")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_NUMERIC = re.compile(r"[0-9.eE+-]+")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_WORDS: dict[str, JsonValue] = {
    "true": True, "false": False, "null": None, "True": True, "False": False, "None": None,
}  # fmt: skip
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019"}
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_LONGEST_NUMBER = 400


class UnreadableError(ValueError):
    """This is no JSON, however kindly it is read. ``position`` is where reading stopped;
    ``cut`` says that the text ended too early and was right until then."""

    def __init__(self, message: str, position: int, *, cut: bool = False) -> None:
        self.position, self.cut = position, cut
        super().__init__(message)


@dataclass(frozen=True)
class Lenient:
    """A value, where it ended in the text, and what had to be mended to read it."""

    value: JsonValue
    end: int
    repairs: tuple[str, ...] = ()


def read_json(text: str, start: int = 0, *, close: bool = True) -> Lenient:
    """The JSON value at ``start`` (behind spaces); what follows it is left alone.

    ``close``: brackets that are open where the text ends count as closed; without it they are an
    error, since a number there may be half of one. Raises :class:`UnreadableError`.
    """
    begin = _skip_space(text, start)
    try:
        value, end = _STRICT.raw_decode(text, begin)
        if close or end < len(text) or not isinstance(value, int | float):
            return Lenient(value, end)
    except (ValueError, RecursionError):
        pass
    reader = _Reader(text, begin, close)
    value = reader.value(0)
    return Lenient(value, reader.at, tuple(dict.fromkeys(reader.repairs)))


def _no_constant(name: str) -> JsonValue:
    raise ValueError(f"{name} is no JSON")


def _short_int(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError("a number is too long")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return number


_STRICT = json.JSONDecoder(
    parse_constant=_no_constant, parse_int=_short_int, parse_float=_finite, strict=True
)


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


@dataclass
class _Reader:
    """Recursive descent; ``at`` is where it stands."""

    text: str
    at: int
    close: bool
    repairs: list[str] = field(default_factory=list)

    def skip(self) -> None:
        """Past spaces and comments."""
        while True:
            self.at = _skip_space(self.text, self.at)
            comment = _COMMENT.match(self.text, self.at)
            if comment is None:
                return
            self.repairs.append("comments were left out")
            self.at = comment.end()

    def peek(self) -> str:
        self.skip()
        return self.text[self.at : self.at + 1]

    def fail(self, message: str, *, cut: bool = False) -> UnreadableError:
        self.at = min(self.at, len(self.text))
        return UnreadableError(f"{message} at character {self.at + 1}", self.at, cut=cut)

    def value(self, depth: int) -> JsonValue:
        if depth > MOST_DEPTH:
            raise self.fail("it is nested too deeply")
        first = self.peek()
        if not first:
            raise self.fail("it ends where a value should be", cut=True)
        if first == "{":
            return self.object(depth)
        if first in "[(":
            return self.array(depth)
        if first in _QUOTES:
            return self.string()
        if first in "+-.0123456789":
            return self.number()
        return self.word()

    def object(self, depth: int) -> dict[str, JsonValue]:
        self.at += 1
        found: dict[str, JsonValue] = {}
        while not self.closed("}", found):
            name = self.name()
            if self.peek() != ":":
                end = not self.peek()
                raise self.fail("there is no ':' behind a name", cut=end)
            self.at += 1
            found[name] = self.value(depth + 1)
        return found

    def array(self, depth: int) -> list[JsonValue]:
        closer = _CLOSERS[self.text[self.at]]
        if closer == ")":
            self.repairs.append("a tuple was read as a list")
        self.at += 1
        found: list[JsonValue] = []
        while not self.closed(closer, found):
            found.append(self.value(depth + 1))
        return found

    def closed(self, closer: str, found: dict[str, JsonValue] | list[JsonValue]) -> bool:
        """Past a comma, to the next member (False) or behind the end of the container (True)."""
        here = self.peek()
        comma = here == "," and bool(found)
        if comma:
            self.at += 1
            here = self.peek()
        if here == closer:
            if comma:
                self.repairs.append("a comma before a closing bracket was left out")
            self.at += 1
            return True
        if not here:
            if not self.close:
                raise self.fail("it ends before its closing bracket", cut=True)
            self.repairs.append("missing closing brackets were added")
            return True
        if found and not comma:
            raise self.fail(f"there is {here!r} where ',' or {closer!r} should be")
        return False

    def name(self) -> str:
        here = self.peek()
        if here in _QUOTES:
            return self.string()
        word = _WORD.match(self.text, self.at)
        if word is None:
            raise self.fail(f"there is {here!r} where a name should be")
        self.repairs.append("a name without quotes was taken")
        self.at = word.end()
        return word.group()

    def string(self) -> str:
        opened = self.text[self.at]
        closer = _QUOTES[opened]
        if opened != '"':
            self.repairs.append('other quotes than " were taken')
        self.at += 1
        out: list[str] = []
        while True:
            here = self.text[self.at : self.at + 1]
            if not here:
                raise self.fail("a text has no end", cut=True)
            if here == "\\":
                out.append(self.escape())
                continue
            self.at += 1
            if here == closer and (opened == '"' or self.ends_here()):
                return _paired("".join(out))
            if here in "\n\r\t":
                self.repairs.append("line breaks in a text were taken")
            out.append(here)

    def ends_here(self) -> bool:
        """Whether a quote other than ``"`` ends its text: an apostrophe stands before letters."""
        rest = _skip_space(self.text, self.at)
        return self.text[rest : rest + 1] in ("", ",", ":", "}", "]", ")")

    def escape(self) -> str:
        self.at += 2
        here = self.text[self.at - 1 : self.at]
        if not here:
            raise self.fail("a text has no end", cut=True)
        if width := {"u": 4, "x": 2, "U": 8}.get(here, 0):
            digits = self.text[self.at : self.at + width]
            whole = re.fullmatch(f"[0-9a-fA-F]{{{width}}}", digits)
            if whole and int(digits, 16) <= 0x10FFFF:
                self.at += width
                return chr(int(digits, 16))
        if here not in '"\\/bfnrt':
            self.repairs.append("an unknown escape in a text was taken as it stands")
        return _ESCAPES.get(here, here)

    def number(self) -> int | float:
        found = _NUMBER.match(self.text, self.at)
        run = _NUMERIC.match(self.text, self.at)
        whole = found is not None and run is not None and found.end() == run.end()
        if run is not None and run.end() == len(self.text) and not (whole and self.close):
            raise self.fail("it ends in a number, which may go on", cut=True)
        if found is None:
            raise self.fail("this is no number")
        digits = found.group()
        if len(digits) > _LONGEST_NUMBER:
            raise self.fail("a number is too long")
        self.at = found.end()
        if re.fullmatch(r"[+-]?\d+", digits):
            return int(digits)
        try:
            return _finite(digits)
        except ValueError as error:
            raise self.fail(str(error)) from error

    def word(self) -> JsonValue:
        found = _WORD.match(self.text, self.at)
        word = found.group() if found else self.text[self.at]
        if word not in _WORDS:
            end = found is not None and found.end() == len(self.text)
            cut = end and any(known.startswith(word) for known in _WORDS)
            raise self.fail(f"there is {word[:20]!r} where a value should be", cut=cut)
        if word[0].isupper():
            self.repairs.append("Python's True, False and None were taken")
        self.at += len(word)
        return _WORDS[word]


def _paired(text: str) -> str:
    """``text`` with the two halves of a character, written as two escapes, put together."""
    if not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
