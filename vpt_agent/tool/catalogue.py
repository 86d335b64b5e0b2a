"""The catalogue of a package of tools, as Markdown: ``python -m vpt_agent.tool.catalogue NAME``.

Each public module of the package holds one tool of its own name.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

from vpt_agent.errors import UserError
from vpt_agent.tokens.table import PUBLISHED, PerceptionKind
from vpt_agent.tool.registry import ToolRegistry
from vpt_agent.tool.spec import PerceptionTool

_HEAD = """# Perception tools

What ships with the library: one tool, one file. Made by `python -m vpt_agent.tool.catalogue {0}`.
A call by perception tokens is spelled as in the table; every tool that needs no control state can
be called as JSON too. [What each one shows](../docs/tools.md);
[how to write one](../docs/write-a-tool.md);
[a package to start from](_template).

| tool | for what | perception tokens | arguments | visual tokens added | to install | licence |
|---|---|---|---|---|---|---|
"""


def tools_of(package: str) -> ToolRegistry:
    """The tools of an importable package. Raises :class:`UserError` where a module has none."""
    found = importlib.import_module(package)
    registry = ToolRegistry()
    for module in sorted(pkgutil.iter_modules(found.__path__), key=lambda m: m.name):
        if module.name.startswith("_"):
            continue
        tool = getattr(importlib.import_module(f"{package}.{module.name}"), module.name, None)
        if not isinstance(tool, PerceptionTool):
            raise UserError(
                "a module of tools holds a tool of its own name",
                where=f"{package}.{module.name}",
                got=repr(tool),
            )
        registry.add(tool)
    return registry


def catalogue(package: str) -> str:
    """The page for ``package``."""
    rows = [_row(tool) for tool in tools_of(package)]
    return _HEAD.format(package) + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(tool: PerceptionTool) -> tuple[str, ...]:
    kind = next((k for k in PUBLISHED.values() if k.tool == tool.name), None)
    return (
        f"`{tool.full_name}`",
        _cell(" ".join(tool.description.split("\n\n")[0].split())),
        "none" if kind is None else _spelling(kind),
        _arguments(tool),
        _visual_tokens(kind),
        f"`pip install vpt-agent[{tool.extra}]`" if tool.extra else "nothing",
        tool.licence or "not said",
    )


def _spelling(kind: PerceptionKind) -> str:
    payload = "x_min y_min x_max y_max" if kind.payload == "grid" else kind.control or ""
    return _cell(f"`{kind.start} {payload} {kind.end}`")


def _arguments(tool: PerceptionTool) -> str:
    schema = tool.json_schema()
    properties, required = schema.get("properties", {}), schema.get("required", [])
    names = properties if isinstance(properties, dict) else {}
    needed = required if isinstance(required, list) else []
    return ", ".join(f"`{n}`" if n in needed else f"`{n}`?" for n in names) or "none"


def _visual_tokens(kind: PerceptionKind | None) -> str:
    if kind is not None and kind.visual_tokens is not None:
        return str(kind.visual_tokens)
    return "by the size of what it shows"


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def main(arguments: list[str]) -> int:
    """Print the catalogue of the package that ``arguments`` name."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m vpt_agent.tool.catalogue PACKAGE\n")
        return 2
    sys.stdout.write(catalogue(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
