"""Tools that a person names on the command line: in a file, or in an importable module."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from vpt_agent.errors import ToolDefinitionError, UserError, VPTError
from vpt_agent.tool.registry import ToolRegistry
from vpt_agent.tool.spec import PerceptionTool
from vpt_agent.tool.text import one_line

_EXPECTED = "FILE.py, FILE.py:NAME, or MODULE:NAME"


def is_reference(name: str) -> bool:
    """Whether ``name`` says where a tool is, and is no tool's name."""
    return name.endswith(".py") or ":" in name


def tools_at(reference: str) -> list[PerceptionTool]:
    """The tool that ``FILE.py:NAME`` or ``MODULE:NAME`` names, or all tools of ``FILE.py``.

    The file or module is imported, as Python does: name only what you would run. Raises
    :class:`UserError` if it cannot be imported, :class:`ToolDefinitionError` for what is no tool.
    """
    place, _, name = reference.rpartition(":") if ":" in reference else (reference, "", "")
    if not place or (not name and not place.endswith(".py")):
        raise UserError("this does not say where a tool is", got=reference, expected=_EXPECTED)
    module = _imported(place)
    if name:
        if not hasattr(module, name):
            found = ", ".join(_tools_in(module)) or "none"
            raise UserError("there is no such tool", where=place, got=name, expected=found)
        return [ToolRegistry().add(getattr(module, name))]
    names = _tools_in(module)
    if not names:
        raise ToolDefinitionError(
            "this file defines no tool",
            where=place,
            fix="decorate a function with @perception_tool, or write a class of PerceptionTool",
        )
    return [ToolRegistry().add(getattr(module, each)) for each in names]


def tools_named(name: str, installed: ToolRegistry) -> list[PerceptionTool]:
    """What a person means by ``name``: a reference as for :func:`tools_at`, an installed tool, or
    all tools that an importable module defines."""
    if is_reference(name):
        return tools_at(name)
    known = any(failed.name == name for failed in installed.failed)
    if name in installed or known or not _importable(name):
        return [installed[name]]  # raises for one that did not load, and for no tool at all
    module = _imported(name)
    found = _tools_in(module)
    if not found:
        raise ToolDefinitionError(
            "this module defines no tool", where=name, fix=f"name one: {name}:NAME"
        )
    return [ToolRegistry().add(getattr(module, each)) for each in found]


def _importable(name: str) -> bool:
    """Whether there is such a module; its parents are imported to find out."""
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _tools_in(module: ModuleType) -> list[str]:
    """Names under which a module defines tools (not those that it imports)."""
    found = []
    for name, value in vars(module).items():
        cls = value if isinstance(value, type) else type(value)
        if not issubclass(cls, PerceptionTool) or not cls.__module__ or name.startswith("_"):
            continue
        owner = value.owner if isinstance(value, PerceptionTool) else f"{cls.__module__}."
        if owner.startswith(f"{module.__name__}.") and value.name:
            found.append(name)
    return found


def _imported(place: str) -> ModuleType:
    try:
        return _file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except VPTError:
        raise
    except Exception as error:
        # A person's file can fail in any way; all of them mean that it has to be mended.
        raise UserError(
            "the tools cannot be loaded",
            where=place,
            got=one_line(f"{type(error).__name__}: {error}"),
            fix="run it with python to see more",
        ) from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError("there is no such file of tools", got=path, expected=_EXPECTED)
    name = "tools_in_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError("this file cannot be imported", got=path, expected=_EXPECTED)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks types up there
    sys.path.insert(0, str(path.parent.resolve()))  # as for a script: its neighbours are found
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.pop(0)
    return module
