"""``vpt-agent train``: a config file to a finished checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vpt_agent.cli.output import clear_errors, note, print_json
from vpt_agent.errors import UserError

if TYPE_CHECKING:
    from vpt_agent.training.config import Scenes, Source

ROWS = "rows.json"
DRAWING_SECONDS = 1800.0
"""How long a process waits for the one that draws the scenes."""


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
    from vpt_agent.training.folder import is_main

    def say(text: str) -> None:
        if is_main():  # of several processes one speaks
            note("train", text)

    result = run(read, resume=resume, say=say, draw=drawing(read.out))
    _leave_group()
    if not is_main():
        return
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


def drawing(out: Path) -> Callable[[Source], Source]:
    """What makes a file of a source of scenes: drawn once, beside the run in ``out``.

    Of several processes on a machine one draws, and the others wait for it.
    """

    def drawn(source: Source) -> Source:
        wanted = source.scenes
        if wanted is None:
            return source
        name = f"{wanted.split}-{wanted.seed}-{wanted.count}"
        folder = out.with_name(f"{out.name}-scenes") / name
        if os.environ.get("LOCAL_RANK", "0") != "0":
            _wait_for(folder)
        elif not _all_there(folder):
            note("train", f"drawing {wanted.count} scenes into {folder}")
            _draw(folder, wanted)
        return source.model_copy(update={"scenes": None, "path": folder / ROWS})

    return drawn


def _draw(folder: Path, wanted: Scenes) -> None:
    from vpt_agent.cli.scenes import write_scenes

    draft = folder.with_name(f"{folder.name}.draft-{uuid.uuid4().hex}")
    try:
        write_scenes(draft, count=wanted.count, seed=wanted.seed, split=wanted.split)
        if folder.exists():  # some pictures are gone
            shutil.rmtree(folder)
        draft.rename(folder)
    except OSError as error:
        raise UserError("scenes cannot be written", where=folder, got=error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _all_there(folder: Path) -> bool:
    """Whether the rows are there, and every picture that they name."""
    try:
        rows = json.loads((folder / ROWS).read_text(encoding="utf-8"))
    except OSError:
        return False
    return all((folder / row["images"][0]).is_file() for row in rows)


def _wait_for(folder: Path) -> None:
    end = time.monotonic() + DRAWING_SECONDS
    while not _all_there(folder):
        if time.monotonic() > end:
            raise UserError(
                "the scenes that another process draws did not come",
                where=folder,
                got=f"nothing after {DRAWING_SECONDS:g} seconds",
                fix="see what the process with LOCAL_RANK 0 says; all must see the same folder",
            )
        time.sleep(0.2)


def _leave_group() -> None:
    """End this process's connections, or a thread of theirs may end it as if it had failed, when
    Python takes down what is left. It waits for nobody: the first process may still answer."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
