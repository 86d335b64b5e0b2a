"""What may stand between the start and the end of a call: one reader for each payload.

A reader knows the ids of one row and holds no progress: ``read`` are the ids after the start.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vpt_agent.tokens.grid import enclosing
from vpt_agent.tokens.pattern import TextPattern
from vpt_agent.tokens.table import ResolvedKind

Arguments = dict[str, Any]
Ids = tuple[int, ...]


class PayloadReader(Protocol):
    """How the payload of one row is read and generated."""

    @property
    def wanted(self) -> str:
        """What stands there, in the words of an error."""

    def may_hold(self, read: Ids, token: int) -> bool:
        """Whether ``token`` has a place after ``read``, when a call is read."""

    def close(self, read: Ids) -> Arguments | str:
        """The arguments that ``read`` spells; or, in words, why it is no whole payload."""

    def allowed(self, read: Ids) -> frozenset[int]:
        """Ids that may be generated after ``read``, the row's end among them; never empty."""

    def summary(self, read: Ids) -> Hashable:
        """What of ``read`` decides which ids may be generated, now and later."""


@dataclass(frozen=True)
class FixedPayload:
    """The control tokens, or nothing: no choice."""

    ids: Ids
    end: int

    @property
    def wanted(self) -> str:
        """What stands there."""
        return f"{len(self.ids)} control token(s)"

    def may_hold(self, read: Ids, token: int) -> bool:
        """Whether it is the next one."""
        return len(read) < len(self.ids) and self.ids[len(read)] == token

    def close(self, read: Ids) -> Arguments | str:
        """No arguments."""
        return {} if read == self.ids else f"it ends after {len(read)} control token(s)"

    def allowed(self, read: Ids) -> frozenset[int]:
        """The one that comes next."""
        return frozenset((self.ids[len(read)] if len(read) < len(self.ids) else self.end,))

    def summary(self, read: Ids) -> Hashable:
        """How many there are."""
        return len(read)


@dataclass(frozen=True)
class GridPayload:
    """Coordinates: read in any order and number, generated as x_min, y_min, x_max, y_max."""

    row: ResolvedKind
    x: Mapping[int, int]  # id -> column
    y: Mapping[int, int]  # id -> row
    argument: str

    @property
    def wanted(self) -> str:
        """What stands there."""
        return "coordinates"

    def may_hold(self, read: Ids, token: int) -> bool:
        """Any coordinate."""
        return token in self.x or token in self.y

    def close(self, read: Ids) -> Arguments | str:
        """The region that encloses them."""
        xs = [self.x[t] for t in read if t in self.x]
        ys = [self.y[t] for t in read if t in self.y]
        cells = enclosing(xs, ys)
        if cells is not None:
            return {self.argument: list(cells)}
        lacks = " and ".join(n for n, found in (("x", xs), ("y", ys)) if not found)
        return f"it has no {lacks} coordinate"

    def allowed(self, read: Ids) -> frozenset[int]:
        """The next coordinate with min <= max; ids in another order are completed."""
        xs = [self.x[t] for t in read if t in self.x]
        ys = [self.y[t] for t in read if t in self.y]
        if self._in_order(read) and len(read) < 4:
            ids, low = (self.row.x, xs) if len(read) % 2 == 0 else (self.row.y, ys)
            return frozenset(ids[low[0] if low else 0 :])
        if not xs or not ys:
            return frozenset(self.row.y if xs else self.row.x)
        return frozenset((self.row.end,))

    def _in_order(self, read: Ids) -> bool:
        return all((t in self.x) == (i % 2 == 0) for i, t in enumerate(read))

    def summary(self, read: Ids) -> Hashable:
        """How many there are, and the smallest that may still come."""
        if not self._in_order(read) or len(read) > 4:
            return read
        # The largest column is bounded by the smallest one, and is then of no account.
        lows = read if len(read) < 3 else read[1:2] if len(read) == 3 else ()
        return len(read), lows


@dataclass(frozen=True)
class TextPayload:
    """A text of the row's pattern, one character a token."""

    pattern: TextPattern
    letters: Mapping[int, str]  # id -> character
    ids: Mapping[str, int]  # character -> id
    end: int
    argument: str

    @property
    def wanted(self) -> str:
        """What stands there."""
        return f"text like {self.pattern.source}, one character a token"

    def _text(self, read: Ids) -> str:
        return "".join(self.letters[token] for token in read)

    def may_hold(self, read: Ids, token: int) -> bool:
        """A character with which a text of the pattern can go on."""
        found = self.pattern.following(self._text(read))
        return found is not None and self.letters.get(token, "\0") in found[0]

    def close(self, read: Ids) -> Arguments | str:
        """The text, as the row's argument."""
        text = self._text(read)
        return {self.argument: text} if self.pattern.fits(text) else f"{text!r} is no whole text"

    def allowed(self, read: Ids) -> frozenset[int]:
        """The characters that may come next, and the end where the text may end."""
        found = self.pattern.following(self._text(read))
        assert found is not None, "only what fits was read"
        characters, may_end = found
        ids = frozenset(self.ids[c] for c in characters)
        return ids | {self.end} if may_end else ids

    def summary(self, read: Ids) -> Hashable:
        """Where in the pattern the text may stand."""
        return self.pattern.places(self._text(read))


def reader_of(row: ResolvedKind, controls: int) -> PayloadReader:
    """The reader for a row; ``controls`` is the number of control tokens of a call."""
    kind = row.kind
    if kind.payload == "grid":
        return GridPayload(
            row,
            {token: i for i, token in enumerate(row.x)},
            {token: i for i, token in enumerate(row.y)},
            kind.argument or "region",
        )
    if kind.payload == "text":
        letters = dict(zip(row.characters, kind.characters, strict=True))
        ids = {character: token for token, character in letters.items()}
        return TextPayload(TextPattern.parse(kind.pattern), letters, ids, row.end, kind.argument)
    controls_of = () if row.control is None else (row.control,) * controls
    return FixedPayload(controls_of, row.end)
