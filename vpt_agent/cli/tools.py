"""``vpt-agent tools``: what is installed, what it takes, one call by hand, and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpt_agent.cli.output import RUN_FAILED, clear_errors, note, print_json, writing
from vpt_agent.errors import UserError

if TYPE_CHECKING:
    from vpt_agent.tool import PerceptionTool, ToolRegistry
    from vpt_agent.types import ToolResult

app = typer.Typer(no_args_is_help=True, help="The perception tools that are installed.")

From = Annotated[
    list[str] | None,
    typer.Option("--from", help="Tools of a file too: FILE.py, FILE.py:NAME or MODULE:NAME."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Named = Annotated[
    str, typer.Argument(help="Its name, with or without @version; or FILE.py:NAME, MODULE:NAME.")
]


def installed() -> ToolRegistry:
    """All installed tools. Tests replace this function."""
    from vpt_agent.tool import ToolRegistry

    return ToolRegistry.from_entry_points()


def with_tools(references: list[str] | None) -> ToolRegistry:
    """The installed tools, and those that a person names."""
    from vpt_agent.tool.find import tools_at

    registry = installed()
    for reference in references or ():
        registry.add_all(tools_at(reference))
    return registry


def _named(name: str, references: list[str] | None) -> tuple[PerceptionTool, str]:
    """The tool that a person names, and whose it is."""
    from vpt_agent.tool.find import is_reference, tools_at

    if is_reference(name):
        found = tools_at(name)
        if len(found) > 1:
            raise UserError(
                "this file has several tools",
                got=name,
                expected=" or ".join(f"{name}:{tool.name}" for tool in found),
            )
        return found[0], found[0].owner
    registry = with_tools(references)
    return registry[name], registry.owner(name)


@app.command("list")
@clear_errors
def list_tools(more: From = None, as_json: AsJson = False) -> None:
    """List the installed tools: what each is for, its arguments, and whose it is.

    A tool that is installed but does not load is listed with the reason.
    """
    registry = with_tools(more)
    if as_json:
        failed = [
            {"name": broken.name, "owner": broken.owner, "error": broken.error}
            for broken in registry.failed
        ]
        tools = [_as_json(tool, registry.owner(tool.name)) for tool in registry]
        print_json({"tools": tools, "failed": failed})
        return
    for tool in registry:
        typer.echo(f"{tool.full_name}: {' '.join(tool.description.split())}")
        for line in _details(tool):
            typer.echo(f"    {line}")
        typer.echo(f"    of {registry.owner(tool.name)}")
    for broken in registry.failed:
        typer.echo(f"{broken.name}: does not load: {broken.error}")
        typer.echo(f"    of {broken.owner}")


@app.command("describe")
@clear_errors
def describe(name: Named, more: From = None, as_json: AsJson = False) -> None:
    """Describe one tool: what a model is told of it, how it runs, and its contract."""
    tool, owner = _named(name, more)
    if as_json:
        print_json(_as_json(tool, owner))
        return
    typer.echo(f"{tool.full_name}: {tool.description}\n")
    for line in _details(tool):
        typer.echo(f"  {line}")
    seconds = "no limit" if tool.timeout is None else f"{tool.timeout:g} s"
    typer.echo(f"  time for a call: {seconds}; calls at once: {tool.concurrency} x "
               f"{tool.batch_size}; corrections: {tool.max_retries}; device: "
               f"{tool.device or 'the model' + chr(39) + 's'}")  # fmt: skip
    if tool.always_run:
        typer.echo("  an equal call runs again: its answer may have changed")
    for line in _spellings(tool):
        typer.echo(f"  {line}")
    typer.echo(f"  contract {tool.contract_hash}")
    typer.echo(f"  of {owner}\n\nThe model is told:")
    print_json(tool.openai_schema())


@app.command("call")
@clear_errors
def call(
    name: Named,
    pictures: Annotated[
        list[str] | None, typer.Argument(help="Pictures: image_1, image_2, ...; the last is seen.")
    ] = None,
    arguments: Annotated[
        list[str] | None,
        typer.Option("--arguments", "-a", help="NAME=VALUE, or all of them as JSON."),
    ] = None,
    more: From = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A folder for the pictures that it gives.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where it runs.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Call a tool by hand on pictures, as an agent would, and show the result.

    vpt-agent tools call crop_region shelf.jpg -a region=2,2,5,5 --out crops
    """
    import random

    from vpt_agent.tool import ToolContext, execute
    from vpt_agent.types import ToolCall
    from vpt_agent.vision.images import load_views

    tool, _ = _named(name, more)
    views = {view.id: view for view in load_views(list(pictures or ()))}
    values, repairs = _arguments(arguments or [])
    made = ToolCall("call_1", tool.name, values, "user", repairs=repairs)
    latest = next(reversed(views.values()), None)
    result = execute(
        tool,
        made,
        lambda: ToolContext(views=views, view=latest, device=device, rng=random.Random("0:call_1")),
    )
    files = _saved(result, out)
    if as_json:
        print_json(_told(result, files))
    else:
        _show(tool, result, files)
    tool.release()
    if result.error is not None:
        raise typer.Exit(RUN_FAILED)


