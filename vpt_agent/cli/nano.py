"""``vpt-agent nano``: the world of the model that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from vpt_agent.cli.output import clear_errors, note, print_json, writing
from vpt_agent.errors import UserError

app = typer.Typer(no_args_is_help=True, help="The world of the model that ships with the package.")


@app.command()
@clear_errors
def scene(
    seed: Annotated[int, typer.Option(help="The same seed draws the same scene.")] = 0,
    split: Annotated[
        str, typer.Option(help="train, or unseen: fonts and backgrounds never trained on.")
    ] = "train",
    out: Annotated[Path | None, typer.Option(help="Write the picture here (PNG).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Draw a scene, and print its questions with their answers and regions (pixels)."""
    from vpt_agent.nano.alphabet import Split
    from vpt_agent.nano.scene import make_scene

    splits = get_args(Split)
    if split not in splits:
        raise UserError("unknown split", got=split, expected=" or ".join(splits))
    drawn = make_scene(seed, split=cast("Split", split))
    if out is not None:
        with writing(out):
            drawn.image.save(out, format="PNG")
        note("written", str(out))
    facts = drawn.to_json()
    if as_json:
        print_json(facts)
        return
    for row in facts["questions"]:
        typer.echo(f"{row['question']}  {row['answer']}")
