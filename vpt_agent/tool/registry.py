"""The tools of an agent: an object that is passed in, never a global."""

from __future__ import annotations

import difflib
import inspect
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any
from weakref import WeakValueDictionary

from vpt_agent.errors import ToolDefinitionError, UserError, VPTError
from vpt_agent.tool.access import NOTHING
from vpt_agent.tool.define import Function, FunctionTool, perception_tool
from vpt_agent.tool.extras import lacking
from vpt_agent.tool.spec import PerceptionTool, check_definition
from vpt_agent.tool.text import one_line
from vpt_agent.types import CallError

ToolLike = PerceptionTool | type[PerceptionTool] | Function
"""What can be added: a tool, a class of one (made without arguments), or a plain function."""

GROUP = "vpt_agent.tools"
"""The entry point group in which packages declare their tools."""


_made: WeakValueDictionary[type[PerceptionTool], PerceptionTool] = WeakValueDictionary()
_making = threading.Lock()


@dataclass(frozen=True)
class FailedTool:
    """A tool of an installed package that did not load, or lacks what it needs: ``error`` in one
    line, ``detail`` whole, and what is to be done."""

    name: str
    owner: str
    error: str
    detail: str
    problem: str = "did not load"
    fix: str = "mend or uninstall the package"


@dataclass(frozen=True)
class Installed:
    """A tool of an installed package: the name of its entry point, and whose it is."""

    name: str
    owner: str
    tool: PerceptionTool
    package: str = ""


def installed_tools(group: str = GROUP) -> list[Installed | FailedTool]:
    """What the entry points of all installed packages give, in order of their names."""
    found: list[Installed | FailedTool] = []
    for point in sorted(entry_points(group=group), key=lambda p: (p.name, p.value)):
        owner = _entry_owner(point)
        try:
            package = point.dist.name if point.dist else ""
            found.append(Installed(point.name, owner, _as_tool(point.load(), owner), package))
        except Exception as error:
            # A stranger's package can fail in any way; it must not take the others with it.
            detail = "".join(traceback.format_exception(error))
            line = one_line(f"{type(error).__name__}: {error}")
            found.append(FailedTool(point.name, owner, line, detail))
    return found


