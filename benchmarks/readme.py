"""Puts measured figures into the README, so that nobody types them.

    python benchmarks/readme.py [--perception FILE]

The table says what `benchmarks/perception.py` measured on the model that ships: exact match by what
a question needs, on new scenes / on fonts and backgrounds never trained on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- figures: nano -->", "<!-- figures end -->"
NEEDS = {
    "region": "a close look",
    "region and region": "two close looks",
    "clip or dino or sam": "the whole picture encoded again",
    "region or clip or dino or sam": "either of them",
    "nothing": "nothing",
}
SETTINGS = {"free choice": "it chooses", "no tools": "no tools"}
SPLITS = ("train", "unseen")
NO_FIGURE = "-"


def table(figures: Mapping[str, Any]) -> str:
    """Exact match by need: rows of needs, columns of settings and baselines, both splits a cell."""
    told = [figures["splits"][split]["results"] for split in SPLITS if split in figures["splits"]]
    columns = dict(SETTINGS)
    columns |= {name: name for name in told[0] if name.startswith("baseline")}
    lines = ["| what a question needs | " + " | ".join(columns.values()) + " |",
             "|---|" + "---|" * len(columns)]  # fmt: skip
    for need, text in NEEDS.items():
        cells = (_cell([results.get(name) for results in told], need) for name in columns)
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    asked = figures["scenes"] * figures["questions_a_scene"]
    free = told[0]["free choice"]
    lines.append(
        f"\nExact match on {asked} questions about new scenes / as many about scenes with fonts "
        f"and backgrounds never trained on; {free['visual_tokens']:.0f} visual tokens and "
        f"{free['forward_tokens']:.0f} positions of the language model an answer, where it chooses."
    )
    fewer = {told[0][name]["n"] for name in columns if name.startswith("baseline")} - {asked}
    if fewer:
        counts = " or ".join(str(n) for n in sorted(fewer))
        lines.append(f"A baseline was asked {counts} of them, as many of each type of question.")
    return "\n".join(lines)


def _cell(results: list[Mapping[str, Any] | None], need: str) -> str:
    found = [(r or {}).get("by_need", {}).get(need) for r in results]
    return " / ".join(NO_FIGURE if f is None else f"{f['value']:.3f}" for f in found)


def main() -> None:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--perception", type=Path, default=RESULTS / "perception.json")
    figures = json.loads(parser.parse_args().perception.read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    README.write_text(f"{before}{BEGIN}\n{table(figures)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
