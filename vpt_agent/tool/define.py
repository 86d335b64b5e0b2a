"""From a function to a tool: signature and docstring say everything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_args, get_origin, get_type_hints, overload

from pydantic import BaseModel, Field, create_model
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo

from vpt_agent.errors import ToolDefinitionError
from vpt_agent.tool.arguments import ToolArguments
from vpt_agent.tool.context import ToolContext
from vpt_agent.tool.output import ToolReturn
from vpt_agent.tool.spec import PerceptionTool, check_definition
from vpt_agent.tool.text import one_line, split_docstring

Function = Callable[..., ToolReturn]


class FunctionTool(PerceptionTool):
    """A function as a tool. Calling it calls the function, as before."""

    def __init__(self, function: Function, arguments: type[BaseModel], context: str | None) -> None:
        self.function = function
        self.arguments = arguments
        self._context = context

    def run(self, arguments: BaseModel, context: ToolContext) -> ToolReturn:
        """Call the function with the fields of ``arguments`` by name."""
        values = {name: getattr(arguments, name) for name in type(arguments).model_fields}
        if self._context is not None:
            values[self._context] = context
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
    batch_size: int = 1,
    device: str | None = None,
    max_retries: int = 2,
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
    batch_size: int = 1,
    device: str | None = None,
    max_retries: int = 2,
    licence: str = "",
    extra: str = "",
) -> FunctionTool | Callable[[Function], FunctionTool]:
    """Make a tool of a function, with or without options.

    The parameters become the arguments (each needs a type; a text in the docstring's ``Args:`` or
    in ``Annotated[..., Field(description=...)]`` explains it to the model); a parameter of type
    :class:`ToolContext` is filled in and never seen by the model. The docstring's first part is
    the description. ``needs`` is ``{"view"}`` by default for a function that takes a context.
    The other options are those of :class:`PerceptionTool`.
    """

    def make(function: Function) -> FunctionTool:
        where = function_owner(function)
        text, described = split_docstring(function.__doc__)
        model, context = _signature(function, described, where)
        tool = FunctionTool(function, model, context)
        tool.name = name if name is not None else str(getattr(function, "__name__", ""))
        tool.version, tool.description = version, description or text
        found = needs if needs is not None else ({"view"} if context else ())
        tool.needs = frozenset([found] if isinstance(found, str) else found)
        tool.timeout, tool.batch_size, tool.device = timeout, batch_size, device
        tool.max_retries, tool.licence, tool.extra = max_retries, licence, extra
        tool.__doc__ = function.__doc__
        check_definition(tool, where)
        return tool

    return make if function is None else make(function)


def function_owner(function: Function) -> str:
    """Module and name of a function, for errors."""
    name = getattr(function, "__qualname__", repr(function))
    return f"{getattr(function, '__module__', '?')}.{name}"


def _signature(
    function: Function, described: dict[str, str], where: str
) -> tuple[type[BaseModel], str | None]:
    """The model of a function's parameters, and the name of the one that takes the context."""
    if inspect.iscoroutinefunction(function):
        raise ToolDefinitionError(
            "a tool runs on a thread, so it cannot be async",
            where=where,
            fix="write a plain function",
        )
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ToolDefinitionError(
            "a type in the signature is not known when the tool is made",
            where=where,
            got=str(error),
            fix="import it at the top of the module, not under TYPE_CHECKING",
        ) from error
    context: str | None = None
    fields: dict[str, Any] = {}  # what create_model takes
    for name, parameter in inspect.signature(function).parameters.items():
        if hints.get(name) is ToolContext:
            if context is not None:
                raise ToolDefinitionError("a tool has two contexts", where=where, got=name)
            context = name
        else:
            fields[name] = _field(parameter, hints.get(name), described.get(name), where)
    surplus = sorted(set(described) - set(fields) - {context})
    if surplus:
        raise ToolDefinitionError(
            "the docstring explains parameters that the function does not have",
            where=where,
            got=", ".join(surplus),
            expected=", ".join(fields) or "none",
        )
    try:
        return create_model(f"{function.__name__}_arguments", __base__=ToolArguments, **fields), (
            context
        )
    except PydanticUserError as error:
        raise ToolDefinitionError(
            "a parameter cannot be an argument of a tool", where=where, got=one_line(error.message)
        ) from error


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
