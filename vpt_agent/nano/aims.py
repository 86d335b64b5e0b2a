"""The aims of the shipped model, and whether the figures meet them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vpt_agent.evaluation import FREE, Table
from vpt_agent.evaluation.tables import interval_text

Figures = Mapping[str, Any]
REENCODING = ("clip", "dino", "sam")


@dataclass(frozen=True)
class Aim:
    """What is wanted: ``figure`` at or above ``least``. None was not run."""

    what: str
    least: float
    figure: Figures | None

    @property
    def verdict(self) -> str:
        """``met``, ``missed``, or ``not run``; the interval says how sure that is."""
        if not self.figure or self.figure.get("value") is None:
            return "not run"
        return "met" if self.figure["value"] >= self.least else "missed"


def aims_of(splits: Mapping[str, Figures]) -> Iterator[Aim]:
    """The aims against the figures of ``benchmarks/perception.py``, by split.

    Exact match and choices are those of a model that chooses freely. A loss is how much exact match
    falls, over the items that need the kind, when the switch is thrown.
    """
    new, unseen = splits.get("train", {}), splits.get("unseen", {})
    yield Aim("exact match, region questions, new scenes", 0.97, _needing_region(new))
    yield Aim(
        "exact match, region questions, fonts and backgrounds never trained on",
        0.90,
        _needing_region(unseen),
    )
    choices = new.get("choices", {}).get(FREE.name, {})
    yield Aim("calls of a needed kind, free choice", 0.95, choices.get("calls_needed"))
    yield Aim("needless calls avoided, free choice", 0.90, choices.get("needless_avoided"))
    yield Aim(
        "loss by a random region, where looking is needed",
        0.30,
        _loss(new, "region", "crop", "random"),
    )
    for kind in REENCODING:
        yield Aim(
            f"loss by c at zero, where {kind} is needed",
            0.10,
            _loss(new, kind, "condition", "zero"),
        )


def aims_table(splits: Mapping[str, Figures]) -> Table:
    """Aim, figure, verdict."""
    rows = tuple(
        (aim.what, f"{aim.least:.2f}", interval_text(aim.figure), aim.verdict)
        for aim in aims_of(splits)
    )
    return Table(
        "Aims",
        ("aim", "at least", "measured", "is"),
        rows,
        "Met or missed by the figure itself; where its interval holds the aim, it is close.",
    )


def _needing_region(figures: Figures) -> Figures | None:
    found: Figures | None = (
        figures.get("results", {}).get(FREE.name, {}).get("by_need", {}).get("region")
    )
    return found


def _loss(figures: Figures, kind: str, switch: str, value: str) -> Figures | None:
    """How much the one switch costs, as a positive figure; None if it was not thrown."""
    alone = {
        s["name"]
        for s in figures.get("settings", ())
        if s["kind"] == kind
        and {k: v for k, v in s["switches"].items() if v != "kept"} == {switch: value}
    }
    for found in figures.get("differences", ()):
        if found["setting"] in alone and found["needed"]["value"] is not None:
            lost = found["needed"]
            # 0 - x, not -x: no loss is 0, not -0.
            ends = {"low": 0 - lost["high"], "high": 0 - lost["low"]}
            return {"value": 0 - lost["value"], **ends}
    return None
