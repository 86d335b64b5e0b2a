"""``vpt-agent trace``: read the record of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_agent.cli.output import clear_errors, note, writing

app = typer.Typer(no_args_is_help=True, help="Read the record of a run.")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder written with --trace.")]


@app.command()
@clear_errors
def show(run: Run) -> None:
    """Print a run as a person wants to read it."""
    from rich.console import Console

    from vpt_agent.trace import Trace
    from vpt_agent.trace.show import render_text

    # Lines are not broken where no terminal says how wide it is: a pipe's reader wants them whole.
    console = Console(soft_wrap=True, highlight=False)
    page = render_text(Trace.read(run))
    page.rstrip()  # print ends the last line itself
    console.print(page)


@app.command()
@clear_errors
def html(
    run: Run,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("run.html"),
) -> None:
    """Write a run as one page that needs no other file."""
    from vpt_agent.trace import Trace

    trace = Trace.read(run)
    with writing(out):
        trace.to_html(out)
    note("written", str(out))