@app.command("doctor")
@clear_errors
def doctor(
    setup: Annotated[
        str | None, typer.Option("--setup", help="Set every tool up on this device, too.")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="With tracebacks.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say which installed tools do not work, why, and what to do. Exit code 1 if there are any."""
    from vpt_agent.tool.doctor import examine

    findings = examine(setup=setup)
    failed = [finding for finding in findings if finding.state == "failed"]
    if as_json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            typer.echo(f"{finding.state:7}  {finding.tool}: {finding.message}")
            if finding.state != "ok":
                typer.echo(f"         of {finding.owner}")
            if finding.fix:
                typer.echo(f"         do: {finding.fix}")
            if verbose and finding.detail:
                typer.echo(
                    "".join(f"         {x}\n" for x in finding.detail.splitlines()), nl=False
                )
        typer.echo(f"{len(failed)} of {len({f.tool for f in findings})} tools do not work")
    if failed:
        raise typer.Exit(RUN_FAILED)


def _arguments(given: list[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments as a person writes them, and what was mended in them."""
    from vpt_agent.tool import WrittenError, read_arguments

    values: dict[str, Any] = {}
    repairs: tuple[str, ...] = ()
    for text in given:
        name, equals, value = text.partition("=")
        if equals and name.strip().isidentifier():
            # As text: the schema says what it is to be.
            values[name.strip()] = value
            continue
        read = read_arguments(text)
        if isinstance(read, WrittenError):
            raise UserError(
                "the arguments cannot be read",
                got=text,
                expected="NAME=VALUE, or an object like '{\"box\": [0, 0, 9, 9]}'",
                fix=read.message,
            )
        values |= read.arguments
        repairs += read.repairs
    return values, repairs


def _saved(result: ToolResult, out: Path | None) -> dict[str, str]:
    """The result's pictures in ``out``, file names by view."""
    if out is None:
        return {}
    files = {}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for view in result.views:
            path = out / f"{view.id.replace('/', '_')}.png"
            view.image.save(path)
            files[view.id] = str(path)
    return files


def _told(result: ToolResult, files: dict[str, str]) -> dict[str, Any]:
    from vpt_agent.trace.events import jsonable

    return {
        "tool": result.name,
        "ok": result.ok,
        "text": result.text,
        "structured": jsonable(result.structured),
        "views": [
            {
                "id": view.id,
                "size": list(view.size),
                "box": list(view.box),
                "of": view.root,
                "file": files.get(view.id),
            }
            for view in result.views
        ],
        "visual_tokens": 0 if result.features is None else len(result.features.tokens),
        "error": None if result.error is None else vars(result.error),
        "metadata": jsonable(result.metadata),
        "kernels": list(result.kernels),
        "seconds": result.seconds,
    }


def _show(tool: PerceptionTool, result: ToolResult, files: dict[str, str]) -> None:
    repairs = result.metadata.get("repairs", ())
    for line in repairs if isinstance(repairs, list) else ():
        note("read", line)
    if result.error is not None:
        note("error", f"{result.error.kind}: {result.error.message}")
        if result.error.detail:
            note("detail", result.error.detail)
        return
    if result.text is not None:
        typer.echo(result.text)
    for view in result.views:
        box = ", ".join(f"{value:g}" for value in view.box)
        where = f"{box} of {view.root}" if view.root != view.id else "a picture of its own"
        file = f", saved as {files[view.id]}" if view.id in files else ""
        typer.echo(f"{view.id}: {view.size[0]} x {view.size[1]} pixels, {where}{file}")
    if result.features is not None:
        typer.echo(f"visual tokens: {len(result.features.tokens)} of kind {result.features.kind}")
    for name, value in result.metadata.items():
        if name != "repairs":
            note(name, f"{value} (not for the model)")
    note("done", f"{tool.full_name} in {result.seconds:.3f} s")


def _properties(tool: PerceptionTool) -> dict[str, Any]:
    found = tool.json_schema().get("properties", {})
    return found if isinstance(found, dict) else {}


def _described(schema: dict[str, Any]) -> str:
    """The description of an argument; an optional one has it in its first alternative."""
    alternatives = [schema, *schema.get("anyOf", [])]
    found = [each["description"] for each in alternatives if "description" in each]
    return str(found[0]) if found else "no description"


def _details(tool: PerceptionTool) -> list[str]:
    lines = [f"{name}: {_described(value)}" for name, value in _properties(tool).items()]
    if tool.needs:
        lines.append(f"needs {', '.join(sorted(tool.needs))}")
    if tool.needs - {"view"}:
        lines.append("not served over MCP: it needs a model")
    if tool.extra:
        lines.append(f"needs the extra {tool.extra} of its package")
    if tool.licence:
        lines.append(f"licence {tool.licence}")
    lacks = tool.lacks()
    if lacks is not None:
        lines.append(f"not offered to models yet: {lacks.what}; do: {lacks.fix}")
    return lines


def _spellings(tool: PerceptionTool) -> list[str]:
    """The published perception tokens that call a tool."""
    from vpt_agent.tokens.table import PUBLISHED

    return [
        f"called by {kind.start} ... {kind.end} (kind {kind.name})"
        for kind in PUBLISHED.values()
        if kind.tool == tool.name
    ]


def _as_json(tool: PerceptionTool, owner: str) -> dict[str, Any]:
    return {
        "name": tool.name,
        "version": tool.version,
        "description": tool.description,
        "arguments": tool.json_schema(),
        "needs": sorted(tool.needs),
        "timeout": tool.timeout,
        "batch_size": tool.batch_size,
        "concurrency": tool.concurrency,
        "device": tool.device,
        "max_retries": tool.max_retries,
        "always_run": tool.always_run,
        "extra": tool.extra,
        "licence": tool.licence,
        "contract": tool.contract_hash,
        "owner": owner,
    }
