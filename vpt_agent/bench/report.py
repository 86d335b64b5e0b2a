"""Figures that were kept, as a table: what a page shows is what the commands wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpt_agent.errors import UserError

WHAT = ("answer", "throughput", "kernels", "import")
HEAD = "| measured | figure | aim | |\n|---|---|---|---|"


def report(folder: Path) -> str:
    """A markdown table of the aims in the files of ``folder`` that ``vpt-agent bench`` wrote, in
    the order of their names, and below it where they were measured."""
    rows, machines = [], []
    for file in sorted(folder.glob("*.json")):
        figures = _read(file)
        if figures.get("what") not in WHAT or "aims" not in figures:
            continue  # another command's figures
        for aim in figures["aims"]:
            bound = "≥" if aim["at_least"] else "≤"
            met = "met" if aim["met"] else "missed"
            what = f"{_name(figures)}: {aim['aim']}"
            rows.append(f"| {what} | {aim['figure']:.3g} | {bound} {aim['wanted']:g} | {met} |")
        if "machine" in figures:
            machines.append(_machine(figures["machine"]))
    if not rows:
        raise UserError(
            "no figures of measurements lie there",
            where=folder,
            fix="write some: vpt-agent bench answer --out FILE",
        )
    where = "; ".join(dict.fromkeys(machines))
    return "\n".join([HEAD, *rows, "", f"Measured on: {where}."])


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError("a file of figures is no JSON", where=file, got=str(error)) from error
    return found if isinstance(found, dict) else {}


def _name(figures: Mapping[str, Any]) -> str:
    words = [f"`{figures['what']}`"]
    if figures.get("model"):
        words.append(str(figures["model"]))
    if figures.get("dtype"):
        words.append(str(figures["dtype"]))
    return ", ".join(words)


def _machine(machine: Mapping[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['threads']} of {machine['cpus']} CPUs, "
        f"device {machine['device']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}"
    )
