"""``vpt-agent inspect``: what a checkpoint is."""

from __future__ import annotations

from typing import Annotated

import typer

from vpt_agent.cli.output import clear_errors, print_json


@clear_errors
def inspect(
    path: Annotated[
        str | None,
        typer.Argument(help="Checkpoint folder or hub name; without it, the model in the package."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Print what a checkpoint is: kinds, token ids, sizes, image policy, what it is good for."""
    from vpt_agent.model.inspect import inspect_checkpoint

    report = inspect_checkpoint(path)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(report.to_text())
