"""From a function to a tool: signature and docstring say everything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints, overload

from pydantic import BaseModel, Field, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from vpt_agent.errors import ToolDefinitionError
from vpt_agent.tool.arguments import ToolArguments
from vpt_agent.tool.context import FromContext, ToolContext
from vpt_agent.tool.output import ToolReturn
from vpt_agent.tool.spec import PerceptionTool, check_definition
from vpt_agent.tool.text import one_line, split_docstring
from vpt_agent.types import View

Function = Callable[..., ToolReturn]


_WHOLE = "whole context"
_NEEDED = {_WHOLE: "view", "view": "view", "original": "view", "control": "control"}
_SOURCE = "id of the picture to look at; the latest one by default"


@dataclass(frozen=True)
class _Signature:
    """``given`` says which attribute of the context each parameter of the function takes;
    ``passed`` names those that are arguments."""

    arguments: type[BaseModel]
    given: dict[str, str]
    passed: tuple[str, ...]

    @property
    def needs(self) -> set[str]:
        """What a tool needs, as its function says."""
        return {_NEEDED[name] for name in self.given.values() if name in _NEEDED}


class FunctionTool(PerceptionTool):
    """A function as a tool. Calling it calls the function, as before."""

    def __init__(self, function: Function, signature: _Signature) -> None:
        self.function = function
        self.arguments = signature.arguments
        self._signature = signature

    def run(self, arguments: BaseModel, context: ToolContext) -> ToolReturn:
        """Call the function with the fields of ``arguments`` by name."""
        values = {name: getattr(arguments, name) for name in self._signature.passed}
        for name, given in self._signature.given.items():
            values[name] = context if given == _WHOLE else getattr(context, given)
        return self.function(**values)

    def __call__(self, *args: object, **kwargs: object) -> ToolReturn:
        """The function itself, unchecked: for tests and for use in other code."""
        return self.function(*args, **kwargs)

    @property
    def owner(self) -> str:
        """Module and name of the function."""
        return function_owner(self.function)


@overload
def perception_tool(function: Function, /) -> FunctionTool: ...


@overload
def perception_tool(
    *,
    name: str | None = None,
    version: int = 1,
    description: str | None = None,
    needs: Iterable[str] | None = None,
    timeout: float | None = 60.0,
    concurrency: int = 4,
    device: str | None = None,
    max_retries: int = 2,
    always_run: bool = False,
    licence: str = "",
    extra: str = "",
) -> Callable[[Function], FunctionTool]: ...


def perception_tool(
    function: Function | None = None,
    /,
    *,
    name: str | None = None,
    version: int = 1,
    description: str | None = None,
    needs: Iterable[str] | None = None,
    timeout: float | None = 60.0,
    concurrency: int = 4,
    device: str | None = None,
    max_retries: int = 2,
    always_run: bool = False,
    licence: str = "",
    extra: str = "",
) -> FunctionTool | Callable[[Function], FunctionTool]:
    """Make a tool of a function, with or without options.

    The parameters become the arguments (each needs a type; a text in the docstring's ``Args:`` or
    in ``Annotated[..., Field(description=...)]`` explains it to the model). Parameters of these
    types are filled in and never seen by the model: :class:`ToolContext`, ``SourceView``,
    ``OriginalView``, ``ControlState``, ``Rng``, ``Deadline``, ``Cancelled``, or
    ``Annotated[..., FromContext("name")]`` for any attribute of the context. A function with a
    ``SourceView`` has the argument ``source``, with which the model names the view. The docstring's
    first part is the description. ``needs`` is ``{"view"}`` by default for a function that takes a
    context or a view, and has ``"control"`` for one that takes the control state. The other options
    are those of :class:`PerceptionTool`.
    """

    def make(function: Function) -> FunctionTool:
        where = function_owner(function)
        text, described = split_docstring(function.__doc__)
        signature = _signature(function, described, where)
        tool = FunctionTool(function, signature)
        tool.name = name if name is not None else str(getattr(function, "__name__", ""))
        tool.version, tool.description = version, description or text
        found = needs if needs is not None else signature.needs
        tool.needs = frozenset([found] if isinstance(found, str) else found)
        tool.timeout, tool.concurrency, tool.device = timeout, concurrency, device
        tool.max_retries, tool.always_run = max_retries, always_run
        tool.licence, tool.extra = licence, extra
        tool.__doc__ = function.__doc__
        check_definition(tool, where)
        return tool

    return make if function is None else make(function)


def function_owner(function: Function) -> str:
    """Module and name of a function, for errors."""
    name = getattr(function, "__qualname__", repr(function))
    return f"{getattr(function, '__module__', '?')}.{name}"


def _signature(function: Function, described: dict[str, str], where: str) -> _Signature:
    """What a function's parameters are: arguments, or parts of the context."""
    given: dict[str, str] = {}
    fields: dict[str, Any] = {}  # what create_model takes
    hints = _hints(function, where)
    for name, parameter in inspect.signature(function).parameters.items():
        attribute = _from_context(hints.get(name), name, where)
        if attribute is not None:
            if attribute == _WHOLE and _WHOLE in given.values():
                raise ToolDefinitionError("a tool has two contexts", where=where, got=name)
            given[name] = attribute
        else:
            fields[name] = _field(parameter, hints.get(name), described.get(name), where)
    surplus = sorted(set(described) - set(fields) - set(given))
    if surplus:
        raise ToolDefinitionError(
            "the docstring explains parameters that the function does not have",
            where=where,
            got=", ".join(surplus),
            expected=", ".join(fields) or "none",
        )
    passed = tuple(fields)
    if "view" in given.values() and "source" not in (*fields, *given):
        fields["source"] = (str | None, Field(default=None, description=_SOURCE))
    try:
        model = create_model(f"{function.__name__}_arguments", __base__=ToolArguments, **fields)
    except PydanticUserError as error:
        raise ToolDefinitionError(
            "a parameter cannot be an argument of a tool", where=where, got=one_line(error.message)
        ) from error
    return _Signature(model, given, passed)


