"""``vpt-agent mcp``: the perception tools for other agents."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vpt_agent.cli.output import clear_errors, note
from vpt_agent.cli.tools import From, with_tools
from vpt_agent.errors import MissingExtraError, UserError
from vpt_agent.tool import Access, ToolRegistry

if TYPE_CHECKING:
    from vpt_agent.serving.tools import ServedTools

TOKEN = "VPT_AGENT_MCP_TOKEN"


def _served(registry: ToolRegistry, access: Access, device: str, seconds: float) -> ServedTools:
    try:
        from vpt_agent.serving.tools import ServedTools, ServeOptions
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("mcp", "mcp_types"):
            raise
        raise MissingExtraError(
            "serving over MCP needs the official SDK",
            where="vpt-agent mcp",
            fix="pip install 'vpt-agent[mcp]'",
        ) from error
    return ServedTools(registry, ServeOptions(access=access, device=device, seconds=seconds))


def _chosen(registry: ToolRegistry, names: list[str]) -> ToolRegistry:
    """The tools that a person named; they must lack nothing."""
    chosen = ToolRegistry([registry[each] for each in names])
    for each in names:
        if (error := registry.lacks(each)) is not None:
            raise error
    return chosen


@clear_errors
def mcp(
    more: From = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Serve this tool and no other; several times.")
    ] = None,
    root: Annotated[
        list[Path] | None,
        typer.Option(help="A folder whose pictures clients may name by path; several times."),
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option(help="Fetch http(s) addresses that clients name, of public hosts.")
    ] = False,
    http: Annotated[bool, typer.Option(help="Serve streamable HTTP instead of stdio.")] = False,
    host: Annotated[str, typer.Option(help="Where HTTP is served.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port; 0 takes a free one.")] = 8333,
    name: Annotated[
        list[str] | None, typer.Option(help="Another name of this machine that clients may use.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where tools run that ask for a device.")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Most seconds of one call.")] = 120.0,
    listed: Annotated[
        bool, typer.Option("--list", help="Say what would be served and what not, and leave.")
    ] = False,
) -> None:
    """Serve the perception tools over MCP: to the program that starts this one, or over HTTP.

    Over HTTP, requests must bear the token in VPT_AGENT_MCP_TOKEN if it is set; on an address that
    other machines reach it must be. Tools that need a model (a control state, an encoder), or that
    lack an extra or a checkpoint, are not served.
    """
    registry = with_tools(more)
    if only:
        registry = _chosen(registry, only)
    if not seconds > 0:
        raise UserError("a call needs time", where="--seconds", got=seconds, expected="more than 0")
    access = Access(roots=tuple(root or ()), urls=allow_urls)
    served = _served(registry, access, device, seconds)
    if listed:
        for tool in served.listing():
            typer.echo(f"{tool.name}: {' '.join((tool.description or '').split())}")
        for left, reason in served.left_out.items():
            typer.echo(f"{left}: not served: {reason}")
        return
    for left, reason in served.left_out.items():
        note("not served", f"{left}: {reason}")
    from vpt_agent.serving.mcp_server import serve_http, serve_stdio

    if not http:
        serve_stdio(served)
        return
    serve_http(
        served,
        host=host,
        port=port,
        token=os.environ.get(TOKEN) or None,
        names=tuple(name or ()),
        ready=lambda address: note("serving", address),
    )