class ToolRegistry:
    """Tools by name. Adding is all or nothing, and a name that is taken is an error.

    Several versions of a tool may stand side by side; the plain name means the newest one, and
    iterating gives the newest of each.
    """

    def __init__(self, tools: Iterable[ToolLike] = ()) -> None:
        self._tools: dict[str, PerceptionTool] = {}
        self._owners: dict[str, str] = {}
        self.failed: tuple[FailedTool, ...] = ()
        """What :meth:`from_entry_points` could not load, or left out."""
        self._installed: set[str] = set()
        self._packages: dict[str, str] = {}
        self.access = NOTHING
        """Files and addresses that its tools may read when arguments name them."""
        self.add_all(tools)

    @classmethod
    def from_entry_points(cls, group: str = GROUP, *, usable: bool = False) -> ToolRegistry:
        """The tools of all installed packages, ours among them, in order of their names.

        A tool that fails to load is kept in :attr:`failed` and reported when it is asked for; two
        packages with one name are a :class:`ToolDefinitionError`. With ``usable`` those that lack
        something (an extra that is not installed, a checkpoint) are left out in the same way.
        """
        registry = cls()
        loaded = installed_tools(group)
        found = [each for each in loaded if isinstance(each, Installed)]
        failed = [each for each in loaded if isinstance(each, FailedTool)]
        lacks = {id(each): lacking(each.tool, each.package) for each in found if usable}
        whole = [each for each in found if lacks.get(id(each)) is None]
        failed += [_left_out(e, error) for e in found if (error := lacks.get(id(e))) is not None]
        registry._add((each.tool, each.owner) for each in whole)
        registry._packages = {each.tool.full_name: each.package for each in whole}
        registry.failed, registry._installed = tuple(failed), set(registry._tools)
        return registry

    @classmethod
    def with_installed(cls, tools: Iterable[ToolLike], group: str = GROUP) -> ToolRegistry:
        """The installed tools that lack nothing, and ``tools``, which must lack nothing either.

        One of the class of an installed tool (the same detector with another checkpoint) takes
        its place.
        """
        registry = cls.from_entry_points(group, usable=True)
        new: dict[str, PerceptionTool] = {}
        for tool in (_as_tool(tool, None) for tool in tools):
            error, old = tool.lacks(), registry._tools.get(tool.full_name)
            if error is not None:
                raise error
            alike = old is tool or (type(old) is type(tool) and not isinstance(old, FunctionTool))
            if old is not None and alike and tool.full_name not in new:
                del registry._tools[tool.full_name], registry._owners[tool.full_name]
            if new.get(tool.full_name) is not tool:
                registry.add(tool)
            new[tool.full_name] = tool
            registry._installed.discard(tool.full_name)
        names = {tool.name for tool in new.values()}
        registry.failed = tuple(each for each in registry.failed if each.name not in names)
        return registry

    def lacks(self, name: str) -> VPTError | None:
        """What has to be done before a tool can be called: by its own word, else by the extra of
        the package that it was installed with; None: nothing."""
        tool = self[name]
        return lacking(tool, self._packages.get(tool.full_name, ""))

    @property
    def given(self) -> tuple[PerceptionTool, ...]:
        """The tools that somebody named; the others are here because they are installed."""
        return tuple(tool for tool in self if tool.full_name not in self._installed)

    def add(self, tool: ToolLike) -> PerceptionTool:
        """Add one tool and give it back. A plain function becomes a tool."""
        made = _as_tool(tool, None)
        self._add([(made, made.owner)])
        return made

    def add_all(self, tools: Iterable[ToolLike]) -> None:
        """Add all of ``tools``, or none if one of them cannot be added."""
        made = [_as_tool(tool, None) for tool in tools]
        self._add([(tool, tool.owner) for tool in made])

    def mount_mcp(self, server: object, **options: Any) -> tuple[PerceptionTool, ...]:
        """Add the tools of an MCP server: its address, or the command that starts it, as a list.

        The options are those of :class:`vpt_agent.tool.mcp.MountOptions`: see
        :func:`vpt_agent.tool.mcp.mount`. Needs the extra ``mcp``.
        """
        from vpt_agent.tool.mcp import MountOptions, mount

        return mount(self, server, MountOptions(**options))

    def _add(self, new: Iterable[tuple[PerceptionTool, str]]) -> None:
        tools, owners = dict(self._tools), dict(self._owners)
        for tool, owner in new:
            name = tool.full_name
            if name in tools:
                raise ToolDefinitionError(
                    f"two tools are called {name}",
                    where=f"{owners[name]} and {owner}",
                    fix="rename one of them, raise its version, or leave one out: "
                    "ToolRegistry([...]) takes just the tools that you name",
                )
            tools[name], owners[name] = tool, owner
        self._tools, self._owners = tools, owners

    def find(self, name: str) -> PerceptionTool | None:
        """The tool of this name (``crop_region`` or ``crop_region@1``), or None."""
        if name in self._tools:
            return self._tools[name]
        for tool in self._tools.values():
            if name in tool.takes_calls_of:
                return tool
        versions = [tool for tool in self._tools.values() if tool.name == name]
        return max(versions, key=lambda tool: tool.version, default=None)

    def get(self, name: str) -> PerceptionTool | CallError:
        """The tool that a call names, or the error that the model is told."""
        tool = self.find(name)
        if tool is not None:
            return tool
        said = one_line(name, 60)
        for failed in self.failed:
            if failed.name == name:
                message = f"the tool {said} is installed but {failed.problem}"
                return CallError("unknown_tool", message, f"{failed.owner}\n{failed.detail}")
        names = [tool.name for tool in self]
        close = difflib.get_close_matches(said, names, n=3)
        hint = f"did you mean {' or '.join(close)}" if close else f"tools: {', '.join(names[:20])}"
        return CallError("unknown_tool", f"there is no tool {said!r}; {hint}")

    def __getitem__(self, name: str) -> PerceptionTool:
        """The tool that a user names. Raises :class:`UserError`, or
        :class:`ToolDefinitionError` if it is installed but did not load."""
        tool = self.find(name)
        if tool is not None:
            return tool
        for failed in self.failed:
            if failed.name == name:
                raise ToolDefinitionError(
                    f"this tool is installed but {failed.problem}",
                    where=failed.owner,
                    got=failed.error,
                    fix=failed.fix,
                )
        raise UserError(
            "there is no such tool",
            got=name,
            expected=", ".join(tool.name for tool in self) or "none: the registry is empty",
            fix="add it to the registry, or install the package that has it",
        )

    def owner(self, name: str) -> str:
        """Where a tool comes from: module and name, and the package that was installed."""
        return self._owners[self[name].full_name]

    def contracts(self) -> dict[str, str]:
        """Contract hashes by versioned name, for traces and checkpoints; those of older versions
        too, where a newer one takes their calls."""
        older = {k: v for tool in self._tools.values() for k, v in tool.takes_calls_of.items()}
        now = {name: tool.contract_hash for name, tool in self._tools.items()}
        return dict(sorted((older | now).items()))

    def close(self) -> None:
        """Close every tool that is set up; those that are called again are set up again. Agents
        close the tools that they used by themselves."""
        for tool in self._tools.values():
            tool.release()

    def __iter__(self) -> Iterator[PerceptionTool]:
        newest: dict[str, PerceptionTool] = {}
        for tool in self._tools.values():
            if tool.name not in newest or newest[tool.name].version < tool.version:
                newest[tool.name] = tool
        return iter(newest.values())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.find(name) is not None

    def __repr__(self) -> str:
        return f"ToolRegistry({', '.join(self._tools) or 'empty'})"


def _left_out(found: Installed, error: VPTError) -> FailedTool:
    return FailedTool(
        found.tool.name,
        found.owner,
        error.what,
        str(error),
        problem="cannot be used yet",
        fix=error.fix or "see `vpt-agent tools doctor`",
    )


def _as_tool(item: object, owner: str | None) -> PerceptionTool:
    if isinstance(item, type) and issubclass(item, PerceptionTool):
        item = _instance(item)
    elif inspect.isfunction(item):
        item = perception_tool(item)
    if isinstance(item, PerceptionTool):
        check_definition(item, owner or item.owner)
        return item
    raise ToolDefinitionError(
        "this is not a tool",
        where=owner,
        got=repr(item),
        expected="a PerceptionTool, a subclass that is made without arguments, or a function",
    )


def _instance(cls: type[PerceptionTool]) -> PerceptionTool:
    """The one tool of a class: what it loads, it loads once in a process."""
    with _making:
        tool = _made.get(cls)
        if tool is None:
            tool = _made[cls] = cls()
        return tool


def _entry_owner(point: EntryPoint) -> str:
    package = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"
    return f"{point.value} ({package})"