def _hints(function: Function, where: str) -> dict[str, Any]:
    if inspect.iscoroutinefunction(function):
        raise ToolDefinitionError(
            "a tool runs on a thread, so it cannot be async",
            where=where,
            fix="write a plain function",
        )
    try:
        return get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ToolDefinitionError(
            "a type in the signature is not known when the tool is made",
            where=where,
            got=str(error),
            fix="import it at the top of the module, not under TYPE_CHECKING",
        ) from error


def _from_context(hint: object, name: str, where: str) -> str | None:
    """The attribute of the context that a parameter takes, if it takes one."""
    if hint is ToolContext:
        return _WHOLE
    if hint is View:
        raise ToolDefinitionError(
            "a model cannot send a View",
            where=where,
            got=name,
            fix=f"{name}: SourceView for the picture to look at, {name}: OriginalView for the one "
            "that it was cut from; other views by their id: context.views[id]",
        )
    parts = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    marks = [part for part in parts if isinstance(part, FromContext)]
    if not marks:
        return None
    known = [field.name for field in fields(ToolContext)]
    if marks[0].name not in known:
        raise ToolDefinitionError(
            "the context has no such attribute",
            where=where,
            got=f"{name}: {marks[0].name}",
            expected=", ".join(known),
        )
    return marks[0].name


def _field(
    parameter: inspect.Parameter, hint: object, text: str | None, where: str
) -> tuple[object, object]:
    name = parameter.name
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if parameter.kind not in by_name:
        raise ToolDefinitionError(
            "arguments of a tool are passed by name",
            where=where,
            got=str(parameter),
            expected="no *args, **kwargs or positional-only parameters",
        )
    if hint is None:
        raise ToolDefinitionError(
            "a parameter has no type, so the model cannot be told what to send",
            where=where,
            got=name,
            fix=f"annotate it: {name}: int, or {name}: ToolContext",
        )
    if name.startswith("_") or hasattr(BaseModel, name):
        raise ToolDefinitionError(
            "this name of a parameter has a meaning in pydantic",
            where=where,
            got=name,
            fix="rename it",
        )
    if text and not _explained(hint):
        hint = Annotated[hint, Field(description=text)]
    default = ... if parameter.default is inspect.Parameter.empty else parameter.default
    return hint, default


def _explained(hint: object) -> bool:
    if get_origin(hint) is not Annotated:
        return False
    return any(isinstance(part, FieldInfo) and part.description for part in get_args(hint)[1:])
