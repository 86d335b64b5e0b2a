"""Training runs side by side: one factor changed at a time, some of them with several seeds.

The data are plain JSON: ``groups``, each with a ``name``, the ``question`` it asks, the ``measure``
that decides and the ``expected`` order by it (best first; empty where the paper says none), and
``runs``: ``name``, ``seed``, and ``figures`` by measure (value, low, high, n), or ``missing`` with
the reason why it was not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from vpt_agent.evaluation.plots import PLAIN, bars, new_figure
from vpt_agent.evaluation.tables import Table, interval_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Data = Mapping[str, Any]


def measures_of(group: Data) -> list[str]:
    """The measures that any run of the group has, in order of appearance."""
    return list(dict.fromkeys(m for run in group["runs"] for m in run.get("figures", {})))


def verdict(group: Data) -> str:
    """Whether the runs bear out the group's ``expected`` order, best first: ``confirmed`` where
    every neighbouring pair differs so with intervals apart, ``contradicted`` where a pair differs
    the other way with intervals apart, ``open`` otherwise."""
    measure, names = group["measure"], group["expected"]
    found = [_together(group, name, measure) for name in names]
    if any(f is None for f in found):
        lacking = [n for n, f in zip(names, found, strict=True) if f is None]
        return f"open: not run: {', '.join(lacking)}"
    pairs = [(a, b) for a, b in pairwise(found) if a and b]
    if any(a["high"] < b["low"] for a, b in pairs):
        return "contradicted"
    if all(a["low"] > b["high"] for a, b in pairs):
        return "confirmed"
    return "open: the intervals overlap"


def _together(group: Data, name: str, measure: str) -> dict[str, float] | None:
    """One run's figure, or its seeds as one: their mean, between the lowest and highest end."""
    figures = [
        run["figures"][measure]
        for run in group["runs"]
        if run["name"] == name and measure in run.get("figures", {})
    ]
    figures = [f for f in figures if f["value"] is not None]
    if not figures:
        return None
    return {
        "value": sum(f["value"] for f in figures) / len(figures),
        "low": min(f["low"] for f in figures),
        "high": max(f["high"] for f in figures),
    }


def tables_of_runs(data: Data) -> list[Table]:
    """A table for each group, with the verdict on the paper's order below it."""
    tables = []
    for group in data["groups"]:
        measures = measures_of(group)
        rows = []
        for run in group["runs"]:
            cells = [interval_text(run.get("figures", {}).get(m)) for m in measures]
            rows.append((run["name"], str(run["seed"]), run.get("missing", ""), *cells))
        note = ""
        if group.get("expected"):
            order = " > ".join(group["expected"])
            note = f"The paper's order, {order} ({group['measure']}): {verdict(group)}."
        columns = ("run", "seed", "not run", *measures)
        if not any(run.get("missing") for run in group["runs"]):
            columns, rows = ("run", "seed", *measures), [(r[0], r[1], *r[3:]) for r in rows]
        tables.append(Table(f"{group['name']}: {group['question']}", columns, tuple(rows), note))
    return tables


def orders_table(data: Data) -> Table:
    """The paper's orders, and what became of each: confirmed, contradicted or open."""
    rows = tuple(
        (group["name"], " > ".join(group["expected"]), group["measure"], verdict(group))
        for group in data["groups"]
        if group.get("expected")
    )
    return Table(
        "The paper's orders",
        ("experiment", "the paper's order", "by", "is"),
        rows,
        "Confirmed or contradicted where 95 % intervals lie apart; several seeds count from the "
        "lowest end to the highest.",
    )


def plot_runs(data: Data) -> dict[str, Figure]:
    """A picture for each group: its measures beside each other, a bar for each run."""
    made = {}
    for number, group in enumerate(data["groups"], start=1):
        measures = measures_of(group)
        if not measures:
            continue
        figure = new_figure(2 + 2.6 * len(measures), 0.9 + 0.32 * len(group["runs"]))
        axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        names = [_label(run, group["runs"]) for run in group["runs"]]
        for ax, measure in zip(axes, measures, strict=True):
            nothing = {"value": None}
            figures = [run.get("figures", {}).get(measure, nothing) for run in group["runs"]]
            bars(ax, names, figures, [PLAIN] * len(names))
            ax.set_xlim(0, 1.3)
            ax.set_title(measure, fontsize=9)
        made[f"group{number}"] = figure
    return made


def _label(run: Data, runs: Sequence[Data]) -> str:
    several = sum(r["name"] == run["name"] for r in runs) > 1
    return f"{run['name']} (seed {run['seed']})" if several else str(run["name"])
