"""What a run leaves to look at: metrics as JSON lines, loss curves as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt_agent.errors import UserError

METRICS = "metrics.jsonl"
PICTURE = "loss.png"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


class MetricsFile:
    """``metrics.jsonl`` of a run: one object a line, each with its ``step``."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def resume(self, step: int) -> None:
        """Forget what was written behind ``step``: it will be written again."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; none if there is no such file. A half line at its end (a run
    that was killed) does not count."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number + 1 < len(lines):
                raise UserError("a line of metrics is no JSON", where=f"{path}:{number + 1}",
                                got=line[:80]) from error  # fmt: skip
    return rows


def mean_loss(folder: Path) -> float | None:
    """The mean of the training losses in the metrics in ``folder``; None where there are none."""
    losses = [row["loss"] for row in read_metrics(folder / METRICS) if "loss" in row]
    return sum(losses) / len(losses) if losses else None


def plot_losses(folder: Path) -> Path | None:
    """Draw ``loss.png`` from the metrics in ``folder``; None where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = read_metrics(folder / METRICS)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("loss")
    losses = _series(rows, "loss")
    if losses:
        axes.plot(*zip(*losses, strict=True), color="0.75", linewidth=0.8, label="training, a step")
        axes.plot(*zip(*_smooth(losses), strict=True), color="C0", label="training, running mean")
    if evaluated := _series(rows, "eval_loss"):
        axes.plot(*zip(*evaluated, strict=True), "o-", color="C1", label="evaluation")
    if accuracy := _series(rows, "eval_accuracy"):
        right = axes.twinx()
        right.plot(*zip(*accuracy, strict=True), "s--", color="C2", label="token accuracy")
        right.set_ylim(0, 1)
        right.set_ylabel("evaluation: token accuracy")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    path = folder / PICTURE
    figure.savefig(path, dpi=120)
    return path


def _series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def _smooth(points: Sequence[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    smoothed, mean, share = [], 0.0, 0.0
    for step, value in points:
        mean, share = weight * mean + (1 - weight) * value, weight * share + 1 - weight
        smoothed.append((step, mean / share))
    return smoothed
