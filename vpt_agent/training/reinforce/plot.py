"""The course of a reinforcement stage as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt_agent.training.logs import METRICS, read_metrics

PICTURE = "reinforce.png"
PANELS = (
    (("reward", "accuracy"), "a question"),
    (("looks",), "looks a question"),
    (("skipped", "dropped", "clipped"), "share"),
    (("kl", "ratio"), "a choice"),
)


def plot_reinforcement(folder: Path) -> Path | None:
    """Draw ``reinforce.png`` from the metrics in ``folder``; None where matplotlib is missing or
    there is nothing to draw. Looks are drawn by type of question, too."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = read_metrics(folder / METRICS)
    if not rows:
        return None
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (names, label) in enumerate(PANELS, start=1):
        axes = figure.add_subplot(2, 2, number)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        lines = {name: _series(rows, name) for name in names}
        if names == ("looks",):
            lines |= _by_type(rows)
        for name, points in lines.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize="small")
    path = folder / PICTURE
    figure.savefig(path, dpi=120)
    return path


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def _by_type(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, means in row.get("types", {}).items():
            if name:
                found.setdefault(f"looks: {name}", []).append((row["step"], means["looks"]))
    return found
