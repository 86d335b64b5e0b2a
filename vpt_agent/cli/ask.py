"""``vpt-agent ask``: one question about pictures, one answer."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    from vpt_agent.tool import PerceptionTool

ToolNames = Annotated[
    list[str] | None,
    typer.Option(
        "--tool",
        metavar="TOOL",
        help="A tool beside the installed ones: FILE.py, FILE.py:NAME, MODULE:NAME, a module, or "
        "the name of an installed tool that must be there. May be given several times.",
    ),
]


def load_agent(
    model: str | None,
    *,
    device: str,
    dtype: str,
    progress: Progress,
    tools: Sequence[PerceptionTool] = (),
    **speed: Any,
) -> PerceptionAgent:
    """Load the agent, with ``tools`` beside the installed ones. Tests replace this function.

    ``speed``: ``compiled``, ``decoding`` and ``weights`` of ``PerceptionAgent.from_pretrained``.

    What transformers cannot find or read is an OSError there, and bad input here.
    """
    from transformers.utils import logging

    from vpt_agent.agent import PerceptionAgent

    if speed.get("compiled"):
        import torch

        torch.set_num_threads(1)  # the routines serve one
    if model is None or not sys.stderr.isatty():
        # The bars of transformers are for people who wait for a large model.
        logging.disable_progress_bar()
    try:
        return PerceptionAgent.from_pretrained(
            model, device=device, dtype=dtype, tools=tools, progress=progress, **speed
        )
    except OSError as error:
        raise CheckpointError(
            "the checkpoint cannot be loaded",
            where=model,
            got=str(error).splitlines()[0],
            expected="a folder with a config.json, or the name of a repository on the hub",
        ) from error


Images = Annotated[
    list[str] | None, typer.Option(help="A picture file; may be given several times.")
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="0 takes the likeliest token; above it, samples.")
]
Weights = Annotated[
    str, typer.Option(help="own, or of the language layers: int8, float8 (extra int8).")
]
Decoding = Annotated[
    str, typer.Option(help="Who chooses tokens: host, device, compiled-device, or auto.")
]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="With the routines in C (one CPU thread).")
]
Mcp = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SERVER",
        help="Tools of an MCP server, too: its address, or the command that starts it. Their "
        "argument image is filled with the picture. May be given several times.",
    ),
]


def mount(agent: PerceptionAgent, servers: list[str] | None, say: Progress) -> None:
    """Give the agent the tools of MCP servers, each named by an address or a command."""
    for server in servers or ():
        say(f"connecting to {server}")
        try:
            address = server.startswith(("http://", "https://"))
            target = server if address else shlex.split(server)
        except ValueError as error:
            raise UserError("this command cannot be read", where="--mcp", got=error) from error
        before = len(agent.registry.failed)
        found = agent.registry.mount_mcp(target, pictures="image")
        note("tools", f"{', '.join(tool.name for tool in found) or 'none'} of {server}")
        for failed in agent.registry.failed[before:]:
            note("warning", f"the tool {failed.name} does not load: {failed.error}")


def named_tools(names: list[str]) -> list[PerceptionTool]:
    """What ``--tool`` names, before anything is loaded. Raises UserError for what is no tool."""
    if not names:
        return []
    from vpt_agent.tool import ToolRegistry
    from vpt_agent.tool.find import tools_named

    installed = ToolRegistry.from_entry_points()
    found = [tool for name in names for tool in tools_named(name, installed)]
    ToolRegistry.with_installed(found)  # conflicts and what a tool lacks, said at once
    return found


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


def _finish(answer: Answer, trace: Path | None, *, as_json: bool) -> None:
    """Print the answer; leaves with an exit code if there is none."""
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


@clear_errors
def ask(
    words: Annotated[
        list[str],
        typer.Argument(metavar='PICTURE... "QUESTION"', help="Picture files, then the question."),
    ],
    image: Images = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub name; without it, the model in the package."),
    ] = None,
    tool_choice: Annotated[
        str, typer.Option(help="auto, none, required, or the name of a tool.")
    ] = "auto",
    tool: ToolNames = None,
    mcp: Mcp = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the run into this new folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    weights: Weights = "own",
    decoding: Decoding = "auto",
    compiled: Compiled = False,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens the model may write.")
    ] = Limits.new_tokens,
    temperature: Temperature = 0.0,
) -> None:
    """Answer a question about one or more pictures.

    Exit status: 0 answered, 1 the run failed or stopped at a limit, 2 bad input or usage.
    """
    pictures, question = split_words(words, image or [])
    limits = Limits(new_tokens=max_new_tokens)
    tools = named_tools(tool or [])
    speed = {"weights": weights, "decoding": decoding, "compiled": compiled}
    with progress("loading the model") as update:
        agent = load_agent(model, device=device, dtype=dtype, progress=update, tools=tools, **speed)
        try:
            mount(agent, mcp, update)
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
        finally:
            if mcp:
                agent.close()  # and the servers that were started, also when the run failed
    _finish(answer, trace, as_json=as_json)
