"""``vpt-agent reinforce``: the policy-gradient stage, from a config file to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_agent.cli.output import clear_errors, note, print_json


@clear_errors
def reinforce(
    config: Annotated[Path, typer.Argument(help="A YAML file: configs/nano-reinforce.yaml.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in out.")
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the config: update.clip=0.1."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Let a model answer, judge its answers, and move it towards the better ones."""
    from vpt_agent.cli.train import drawing
    from vpt_agent.training.reinforce import read_reinforce_config
    from vpt_agent.training.reinforce import reinforce as run

    read = read_reinforce_config(config, change or ())
    draw = drawing(read.out)
    done = run(read, resume=resume, say=lambda text: note("reinforce", text), draw=draw)
    told = {"checkpoint": str(done.checkpoint), "steps": done.steps, "last_step": done.metrics}
    if as_json:
        print_json(told)
        return
    typer.echo(f"checkpoint: {done.checkpoint}")
    typer.echo(f"steps: {done.steps}")
    for name, value in done.metrics.items():
        if isinstance(value, int | float) and name != "step":
            typer.echo(f"{name.replace('_', ' ')}: {value:.4g}")
