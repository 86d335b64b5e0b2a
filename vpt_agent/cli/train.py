"""``vpt-agent train``: a config file to a finished checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vpt_agent.cli.output import clear_errors, note, print_json

if TYPE_CHECKING:
    from vpt_agent.training import TrainConfig
    from vpt_agent.training.config import Source


@clear_errors
def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; configs/ holds some.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, tokens and memory, and leave.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in out.")
    ] = False,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the config: data.rows=2."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Train a model as a config file says, and save a checkpoint that vpt-agent ask loads."""
    from vpt_agent.training import read_config

    read = read_config(config, change or ())
    if dry_run:
        from vpt_agent.training.plan import plan

        made = plan(read)
        if as_json:
            print_json(made.to_dict())
        else:
            typer.echo("\n".join(made.lines()))
        return
    from vpt_agent.training import train as run

    read = _with_scenes(read)
    result = run(read, resume=resume, say=lambda text: note("train", text))
    told = {
        "checkpoint": str(result.checkpoint),
        "steps": result.steps,
        "loss": result.loss,
        "padding": result.padding,
        "rows": result.rows,
        "metrics": result.metrics,
        "answers": list(result.answers),
    }
    if as_json:
        print_json(told)
        return
    for name, value in told.items():
        if not isinstance(value, dict | list):
            typer.echo(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    for name in ("loss", "accuracy"):
        if f"eval_{name}" in result.metrics:
            typer.echo(f"evaluation {name}: {result.metrics[f'eval_{name}']:.4g}")
    for answer in result.answers:
        typer.echo(f"{answer['question']!r}: {answer['answer']!r}")


def _with_scenes(config: TrainConfig) -> TrainConfig:
    """Sources of scenes become files: drawn once, beside the run."""
    data = config.data
    changed = data.model_copy(
        update={
            name: tuple(_drawn(source, config.out) for source in getattr(data, name))
            for name in ("sources", "evaluation")
        }
    )
    return config.model_copy(update={"data": changed})


def _drawn(source: Source, out: Path) -> Source:
    wanted = source.scenes
    if wanted is None:
        return source
    from vpt_agent.cli.scenes import write_scenes

    folder = out.with_name(f"{out.name}-scenes") / f"{wanted.split}-{wanted.seed}-{wanted.count}"
    file = folder / "rows.json"
    if not file.exists() and os.environ.get("LOCAL_RANK", "0") == "0":
        note("train", f"drawing {wanted.count} scenes into {folder}")
        write_scenes(folder, count=wanted.count, seed=wanted.seed, split=wanted.split)
    return source.model_copy(update={"scenes": None, "path": file})
