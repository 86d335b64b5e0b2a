"""Figures as tables in Markdown, for a terminal and for a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A titled table; ``note`` says how to read it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def to_markdown(self) -> str:
        """With its columns aligned."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]

        def line(cells: Sequence[str]) -> str:
            padded = (c.ljust(w) for c, w in zip(cells, widths, strict=True))
            return "| " + " | ".join(padded) + " |"

        rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
        body = [line(self.columns), rule, *(line(row) for row in self.rows)]
        note = ["", self.note] if self.note else []
        return "\n".join([f"## {self.title}", "", *body, *note])


def interval_text(figure: Figures | None, *, signed: bool = False) -> str:
    """``0.812 [0.79, 0.83]``; a dash where nothing was measured."""
    if not figure or figure.get("value") is None:
        return "-"
    sign = "+" if signed else ""
    return f"{figure['value']:{sign}.3f} [{figure['low']:{sign}.2f}, {figure['high']:{sign}.2f}]"


def tables_of(figures: Figures, *, untrained: Iterable[str] = ()) -> list[Table]:
    """All tables of :func:`vpt_agent.evaluation.summarise`. ``untrained`` kinds are said to be."""
    found = [_exact(figures, list(untrained)), _differences(figures), _costs(figures)]
    if figures["regions"]:
        found.append(_regions(figures))
    if figures["choices"]:
        found.append(_choices(figures))
        found.append(_calls(figures))
    if figures["states"]:
        found.append(_states(figures))
    return found


def _types(figures: Figures) -> list[str]:
    names = {t for r in figures["results"].values() for t in r["by_type"]}
    return sorted(names - {""})


def _exact(figures: Figures, untrained: Sequence[str]) -> Table:
    types = _types(figures)
    rows = []
    for name, found in figures["results"].items():
        cells = [interval_text(found["by_type"].get(t)) for t in types]
        rows.append((name, str(found["n"]), interval_text(found["exact"]), *cells))
    for kind in untrained:
        rows.append((kind, "0", "untrained", *["untrained" for _ in types]))
    failed = sum(r["failed"] for r in figures["results"].values())
    skipped = {n: r["skipped"] for n, r in figures["results"].items() if r["skipped"]}
    note = "Exact match with 95 % intervals (Wilson)."
    if len({r["n"] for r in figures["results"].values()}) > 1:
        note += (
            " Not every setting was asked every question: compare types of questions, or see the "
            "differences, which are of the same items."
        )
    if failed:
        note += f" {failed} answers failed; they count as wrong."
    for name, count in skipped.items():
        note += f" {count} items could not be asked under '{name}'."
    if untrained:
        note += f" Untrained kinds of this model were not run: {', '.join(untrained)}."
    return Table("Exact match", ("setting", "n", "all", *types), tuple(rows), note)


def _differences(figures: Figures) -> Table:
    types = _types(figures)
    rows = []
    for found in figures["differences"]:
        p = found["all"].get("p")
        rows.append(
            (
                found["setting"],
                found["against"],
                interval_text(found["all"], signed=True),
                interval_text(found["needed"], signed=True),
                "-" if p is None else f"{p:.2g}",
                *(interval_text(found["by_type"].get(t), signed=True) for t in types),
            )
        )
    return Table(
        "Differences on the same items",
        ("setting", "against", "all", "where its kind is needed", "p", *types),
        tuple(rows),
        "Exact match of the setting minus that of the other, item by item: 95 % intervals "
        "(Agresti and Min), p by McNemar's exact test over all.",
    )


def _costs(figures: Figures) -> Table:
    rows = tuple(
        (
            name,
            interval_text(r["called"]),
            str(r["calls"]),
            interval_text(r["invalid"]),
            f"{r['visual_tokens']:.0f}",
            f"{r['forward_tokens']:.0f}",
            f"{r['seconds']:.2f}",
        )
        for name, r in figures["results"].items()
    )
    columns = ("setting", "items with a call", "calls", "invalid calls", "visual tokens",
               "positions", "seconds")  # fmt: skip
    return Table(
        "Calls and costs",
        columns,
        rows,
        "Visual tokens, positions of the language model and seconds are means per answer.",
    )


def _regions(figures: Figures) -> Table:
    rows = []
    for setting, groups in figures["regions"].items():
        for group, r in groups.items():
            rows.append(
                (
                    setting,
                    group,
                    str(r["objects"]),
                    interval_text(r["iou"]),
                    interval_text(r["iogt"]),
                    interval_text(r["inside"]),
                )
            )
    return Table(
        "Regions against true boxes",
        ("setting", "objects", "n", "IoU", "IoGT", "wholly inside"),
        tuple(rows),
        "Small objects cover under 1/64 of the picture. An object that no region was shown for "
        "counts as 0. IoGT is the share of the object that the region covers.",
    )


def _choices(figures: Figures) -> Table:
    rows = []
    for setting, found in figures["choices"].items():
        rows.append((setting, "all calls", interval_text(found["calls_needed"]), "-"))
        rows.append((setting, "items that need a call", "-", interval_text(found["needed_called"])))
        rows.append(
            (setting, "items that need none", "-", interval_text(found["needless_avoided"]))
        )
        for kind, r in found["by_kind"].items():
            rows.append((setting, kind, interval_text(r["precision"]), interval_text(r["recall"])))
    return Table(
        "Free choice against need",
        ("setting", "of", "precision", "recall"),
        tuple(rows),
        "Items that need a call: the share in which every need was met by one. Items that need "
        "none: the share without a call.",
    )


def _calls(figures: Figures) -> Table:
    told = {name: found.get("by_type", {}) for name, found in figures["choices"].items()}
    kinds = list(dict.fromkeys(k for types in told.values() for r in types.values() for k in r))
    rows = [
        (setting, kind or "-", *(interval_text(found.get(k)) for k in kinds))
        for setting, types in told.items()
        for kind, found in types.items()
    ]
    return Table(
        "Calls made in free choice",
        ("setting", "type of question", *("no call" if k == "none" else k for k in kinds)),
        tuple(rows),
        "The share of a type's items in which each kind was called; an item may call several.",
    )


def _states(figures: Figures) -> Table:
    rows = []
    for kind, r in figures["states"].items():
        if "not_compared" in r:
            rows.append((kind, str(r["n"]), *[r["not_compared"], "-", "-", "-"]))
            continue
        rows.append(
            (
                kind,
                str(r["n"]),
                f"{r['neighbour']:.3f} (chance {r['neighbour_chance']:.3f})",
                f"{r['silhouette']:+.3f} (chance {r['silhouette_chance']:+.3f})",
                f"{r['between']:.3f}",
                f"{r['purity']:.3f}",
            )
        )
    return Table(
        "Control states by type of question",
        ("kind", "n", "nearest is of its type", "silhouette", "variance between types", "purity"),
        tuple(rows),
        "A specific instruction lies near those of its own type; a generic trigger lies anywhere.",
    )
