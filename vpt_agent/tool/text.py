"""Text of the calls: one line for the model, the description part of a docstring."""

from __future__ import annotations

import inspect
import re

_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$")
_ARGUMENT = re.compile(r"^(\w+)(?:\s*\([^)]*\))?\s*:\s*(.*)$")
_FIELD = re.compile(r"^:param\s+(?:[^:]*\s)?(\w+)\s*:\s*(.*)$")


def one_line(text: object, limit: int = 300) -> str:
    """``text`` on one line of at most ``limit`` characters, control characters left out."""
    words = " ".join(str(text).encode("utf-8", "replace").decode("utf-8").split())
    words = "".join(c for c in words if c.isprintable())
    return words if len(words) <= limit else words[: limit - 1] + "…"


def split_docstring(doc: str | None) -> tuple[str, dict[str, str]]:
    """The description in a docstring, and what it says of each parameter.

    Reads an ``Args:`` block (``name: text`` or ``name (type): text``, longer texts indented) and
    ``:param name: text`` lines. Everything before the first of them is the description.
    """
    description: list[str] = []
    parameters: dict[str, str] = {}
    section, current, indent = "", None, 0
    for line in inspect.cleandoc(doc or "").splitlines():
        bare = line.strip()
        field = _FIELD.match(bare)
        heading = _SECTION.match(line)
        if heading or bare.startswith((":return", ":raises")):
            section, current, indent = heading.group(1) if heading else ":", None, 0
        elif field:
            section, current = ":param", field.group(1)
            parameters[current] = field.group(2)
        elif section in ("Args", "Arguments", "Parameters") and bare:
            here = len(line) - len(line.lstrip())
            indent = indent or here
            entry = _ARGUMENT.match(bare)
            if entry and here <= indent:
                current = entry.group(1)
                parameters[current] = entry.group(2)
            elif current:
                parameters[current] = f"{parameters[current]} {bare}".strip()
        elif section == ":param" and current and bare:
            parameters[current] = f"{parameters[current]} {bare}".strip()
        elif not section:
            description.append(line)
    return "\n".join(description).strip(), parameters
