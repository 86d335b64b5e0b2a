"""The way of the time through one answer, read from its trace, and drawn. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vpt_agent.errors import MissingExtraError
from vpt_agent.trace import (
    Decoded,
    ImageEncoded,
    PerceptionAppended,
    Prefilled,
    ToolCalled,
    ToolFinished,
    Trace,
)

COLOURS = {
    "look": "#2a6f97",
    "prefill": "#e28413",
    "decode": "#3c8d5a",
    "tool": "#7b5ea7",
    "append": "#d1495b",
}
PARTS = {
    "image": "#9aa5ad",
    "vision": COLOURS["look"],
    "prefill": COLOURS["prefill"],
    "append": COLOURS["append"],
    "decode": COLOURS["decode"],
    "choose": "#8fd14f",
    "tool": COLOURS["tool"],
    "copies": "#8c6d46",
    "agent": "#111111",
    "loop": "#7a7a7a",
    "rest": "#7a7a7a",
}
"""Parts of both ways in the order in which they are drawn."""


@dataclass(frozen=True)
class Stage:
    """One stage of an answer: seconds since its run began, and how many tokens it computed."""

    name: str
    start: float
    end: float
    tokens: int


def stages(trace: Trace) -> list[Stage]:
    """The stages of a trace with one run. Features that were reused take no time and are left
    out."""
    found: list[Stage] = []
    called = 0.0
    for event in trace.events:
        if isinstance(event, ToolCalled):
            called = event.clock
        elif isinstance(event, ToolFinished):
            found.append(Stage("tool", called, event.clock, 0))
        elif isinstance(event, ImageEncoded):
            if not event.reused:
                found.append(_looked(event))
        elif isinstance(event, Prefilled):
            found.append(_ending(event, "prefill", event.tokens))
        elif isinstance(event, Decoded):
            found.append(_ending(event, "decode", sum(len(s.ids) for s in event.spans)))
        elif isinstance(event, PerceptionAppended):
            found.append(_ending(event, "append", sum(len(s.ids) for s in event.spans)))
    return found


def _looked(event: ImageEncoded) -> Stage:
    """Features that were begun early ended before anybody heard of them."""
    start = event.clock - event.early - (event.seconds - event.hidden)
    return Stage("look", start, start + event.seconds, event.visual_tokens)


def _ending(event: Prefilled | Decoded | PerceptionAppended, name: str, tokens: int) -> Stage:
    return Stage(name, event.clock - event.seconds, event.clock, tokens)


def as_rows(found: Sequence[Stage]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(stage) for stage in found]


def check_plots() -> Any:
    """matplotlib's ``Figure``. Raises :class:`MissingExtraError`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "plots need matplotlib", fix='pip install "vpt-agent[plots]"'
        ) from error
    return Figure


def draw(figures: Mapping[str, Any], path: Path) -> None:
    """Draw the figures of ``bench answer``: the stages of one answer as they came, and below the
    parts of both ways in seconds."""
    figure = check_plots()(figsize=(10, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2))
    rows = figures["timeline"]
    for place, row in enumerate(rows):
        width = 1000 * (row["end"] - row["start"])
        above.barh(place, width, left=1000 * row["start"], color=COLOURS[row["name"]])
        tokens = f", {row['tokens']} tokens" if row["tokens"] else ""
        above.text(1000 * row["end"], place, f"  {width:.0f} ms{tokens}", va="center", fontsize=8)
    above.set_yticks(range(len(rows)), [row["name"] for row in rows])
    above.set_ylim(len(rows) - 0.4, -0.6)
    above.set_xlim(0, 1250 * max(row["end"] for row in rows))
    above.set_xlabel("ms since the run began (one run's trace, clock on the wall)")
    above.set_title(f"One answer, {figures['model']}, {figures['dtype']}", loc="left", fontsize=10)
    shown: set[str] = set()
    ways = ("published", "ours")
    for place, way in enumerate(ways):
        left, parts = 0.0, figures[way]["parts"]
        for name, colour in PARTS.items():
            width = parts.get(name, 0.0)
            label = name if name not in shown and width > 0 else None
            shown |= {name} if label else set()
            below.barh(place, width, left=left, color=colour, label=label, height=0.6)
            left += width
        below.text(left, place, f"  {left:.2f} s", va="center", fontsize=8)
    below.set_yticks(range(2), [f"{way}, {figures[f'{key}dtype']}" for way, key in
                                zip(ways, ("baseline_", ""), strict=True)])  # fmt: skip
    below.set_ylim(1.6, -0.6)
    below.set_xlim(0, 1.1 * max(sum(figures[way]["parts"].values()) for way in ways))
    below.set_xlabel(f"seconds by part ({figures['timer']} time, medians)")
    below.legend(ncols=6, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.3))
    figure.savefig(path, dpi=110)
