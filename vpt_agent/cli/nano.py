"""``vpt-agent nano``: the world of the model that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from vpt_agent.cli import ask
from vpt_agent.cli.output import clear_errors, note, print_json, progress, writing
from vpt_agent.errors import UserError

if TYPE_CHECKING:
    from vpt_agent.nano.alphabet import Split

SplitOption = Annotated[
    str, typer.Option(help="train, or unseen: fonts and backgrounds never trained on.")
]

app = typer.Typer(no_args_is_help=True, help="The world of the model that ships with the package.")


def _checked(split: str) -> Split:
    from vpt_agent.nano.alphabet import Split

    splits = get_args(Split)
    if split not in splits:
        raise UserError("unknown split", got=split, expected=" or ".join(splits))
    return cast("Split", split)


@app.command()
@clear_errors
def scene(
    seed: Annotated[int, typer.Option(help="The same seed draws the same scene.")] = 0,
    split: SplitOption = "train",
    out: Annotated[Path | None, typer.Option(help="Write the picture here (PNG).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Draw a scene, and print its questions with their answers and regions (pixels)."""
    from vpt_agent.nano.scene import make_scene

    drawn = make_scene(seed, split=_checked(split))
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


@app.command()
@clear_errors
def scenes(
    out: Annotated[Path, typer.Option(help="The folder to write into.")],
    count: Annotated[int, typer.Option(min=1, help="How many scenes; one question each.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="The first scene's seed.")] = 0,
    split: SplitOption = "train",
    types: Annotated[
        str,
        typer.Option(
            help="Types of questions and their weights (region,none=2,count_marks): draws the"
            " second version's scenes, and writes items.jsonl too. See docs/nano-domain.md."
        ),
    ] = "",
    per_scene: Annotated[int, typer.Option(min=1, help="With --types: questions a scene.")] = 1,
    kinds: Annotated[
        str, typer.Option(help="With --types: kinds that re-encoding rows are made for.")
    ] = "clip,dino,sam",
    trigger: Annotated[
        float, typer.Option(min=0, max=1, help="With --types: share with the trigger phrase.")
    ] = 0.5,
) -> None:
    """Draw scenes and write rows for training on them: pictures and rows.json.

    --count is the number of scenes, or with --types of questions.
    """
    if types:
        from vpt_agent.nano.domain.export import baseline_lines, parse_types, write_domain

        with writing(out):
            written = write_domain(
                out,
                count=count,
                weights=parse_types(types),
                seed=seed,
                split=_checked(split),
                per_scene=per_scene,
                reencode=[k.strip() for k in kinds.split(",") if k.strip()],
                trigger=trigger,
            )
        for line in baseline_lines(written):
            note("answers", line)
        typer.echo(str(written.rows))
        return
    from vpt_agent.cli.scenes import write_scenes

    with writing(out):
        path = write_scenes(out, count=count, seed=seed, split=_checked(split))
    typer.echo(str(path))


@app.command("eval")
@clear_errors
def evaluate(
    scenes: Annotated[int, typer.Option(min=1, help="How many scenes; one question each.")] = 100,
    split: SplitOption = "train",
    tool_choice: Annotated[
        str, typer.Option(help="none forbids looking again; see vpt-agent ask.")
    ] = "auto",
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub name; without it, the model in the package."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions that run together.")] = 25,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measure a model on scenes it never saw: how often it is right, and what it costs."""
    chosen = _checked(split)
    done = 0
    with progress("loading the model") as update:
        agent = ask.load_agent(model, device=device, dtype=dtype, progress=update)
        from vpt_agent.nano.agent_eval import evaluate as measure

        def count(more: int) -> None:
            nonlocal done
            done += more
            update(f"{done} of {scenes} scenes")

        score = measure(
            agent,
            split=chosen,
            scenes=scenes,
            tool_choice=tool_choice,
            batch=batch,
            progress=count,
        ).to_dict()
    told = {"split": chosen, "tool_choice": tool_choice, **score}
    if as_json:
        print_json(told)
        return
    for name, value in told.items():
        if not isinstance(value, dict):
            number = f"{value:.4g}" if isinstance(value, float) else str(value)
            typer.echo(f"{name.replace('_', ' ')}: {number}")


@app.command()
@clear_errors
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="JSON files of the benchmarks, or folders of evaluations."),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write the page and its plots into.")],
) -> None:
    """Show what was measured: tables and plots on one page (needs the extra plots)."""
    from vpt_agent.nano.report import report as write_report

    with writing(out):
        page = write_report(results, out)
    typer.echo(str(page))
