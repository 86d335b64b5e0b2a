"""``vpt-agent bench``: measurements that print whether an aim is met."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vpt_agent.cli.output import clear_errors, note, print_json, writing

app = typer.Typer(no_args_is_help=True, help="Measure, side by side in one run.")


@app.callback()
def _bench() -> None:
    """Measure, side by side in one run."""


@app.command()
@clear_errors
def train(
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each procedure, in turn.")] = 9,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the CPU.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures here (JSON).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """A training step in one pass where one is enough, beside the one with two full passes."""
    from vpt_agent.training.bench import AIM, bench

    figures = bench(
        repeats=repeats, rows=rows, threads=threads, say=lambda text: note("bench", text)
    )
    if out is not None:
        with writing(out):
            out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        note("written", str(out))
    if as_json:
        print_json(figures)
        return
    for setting in figures["settings"]:
        met = "" if not setting["counts"] else ", met" if setting["ratio"] >= AIM else ", missed"
        typer.echo(
            f"{setting['name']}: {setting['two_ms']:.0f} ms in two full passes, "
            f"{setting['one_ms']:.0f} ms in one, ratio {setting['ratio']:.2f}{met}"
        )
    typer.echo(f"padding: {figures['padding']:.1%}; {figures['machine']}")
