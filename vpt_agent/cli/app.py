"""The tree of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from vpt_agent import __version__
from vpt_agent.cli import ask, bench, data, inspect, mcp, nano, reinforce, tools, trace, train

app = typer.Typer(
    name="vpt-agent",
    help="Ask questions about pictures; the model looks again where it needs to.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("ask")(ask.ask)
app.command("inspect")(inspect.inspect)
app.command("mcp")(mcp.mcp)
app.command("train")(train.train)
app.command("reinforce")(reinforce.reinforce)
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")
app.add_typer(trace.app, name="trace")
app.add_typer(nano.app, name="nano")
app.add_typer(tools.app, name="tools")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vpt-agent {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
) -> None:
    """Ask questions about pictures; the model looks again where it needs to."""
