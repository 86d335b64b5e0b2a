"""Arguments of a tool: the schema that the model sees, and the check of what it sent.

The object that makes the schema is the object that validates the call, strictly: it takes what the
schema says and nothing near it. What is near (``"12"`` for a number) is put right before, where it
has one reading, and said (:mod:`vpt_agent.tool.fit`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import PydanticSerializationError, to_jsonable_python

from vpt_agent.errors import ModelRetry, ToolDefinitionError
from vpt_agent.tool.fit import fit
from vpt_agent.tool.text import one_line

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

JsonSchema = dict[str, JsonValue]


class ToolArguments(BaseModel):
    """Base of a tool's arguments: names that are not declared are an error, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ArgumentSpec(Protocol):
    """What a tool's arguments are."""

    schema: JsonSchema

    def parse(self, values: object) -> object:
        """``values`` as the tool wants them. Raises :class:`ModelRetry` with one line."""
        ...


def read_values(spec: ArgumentSpec, values: object) -> tuple[object, tuple[str, ...]]:
    """What a call sent, put right where that has one reading, then checked strictly; and what was
    put right. Raises :class:`ModelRetry`."""
    plain = json.loads(_as_json(values))
    if not isinstance(plain, dict):
        return spec.parse(plain), ()
    fitted, repairs = fit(plain, spec.schema)
    return spec.parse(fitted), tuple(repairs)


def _as_json(values: object) -> str:
    """``values`` as the JSON that a model could have sent."""
    try:
        plain = to_jsonable_python(dict(values) if isinstance(values, Mapping) else values)
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
        # Half of a surrogate pair is no text; what validates would stumble over it.
        return text.encode("utf-8", "replace").decode("utf-8")
    except (PydanticSerializationError, TypeError, ValueError, RecursionError) as error:
        where = ""
        if isinstance(values, Mapping) and len(values) > 1:
            for name, value in values.items():
                _as_json({name: value})  # raises, and names the one
        elif isinstance(values, Mapping):
            where = "".join(f"{one_line(name, 60)}: " for name in values)
        raise ModelRetry(f"{where}there is something in it that JSON cannot say") from error


class _Untitled(GenerateJsonSchema):
    """Without the titles that pydantic makes of the names: each would cost the model tokens."""

    def field_title_should_be_set(self, schema: object) -> bool:
        return False


class ModelArguments:
    """Arguments given by a pydantic model, which must forbid names it does not know."""

    def __init__(self, model: type[BaseModel], *, where: str) -> None:
        if model.model_config.get("extra") != "forbid":
            raise ToolDefinitionError(
                "the arguments of a tool must refuse unknown names",
                where=where,
                got=f"{model.__name__} with extra={model.model_config.get('extra', 'ignore')!r}",
                fix="inherit from vpt_agent.tool.ToolArguments",
            )
        try:
            self.schema: JsonSchema = model.model_json_schema(schema_generator=_Untitled)
        except PydanticUserError as error:
            raise ToolDefinitionError(
                "an argument has a type that JSON Schema cannot say",
                where=where,
                got=one_line(error.message),
                expected="numbers, text, lists, pydantic models, Literal",
            ) from error
        self.schema.pop("title", None)
        self.schema.pop("description", None)  # the tool's own says more
        self.model = model

    def parse(self, values: object) -> BaseModel:
        """A validated instance of the model; types are those of the schema, nothing is turned."""
        try:
            return self.model.model_validate_json(_as_json(values), strict=True)
        except ValidationError as error:
            raise ModelRetry(_line(_pydantic_errors(error), error.error_count())) from error


class SchemaArguments:
    """Arguments given by a raw JSON Schema (a tool that comes from elsewhere); parsed to a dict."""

    def __init__(self, schema: Mapping[str, JsonValue], *, where: str) -> None:
        from jsonschema import SchemaError, validators
        from referencing import Registry

        cls = validators.validator_for(schema, default=validators.Draft202012Validator)
        try:
            cls.check_schema(schema)
        except SchemaError as error:
            raise ToolDefinitionError(
                "the schema of a tool's arguments is no JSON Schema",
                where=where,
                got=one_line(error.message),
            ) from error
        if schema.get("type") != "object":
            raise ToolDefinitionError(
                "arguments have names, so their schema is an object",
                where=where,
                got=f"type {schema.get('type')!r}",
                expected="type 'object'",
            )
        outside = sorted({ref for ref in _references(schema) if not ref.startswith("#")})
        if outside:
            raise ToolDefinitionError(
                "a schema may refer to itself only: nothing is fetched to check a call",
                where=where,
                got=", ".join(outside),
                fix="put the definitions under $defs",
            )
        self.schema: JsonSchema = dict(schema)
        # An empty registry, or jsonschema would try the network for what it does not know.
        self._validator: Validator = cls(schema, registry=Registry())

    def parse(self, values: object) -> dict[str, JsonValue]:
        """The values as a dict, checked against the schema."""
        plain = json.loads(_as_json(values))
        errors = sorted(self._validator.iter_errors(plain), key=lambda e: list(map(str, e.path)))
        if errors:
            lines = (f"{'.'.join(map(str, e.path))}: {e.message}".lstrip(": ") for e in errors)
            raise ModelRetry(_line(lines, len(errors)))
        if not isinstance(plain, dict):
            raise ModelRetry("the arguments are no object with names and values")
        return plain


def argument_spec(
    arguments: type[BaseModel] | Mapping[str, JsonValue], *, where: str
) -> ArgumentSpec:
    """The spec of what an author declared. Raises :class:`ToolDefinitionError`."""
    if isinstance(arguments, type) and issubclass(arguments, BaseModel):
        return ModelArguments(arguments, where=where)
    if isinstance(arguments, Mapping):
        return SchemaArguments(arguments, where=where)
    raise ToolDefinitionError(
        "the arguments of a tool are declared wrongly",
        where=where,
        got=repr(arguments),
        expected="a pydantic model (a class), or a JSON Schema (a dict)",
    )


def _pydantic_errors(error: ValidationError) -> Iterator[str]:
    # include_input=False: what the model wrote is not said back to it.
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        place = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        yield f"{place}: {message}" if place else message


def _line(messages: Iterator[str], count: int, most: int = 3) -> str:
    said = [one_line(message, 120) for message, _ in zip(messages, range(most), strict=False)]
    more = f"; and {count - most} more" if count > most else ""
    return "; ".join(said) + more


def _references(schema: JsonValue | Mapping[str, JsonValue]) -> Iterator[str]:
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)
