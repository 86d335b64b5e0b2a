"""What an extra of an installed package asks for, and what of it is missing."""

from __future__ import annotations

import re
from importlib import metadata

from vpt_agent.errors import MissingExtraError, VPTError
from vpt_agent.tool.spec import PerceptionTool


def missing_requirements(package: str, extra: str) -> list[str]:
    """Requirements of ``package[extra]`` that are not installed (versions are pip's to check)."""
    if not package or not extra:
        return []
    try:
        listed = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    marker = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    missing = []
    for line in listed:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if name is None or not marker.search(line):
            continue
        try:
            metadata.version(name.group())
        except metadata.PackageNotFoundError:
            missing.append(line.split(";")[0].strip())
    return missing


def lacking(tool: PerceptionTool, package: str) -> VPTError | None:
    """What an installed tool lacks, by its own word; else by its extra."""
    if type(tool).lacks is not PerceptionTool.lacks:
        return tool.lacks()
    missing = missing_requirements(package, tool.extra)
    if not missing:
        return None
    return MissingExtraError(
        f"its extra {tool.extra} is not installed: {', '.join(missing)}",
        fix=f"pip install '{package}[{tool.extra}]'",
    )
