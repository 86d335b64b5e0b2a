"""Which questions `perception.py` asks under which setting, and how many: its cells.

| setting | asked |
|---|---|
| no tools, free choice | every question |
| a forced kind, where the question needs it (or it can serve) | every question |
| a forced kind elsewhere | the first `others` of each type |
| a switch thrown | the first of each type its kind serves, `switched` in all |
| a model without perception tokens | the first `baseline` of each type |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vpt_agent.evaluation import Setting

Place = tuple[str, int]
"""An item's type of question, and how many of the type come before it."""
READING = "read"
"""The one type of the first version's domain."""


def by_type(ids: Iterable[str]) -> dict[str, Place]:
    """The places of the second domain's items, whose ids are ``split-type-seed...``."""
    seen: Counter[str] = Counter()
    found = {}
    for id in ids:
        kind = id.split("-")[1]
        found[id] = (kind, seen[kind])
        seen[kind] += 1
    return found


def alike(ids: Iterable[str]) -> dict[str, Place]:
    """The places of items of the first domain: all must be read, by a region."""
    return {id: (READING, number) for number, id in enumerate(ids)}


def serves(kind: str, type: str) -> bool:
    """Whether calling ``kind`` may answer questions of ``type``."""
    from vpt_agent.nano.domain import TYPES

    if type == READING:
        return kind == "region"
    return any(kind in need for need in TYPES[type].needs)


@dataclass(frozen=True)
class Cells:
    """Whether an item (its id) is asked under a setting; see the module's text.

    ``places`` are those of all items of a split, ``baselines`` the names of settings of models
    without perception tokens.
    """

    places: Mapping[str, Place]
    baselines: Collection[str] = ()
    switched: int = 300
    others: int = 40
    baseline: int = 80

    def __call__(self, id: str, setting: Setting) -> bool:
        """Whether it is asked."""
        type, number = self.places[id]
        if setting.name in self.baselines:
            return number < self.baseline
        if not setting.kind:
            return True
        if setting.switches:
            types = {t for t, _ in self.places.values() if serves(setting.kind, t)}
            return type in types and number < -(-self.switched // max(1, len(types)))
        return serves(setting.kind, type) or number < self.others
