"""What is wrong with the tools that are installed, and why."""

from __future__ import annotations

import time
import traceback
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

from vpt_agent.tokens.table import PUBLISHED
from vpt_agent.tool.extras import lacking
from vpt_agent.tool.registry import GROUP, FailedTool, Installed, installed_tools
from vpt_agent.tool.spec import PerceptionTool
from vpt_agent.tool.text import one_line

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing about one tool: ``message`` in a line, ``detail`` whole (a traceback), ``fix``."""

    tool: str
    owner: str
    state: State
    message: str
    detail: str = ""
    fix: str = ""


def examine(group: str = GROUP, *, setup: str | None = None) -> list[Finding]:
    """Load every installed tool and say what is wrong: it does not load, its name is taken, it
    lacks what it needs (an extra, a checkpoint: a warning, for nobody needs all), and with
    ``setup`` (a device) whether it sets up there."""
    loaded = installed_tools(group)
    tools = [found for found in loaded if isinstance(found, Installed)]
    findings = [_broken(found) for found in loaded if isinstance(found, FailedTool)]
    findings += _conflicts(tools)
    names = {found.tool.name for found in tools}
    findings += [
        Finding(
            kind.tool,
            f"perception kind {kind.name}",
            "warning",
            "no installed tool answers this kind, so models are not offered it",
            fix="install vpt-agent whole, or pass a tool of this name to the agent",
        )
        for kind in PUBLISHED.values()
        if kind.tool not in names
    ]
    for found in tools:
        findings += _one(found, setup)
    return sorted(findings, key=lambda finding: finding.tool)


def _broken(found: FailedTool) -> Finding:
    fix = "mend or uninstall the package"
    if found.error.startswith(("ModuleNotFoundError", "ImportError", "MissingExtraError")):
        fix = "install what it imports, or uninstall the package"
    return Finding(found.name, found.owner, "failed", found.error, found.detail, fix)


def _conflicts(tools: list[Installed]) -> list[Finding]:
    by_name: dict[str, list[Installed]] = defaultdict(list)
    for found in tools:
        by_name[found.tool.full_name].append(found)
    return [
        Finding(
            name,
            " and ".join(found.owner for found in owners),
            "failed",
            f"{len(owners)} packages have a tool of this name and version: no agent can start",
            fix="uninstall one of them, or pass a ToolRegistry of just the tools you want",
        )
        for name, owners in by_name.items()
        if len(owners) > 1
    ]


def _one(found: Installed, setup: str | None) -> list[Finding]:
    tool, findings = found.tool, []
    lacks = lacking(tool, found.package)
    if lacks is not None:
        findings.append(
            Finding(
                tool.full_name,
                found.owner,
                "warning",
                f"not offered to models: {lacks.what}",
                "" if lacks.got is None else str(lacks.got),
                lacks.fix or "",
            )
        )
    unsaid = _unexplained(tool)
    if unsaid:
        text = f"the model is told nothing about {', '.join(unsaid)}"
        findings.append(
            Finding(
                tool.full_name, found.owner, "warning", text, fix="say it in the docstring's Args:"
            )
        )
    if setup is not None and lacks is None:
        findings += _set_up(found, setup)
    worst = any(finding.state == "failed" for finding in findings)
    if not worst:
        findings.insert(0, Finding(tool.full_name, found.owner, "ok", "loads"))
    return findings


def _set_up(found: Installed, device: str) -> list[Finding]:
    tool, began = found.tool, time.monotonic()
    if type(tool).setup is PerceptionTool.setup:
        return []
    try:
        tool.prepare(device, seconds=tool.setup_timeout)
    except Exception as error:
        # A stranger's tool can fail in any way; saying how is what this is for.
        line = one_line(f"does not set up on {device}: {type(error).__name__}: {error}")
        detail = "".join(traceback.format_exception(error))
        return [Finding(tool.full_name, found.owner, "failed", line, detail)]
    text = f"sets up on {tool.device or device} in {time.monotonic() - began:.1f} s"
    tool.release()
    return [Finding(tool.full_name, found.owner, "ok", text)]


def _unexplained(tool: PerceptionTool) -> list[str]:
    """Arguments without a description."""
    properties = tool.json_schema().get("properties", {})
    if not isinstance(properties, dict):
        return []
    return [name for name, schema in properties.items() if not _explained(schema)]


def _explained(schema: object) -> bool:
    if not isinstance(schema, dict):
        return False
    inner = [each for key in ("anyOf", "oneOf") for each in schema.get(key, [])]
    return "description" in schema or "$ref" in schema or any(map(_explained, inner))
