"""The text that a call may carry, as a pattern: which characters may come next, and may it end.

A pattern is a regular expression in a small part of the usual language: characters, classes
(``[A-Z0-9]``), ``\\d``, and the counts ``?``, ``{n}`` and ``{m,n}``. Every text has an end, and
every beginning of a text can be brought to one: so a call that is spelled under the pattern cannot
be malformed. ``re.fullmatch`` and JSON Schema read the same pattern in the same way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from vpt_agent.errors import UserError

LONGEST = 256
"""Characters, at most, of a text in a call."""

_COUNT = re.compile(r"\{(\d+)(?:,(\d+))?\}")
_META = frozenset(".^$*+?{}[]|()")
_DIGITS = "0123456789"


@dataclass(frozen=True)
class Piece:
    """``least`` to ``most`` characters, each one of ``characters`` (no repeats, in order)."""

    characters: str
    least: int = 1
    most: int = 1


@dataclass(frozen=True)
class TextPattern:
    """A sequence of pieces. Make one with :meth:`parse`."""

    source: str
    pieces: tuple[Piece, ...]

    @classmethod
    def parse(cls, source: str) -> TextPattern:
        """Read a pattern. What this small language does not have is a :class:`UserError`."""
        return _parse(source)

    @cached_property
    def characters(self) -> str:
        """Every character that some text of the pattern has, once, in the pattern's order."""
        return "".join(dict.fromkeys(c for piece in self.pieces for c in piece.characters))

    @property
    def longest(self) -> int:
        """Characters of the longest text."""
        return sum(piece.most for piece in self.pieces)

    def following(self, text: str) -> tuple[str, bool] | None:
        """What may come after ``text``: the characters, and whether the text may end there.

        None if no text of the pattern begins with ``text``. Never ``("", False)``.
        """
        places = self.places(text)
        if not places:
            return None
        open_ = {
            at for at, count in places if at < len(self.pieces) and count < self.pieces[at].most
        }
        allowed = dict.fromkeys(c for at in sorted(open_) for c in self.pieces[at].characters)
        return "".join(allowed), (len(self.pieces), 0) in places

    def places(self, text: str) -> frozenset[tuple[int, int]]:
        """Where in the pattern ``text`` may have come to: (piece, characters read of it). Texts
        with the same places go on in the same ways; there are none if no text begins so."""
        places = self._reach({(0, 0)})
        for character in text:
            places = self._reach(
                {
                    (at, count + 1)
                    for at, count in places
                    if at < len(self.pieces)
                    and count < self.pieces[at].most
                    and character in self.pieces[at].characters
                }
            )
        return frozenset(places)

    def fits(self, text: str) -> bool:
        """Whether the whole of ``text`` is of this pattern."""
        found = self.following(text)
        return found is not None and found[1]

    def _reach(self, places: set[tuple[int, int]]) -> set[tuple[int, int]]:
        """``places`` (piece, characters read of it), and those reached without a character."""
        reached = set(places)
        for at, count in places:
            while at < len(self.pieces) and count >= self.pieces[at].least:
                at, count = at + 1, 0
                reached.add((at, count))
        return reached


@lru_cache(maxsize=256)
def _parse(source: str) -> TextPattern:
    pieces: list[Piece] = []
    at = 0
    while at < len(source):
        characters, at = _class(source, at) if source[at] == "[" else _one(source, at)
        least, most, at = _count(source, at)
        if most:
            pieces.append(Piece("".join(dict.fromkeys(characters)), least, most))
    pattern = TextPattern(source, tuple(pieces))
    _check(pattern)
    return pattern


def _wrong(source: str, at: int, what: str) -> UserError:
    return UserError(
        "this pattern of a call's text cannot be used",
        where=f"{source!r}, character {at}",
        got=what,
        expected=r"characters, classes such as [A-Z0-9], \d, and counts ?, {n}, {m,n}; a backslash "
        "before a character that has a meaning",
    )


def _one(source: str, at: int) -> tuple[str, int]:
    """One character outside a class, or what a backslash stands for."""
    character = source[at]
    if character == "\\":
        return _escaped(source, at)
    if character in _META:
        raise _wrong(source, at, character)
    return character, at + 1


def _escaped(source: str, at: int) -> tuple[str, int]:
    following = source[at + 1 : at + 2]
    if following == "d":
        return _DIGITS, at + 2
    if not following or following.isalnum():
        raise _wrong(source, at, f"\\{following}")
    return following, at + 2


def _class(source: str, at: int) -> tuple[str, int]:
    """The characters of a class that begins at ``at``, and where it ends."""
    begin, found = at, list[str]()
    at += 1
    while at < len(source) and source[at] != "]":
        if source[at] == "^" and at == begin + 1:
            raise _wrong(source, at, "a class of what may not stand there")
        low, at = _escaped(source, at) if source[at] == "\\" else (source[at], at + 1)
        if source[at : at + 1] == "-" and source[at + 1 : at + 2] not in ("", "]"):
            high, after = (
                _escaped(source, at + 1) if source[at + 1] == "\\" else (source[at + 1], at + 2)
            )
            if len(low) != 1 or len(high) != 1 or low > high:
                raise _wrong(source, at, f"{low}-{high}")
            found += map(chr, range(ord(low), ord(high) + 1))
            at = after
        else:
            found += low
    if at >= len(source) or not found:
        raise _wrong(source, begin, "a class that is empty or has no end")
    return "".join(found), at + 1


def _count(source: str, at: int) -> tuple[int, int, int]:
    """Least and most of the piece that ends before ``at``, and where its count ends."""
    if source[at : at + 1] == "?":
        return 0, 1, at + 1
    if source[at : at + 1] != "{":
        return 1, 1, at
    found = _COUNT.match(source, at)
    if found is None:
        raise _wrong(source, at, source[at : at + 6])
    least = int(found[1])
    most = least if found[2] is None else int(found[2])
    if least > most:
        raise _wrong(source, at, found[0])
    return least, most, found.end()


def _check(pattern: TextPattern) -> None:
    other = sorted(c for c in pattern.characters if not " " <= c <= "~")
    if other:
        raise UserError(
            "a call's text is spelled one character a token, so it has plain ASCII only",
            where=repr(pattern.source),
            got=", ".join(map(repr, other[:5])),
        )
    if pattern.longest > LONGEST or not any(piece.least for piece in pattern.pieces):
        raise UserError(
            "a call's text has a length that it cannot have",
            where=repr(pattern.source),
            got=f"{sum(p.least for p in pattern.pieces)} to {pattern.longest} characters",
            expected=f"at least 1 and at most {LONGEST}",
            fix="a call without an argument has the payload 'none'",
        )
