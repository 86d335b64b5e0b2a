"""``vpt-agent tools``: the perception tools that are installed."""

from __future__ import annotations

from typing import Annotated

import typer

from vpt_agent.cli.output import clear_errors, print_json

app = typer.Typer(no_args_is_help=True, help="The perception tools that are installed.")


@app.command("list")
@clear_errors
def list_tools(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the installed tools: name, what each is for, and its arguments."""
    from vpt_agent.tool import ToolRegistry

    registry = ToolRegistry.from_entry_points()
