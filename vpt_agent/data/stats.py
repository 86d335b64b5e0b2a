"""Figures of a set of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vpt_agent.data.check import ALL_KINDS, picture_size
from vpt_agent.data.encode import Dropped, RowEncoder
from vpt_agent.data.pictures import row_views
from vpt_agent.data.rows import Row
from vpt_agent.tokens.grammar import ParsedCall, read_text
from vpt_agent.tokens.table import PerceptionTable


@dataclass
class RowStats:
    """Counts over rows.

    ``kinds`` counts rows by the kinds called in them (``direct``: none), ``calls`` the calls of
    each kind, ``types`` the questions by type where ``meta`` says it, ``triggers`` the rows with a
    trigger phrase. ``sides`` are the longest sides of the pictures in pixels, each picture once;
    ``crops`` the shares of their picture's area that crops take. With an encoder, ``tokens`` are
    the lengths of whole rows and ``outcomes`` what became of them.
    """

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    types: Counter[str] = field(default_factory=Counter)
    triggers: int = 0
    sides: list[int] = field(default_factory=list)
    crops: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: counts as they are, lists as smallest, quartiles and largest."""
        return {
            "rows": self.rows,
            "kinds": dict(self.kinds.most_common()),
            "calls": dict(self.calls.most_common()),
            "types": dict(self.types.most_common()),
            "triggers": self.triggers,
            "pictures": len(self.sides),
            "longest_side": spread(self.sides),
            "crop_share": spread(self.crops),
            "tokens": spread(self.tokens),
            "outcomes": dict(self.outcomes),
        }


def row_stats(
    rows: Iterable[Row], *, table: PerceptionTable | None = None, encoder: RowEncoder | None = None
) -> RowStats:
    """Figures of ``rows``; their pictures must be there.

    With ``encoder`` each row is encoded too, which decodes its pictures.
    """
    table = table or (encoder.layout.table if encoder is not None else ALL_KINDS)
    phrases = {kind.trigger for kind in table.kinds if kind.trigger}
    stats, sizes = RowStats(), dict[str, tuple[int, int]]()
    for row in rows:
        stats.rows += 1
        said = "\n".join(m.content for m in row.messages if m.role == "assistant")
        calls = [e.kind for e in read_text(said, table) if isinstance(e, ParsedCall)]
        stats.calls.update(calls)
        stats.kinds["+".join(sorted(set(calls))) or "direct"] += 1
        if "type" in row.meta:
            stats.types[str(row.meta["type"])] += 1
        asked = row.messages[0].content
        stats.triggers += any(phrase in asked for phrase in phrases)
        for refs in row.pictures.values():
            for ref in refs:
                if ref.path not in sizes:
                    sizes[ref.path] = picture_size(ref.path)
                    stats.sides.append(max(sizes[ref.path]))
                if ref.crop is not None:
                    left, upper, right, lower = ref.crop
                    width, height = sizes[ref.path]
                    stats.crops.append((right - left) * (lower - upper) / (width * height))
        if encoder is not None:
            got = encoder.encode(row, row_views(row))
            stats.tokens.append(
                got.length if isinstance(got, Dropped) else len(got.labels) + got.cut
            )
    if encoder is not None:
        stats.outcomes = Counter(encoder.counts)
    return stats


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, quartiles, largest; empty of nothing."""
    if not values:
        return {}
    order = sorted(values)
    last = len(order) - 1
    names = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "max": 1.0}
    return {name: round(order[round(place * last)], 4) for name, place in names.items()}
