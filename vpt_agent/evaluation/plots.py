"""Figures as pictures. Needs matplotlib: the extra ``plots``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt_agent.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = Mapping[str, Any]
DPI = 130
PLAIN, CHANGED, NEUTRAL = "#2a6f97", "#d1495b", "#7a7a7a"
TYPE_COLOURS = ("#2a6f97", "#e28413", "#3c8d5a", "#d1495b", "#7b5ea7", "#8c6d46", "#4fb0c6",
                "#b5a33c", "#111111", "#e58fc0", "#9aa5ad", "#8fd14f")  # fmt: skip
MARKERS = "o^sx"
"""Taken in turn where there are more types than colours."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (inches) that is drawn without any display."""
    try:
        from matplotlib.figure import Figure as Made
    except ImportError as error:
        raise MissingExtraError(
            "plots need matplotlib", fix='pip install "vpt-agent[plots]"'
        ) from error
    return Made(figsize=(width, height), layout="constrained")


def bars(
    ax: Axes, names: Sequence[str], figures: Sequence[Figures], colours: Sequence[str]
) -> None:
    """Horizontal bars from top to bottom with their intervals; nothing where nothing was found."""
    for place, (figure, colour) in enumerate(zip(figures, colours, strict=True)):
        if figure.get("value") is None:
            ax.text(0.01, place, "not measured", va="center", fontsize=8, color=NEUTRAL)
            continue
        value, low, high = figure["value"], figure["low"], figure["high"]
        ax.barh(place, value, color=colour, height=0.7)
        ax.plot((low, high), (place, place), color="black", linewidth=1.2)
        ax.text(max(high, value) + 0.012, place, f"{value:.3f}", va="center", fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.3)
    ax.set_axisbelow(True)


def plot_exact(figures: Figures) -> Figure:
    """Exact match of every setting, with its interval."""
    results = figures["results"]
    thrown = {
        s["name"] for s in figures["settings"] if any(v != "kept" for v in s["switches"].values())
    }
    figure = new_figure(7.5, 0.8 + 0.3 * len(results))
    ax = figure.subplots()
    bars(
        ax,
        list(results),
        [r["exact"] for r in results.values()],
        [CHANGED if name in thrown else PLAIN for name in results],
    )
    ax.set_xlim(0, 1.12)
    ax.set_xlabel(
        "exact match, 95 % interval (blue: as it is, red: with a switch thrown)", fontsize=8
    )
    return figure


def plot_differences(figures: Figures) -> Figure | None:
    """What every switch changes against the same call without it, on the same items."""
    found = [d for d in figures["differences"] if d["all"]["value"] is not None]
    if not found:
        return None
    figure = new_figure(7.5, 0.9 + 0.3 * len(found))
    ax = figure.subplots()
    for place, difference in enumerate(found):
        value = difference["all"]
        colour = CHANGED if difference["switched"] else PLAIN
        ax.plot((value["low"], value["high"]), (place, place), color=colour, linewidth=2)
        ax.plot(value["value"], place, "o", color=colour)
    names = [f"{d['setting']}  -  {d['against']}" for d in found]
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("difference of exact match on the same items, 95 % interval", fontsize=8)
    ax.grid(axis="x", alpha=0.3)
    return figure


def plot_types(figures: Figures) -> Figure | None:
    """Exact match by setting and type of question; None where there is one type only."""
    results = {n: r for n, r in figures["results"].items() if r["n"]}
    types = sorted({t for r in results.values() for t in r["by_type"]})
    if len(types) < 2:
        return None
    figure = new_figure(2.6 + 1.1 * len(types), 0.8 + 0.32 * len(results))
    ax = figure.subplots()
    grid = [
        [r["by_type"].get(t, {}).get("value", float("nan")) for t in types]
        for r in results.values()
    ]
    ax.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            shade = "white" if value > 0.6 else "black"
            text = "-" if value != value else f"{value:.2f}"
            ax.text(x, y, text, ha="center", va="center", color=shade, fontsize=8)
    ax.set_xticks(range(len(types)), types, fontsize=8)
    ax.set_yticks(range(len(results)), list(results), fontsize=8)
    return figure


def plot_regions(figures: Figures) -> Figure | None:
    """IoU and IoGT of the regions shown, small objects apart."""
    found = [
        (f"{setting}, {group} objects ({r['objects']})", r)
        for setting, groups in figures["regions"].items()
        for group, r in groups.items()
        if r["objects"]
    ]
    if not found:
        return None
    figure = new_figure(8.5, 0.9 + 0.3 * len(found))
    axes = figure.subplots(1, 3, sharey=True)
    for ax, (name, title) in zip(
        axes, (("iou", "IoU"), ("iogt", "IoGT"), ("inside", "wholly inside")), strict=True
    ):
        bars(ax, [n for n, _ in found], [r[name] for _, r in found], [PLAIN] * len(found))
        ax.set_xlim(0, 1.25)
        ax.set_title(title, fontsize=9)
    return figure


def plot_states(figures: Figures) -> Figure | None:
    """Control states along their first two principal components, by type of question."""
    found = {k: s for k, s in figures["states"].items() if "points" in s}
    if not found:
        return None
    names = sorted({name for states in found.values() for name in states["by_type"]})
    figure = new_figure(4.2 * len(found) + 1.2, 3.9)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for ax, (kind, states) in zip(axes, found.items(), strict=True):
        for number, name in enumerate(names):
            own = [p for p, t in zip(states["points"], states["types"], strict=True) if t == name]
            if not own:
                continue
            colour = TYPE_COLOURS[number % len(TYPE_COLOURS)]
            marker = MARKERS[number // len(TYPE_COLOURS) % len(MARKERS)]
            ax.scatter(
                *zip(*own, strict=True), s=9, alpha=0.7, color=colour, marker=marker, label=name
            )
        first, second = (*states["variance"], 0.0, 0.0)[:2]
        ax.set_xlabel(f"first component ({first:.0%} of the variance)", fontsize=8)
        ax.set_ylabel(f"second ({second:.0%})", fontsize=8)
        ax.set_title(f"{kind}: nearest of its type {states['neighbour']:.2f}, "
                     f"by chance {states['neighbour_chance']:.2f}", fontsize=9)  # fmt: skip
    shown = {
        label: handle
        for ax in axes
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(shown.values()), list(shown), loc="outside right upper", fontsize=7)
    return figure


def plot_all(figures: Figures) -> dict[str, Figure]:
    """Every plot of :func:`vpt_agent.evaluation.summarise` by a short name."""
    made = {
        "exact": plot_exact(figures),
        "differences": plot_differences(figures),
        "types": plot_types(figures),
        "regions": plot_regions(figures),
        "states": plot_states(figures),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def save_plot(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG; gives its path."""
    figure.savefig(path, dpi=DPI)
    return path
