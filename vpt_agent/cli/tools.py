"""``vpt-agent tools``: the perception tools that are installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpt_agent.cli.output import clear_errors, print_json

if TYPE_CHECKING:
    from vpt_agent.tool import PerceptionTool, ToolRegistry

app = typer.Typer(no_args_is_help=True, help="The perception tools that are installed.")


def installed() -> ToolRegistry:
    """All installed tools. Tests replace this function."""
    from vpt_agent.tool import ToolRegistry

    return ToolRegistry.from_entry_points()


@app.command("list")
@clear_errors
def list_tools(
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the installed tools: what each is for, its arguments, and whose it is.

    A tool that is installed but does not load is listed with the reason.
    """
    registry = installed()
    if as_json:
        print_json(_as_json(registry))
        return
    for tool in registry:
        typer.echo(f"{tool.full_name}: {' '.join(tool.description.split())}")
        for line in _details(tool):
            typer.echo(f"    {line}")
        typer.echo(f"    of {registry.owner(tool.name)}")
    for broken in registry.failed:
        typer.echo(f"{broken.name}: does not load: {broken.error}")
        typer.echo(f"    of {broken.owner}")


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
    if tool.extra:
        lines.append(f"install {tool.extra}")
    if tool.licence:
        lines.append(f"licence {tool.licence}")
    return lines


def _as_json(registry: ToolRegistry) -> dict[str, Any]:
    return {
        "tools": [
            {
                "name": tool.name,
                "version": tool.version,
                "description": tool.description,
                "arguments": tool.json_schema(),
                "needs": sorted(tool.needs),
                "extra": tool.extra,
                "licence": tool.licence,
                "contract": tool.contract_hash,
                "owner": registry.owner(tool.name),
            }
            for tool in registry
        ],
        "failed": [
            {"name": broken.name, "owner": broken.owner, "error": broken.error}
            for broken in registry.failed
        ],
    }
