"""``vpt-agent ask``: one question about pictures, one answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vpt_agent.cli.output import (
    RUN_FAILED,
    Progress,
    clear_errors,
    note,
    print_json,
    progress,
)
from vpt_agent.errors import CheckpointError, ImageError, UserError
from vpt_agent.types import Answer, Limits

if TYPE_CHECKING:
    from vpt_agent.agent import PerceptionAgent


def load_agent(
    model: str | None, *, device: str, dtype: str, progress: Progress
) -> PerceptionAgent:
    """Load the agent. Tests replace this function.

    What transformers cannot find or read is an OSError there, and bad input here.
    """
    from transformers.utils import logging

    from vpt_agent.agent import PerceptionAgent

    if model is None or not sys.stderr.isatty():
        # The bars of transformers are for people who wait for a large model.
        logging.disable_progress_bar()
    try:
        return PerceptionAgent.from_pretrained(model, device=device, dtype=dtype, progress=progress)
    except OSError as error:
        raise CheckpointError(
            "the checkpoint cannot be loaded",
            where=model,
            got=str(error).splitlines()[0],
            expected="a folder with a config.json, or the name of a repository on the hub",
        ) from error


def split_words(words: list[str], images: list[str]) -> tuple[list[str], str]:
    """Pictures and the question, from positional arguments and ``--image`` options.

    Raises UserError or ImageError before anything is loaded.
    """
    *pictures, question = words
    pictures += images
    usage = 'vpt-agent ask PICTURE... "QUESTION"'
    if not pictures:
        raise UserError("a picture and a question are needed", got=question, fix=usage)
    for picture in pictures:
        if not Path(picture).is_file():
            raise ImageError("there is no such picture file", got=picture, fix=usage)
    if not question.strip():
        raise UserError("the question is empty", fix=usage)
    if Path(question).is_file():
        raise UserError(
            "the last argument is the question, and this is a file", got=question, fix=usage
        )
    return pictures, question


def _tell(answer: Answer, trace: Path | None) -> None:
    """What happened, for a person, on standard error: calls, warnings, where the trace lies."""
    for call, result in zip(answer.calls, answer.results, strict=True):
        if result.error is not None:
            note("call", f"{call.name} failed: {result.error.message}")
            continue
        looks = [f"{v.id} = {', '.join(f'{x:g}' for x in v.box)} of {v.root}" for v in result.views]
        note("call", f"{call.name} {'; '.join(looks)}".rstrip())
    for warning in answer.warnings:
        note("warning", warning)
    if trace is not None:
        note("trace", f"{trace} (vpt-agent trace show {trace})")


@clear_errors
def ask(
    words: Annotated[
        list[str],
        typer.Argument(metavar='PICTURE... "QUESTION"', help="Picture files, then the question."),
    ],
    image: Annotated[
        list[str] | None, typer.Option(help="A picture file; may be given several times.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub name; without it, the model in the package."),
    ] = None,
    tool_choice: Annotated[
        str, typer.Option(help="auto, none, required, or the name of a tool.")
    ] = "auto",
    trace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the run into this new folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens the model may write.")
    ] = Limits.new_tokens,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; above it, samples.")
    ] = 0.0,
) -> None:
    """Answer a question about one or more pictures.

    Exit status: 0 answered, 1 the run failed or stopped at a limit, 2 bad input or usage.
    """
    pictures, question = split_words(words, image or [])
    limits = Limits(new_tokens=max_new_tokens)
    with progress("loading the model") as update:
        agent = load_agent(model, device=device, dtype=dtype, progress=update)
        update("looking")
        answer = agent.run(
            question,
            image=[Path(p) for p in pictures],
            tool_choice=tool_choice,
            limits=limits,
            seed=seed,
            trace=trace,
            temperature=temperature,
        )
    _tell(answer, trace)
    if as_json:
        print_json(answer.to_dict())
    else:
        typer.echo(answer.text)
    if answer.status == "limit":
        note(
            "error", f"the run stopped at the limit {answer.limit!r} before its answer was complete"
        )
    elif answer.status == "failed":
        note("error", "the run failed; its trace says where")
    if answer.status != "answered":
        raise typer.Exit(RUN_FAILED)
