"""Reads the score from a judge model's reply: as published, and without guessing."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PUBLISHED = re.compile(r"[01]\.?\d*")
_NUMBER = r"[-+]?(?:\d+(?:[.,]\d+)?|\.\d+)(?:\s*/\s*\d+|%)?"
_NAMED = re.compile(rf"\bscore\b[\s*_\"']*[:=][\s*_\"'<(\[]*({_NUMBER})", re.IGNORECASE)
_BARE = re.compile(rf"\s*({_NUMBER})\s*\.?\s*")
_PLAIN = re.compile(r"(?:[01]|0?\.\d+|[01]\.\d+)")


def published_score(reply: str) -> float:
    """The first number that begins with 0 or 1, whatever it means; 0 where there is none.

    FACTS section 8: 10 for "5/10", 1 for "The 1st answer. score: 0.2". To compare with published
    figures only; :func:`read_verdict` refuses what it would have to guess.
    """
    found = _PUBLISHED.search(reply)
    return float(found.group()) if found else 0.0


@dataclass(frozen=True)
class Verdict:
    """A score from 0 to 1, or None and the ``reason`` why the reply gives none."""

    score: float | None
    reason: str = ""


def read_verdict(reply: str) -> Verdict:
    """The one score that ``reply`` states: ``score: NUMBER``, or nothing but a number.

    Refused are replies without a score or with different ones, numbers outside 0..1, and forms
    that could mean several things (``5/10``, ``0,8``, ``80%``, ``01``).
    """
    named = _NAMED.findall(reply)
    bare = _BARE.fullmatch(reply)
    stated = list(dict.fromkeys(named or ([bare.group(1)] if bare else [])))
    if not stated:
        return Verdict(None, "the reply states no score")
    if len(stated) > 1:
        return Verdict(None, f"the reply states several scores: {', '.join(stated)}")
    number = stated[0]
    if not _PLAIN.fullmatch(number):
        return Verdict(None, f"{number} is not a plain number from 0 to 1")
    score = float(number)
    if score > 1:
        return Verdict(None, f"{number} is above 1")
    return Verdict(score)
