"""Shared by all tests: figures that a run prints, and threads kept to what a test needs.

A test reports what it measured with the ``figures`` fixture; the run prints one table per title at
its end, the largest value of each column last. With ``VPT_FIGURES=FILE`` the same is written as
JSON::

    def test_logits(figures):
        figures("parity", case="clip_tied/train_b1", logits=2.1e-6, gradients=4.0e-7)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

Row = dict[str, str | float | int]
_ROWS = pytest.StashKey[dict[str, list[Row]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Call with a title and named values; they are printed when the run ends."""
    rows = request.config.stash[_ROWS]

    def add(title: str, **values: str | float | int) -> None:
        rows.setdefault(title, []).append(dict(values))

    return add


def _text(value: str | float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _largest(rows: list[Row], column: str) -> str:
    numbers = [v for row in rows if isinstance(v := row.get(column), int | float)]
    return _text(max(numbers)) if numbers else ""


def _table(rows: list[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, *([_text(row.get(c)) for c in columns] for row in rows)]
    if len(rows) > 1:
        last = [_largest(rows, c) for c in columns]
        last[0] = last[0] or "largest"
        lines.append(last)
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    tables = config.stash[_ROWS]
    for title, rows in tables.items():
        terminalreporter.section(f"figures: {title}")
        for line in _table(rows):
            terminalreporter.write_line(line)
    if (target := os.environ.get("VPT_FIGURES")) and tables:
        Path(target).write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
