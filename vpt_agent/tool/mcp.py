"""Tools of an MCP server as tools of a registry: same call path, checks, limits and traces.

What a server says and sends was written by strangers: names and descriptions are bounded, calls
are checked by us before they are sent, pictures are decoded within limits, and a tool whose
contract changed after it was mounted is not called.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlsplit

from pydantic import JsonValue

from vpt_agent.errors import CallErrorKind, ModelRetry, ToolDefinitionError, ToolFailed, UserError
from vpt_agent.tool.access import Access
from vpt_agent.tool.arguments import ArgumentSpec, JsonSchema, SchemaArguments
from vpt_agent.tool.context import ToolContext
from vpt_agent.tool.mcp_link import Link, fingerprint, require_sdk
from vpt_agent.tool.output import ToolOutput
from vpt_agent.tool.registry import FailedTool, ToolRegistry
from vpt_agent.tool.spec import PerceptionTool, check_definition
from vpt_agent.tool.text import one_line

if TYPE_CHECKING:
    from mcp_types import CallToolResult, Tool
    from PIL import Image

_LONGEST_TEXT = 20_000
_LONGEST_DESCRIPTION = 2_000
_LARGEST_SCHEMA = 64_000
_MOST_PICTURES = 16
_KINDS = frozenset(get_args(CallErrorKind))
_SOURCE: dict[str, JsonValue] = {
    "type": "string",
    "description": "id of the picture to send; the latest one by default",
}

_RECEIVED = Access()  # its limits of bytes and pixels, for pictures that servers send


@dataclass(frozen=True, kw_only=True)
class MountOptions:
    """How a server's tools are mounted; see :func:`mount`."""

    prefix: str | None = None
    only: Iterable[str] | None = None
    pictures: str | Mapping[str, str] | None = None
    timeout: float | None = 60.0
    connect_timeout: float = 30.0
    always_run: bool = True
    env: Mapping[str, str] | None = None
    cwd: str | None = None
    token: str | None = None


class McpTool(PerceptionTool):
    """One tool of a server. ``remote`` is its name there; ``picture`` the argument that is filled
    with the picture that a call looks at, as a data URL, and that models do not see."""

    batch_size = 1
    concurrency = 4

    def __init__(
        self, tool: Tool, link: Link, *, name: str, picture: str | None, options: MountOptions
    ) -> None:
        self.name, self.remote, self.picture, self._link = name, tool.name, picture, link
        self.description = _clean(tool.description or "", _LONGEST_DESCRIPTION) or tool.name
        self.timeout, self.setup_timeout = options.timeout, options.connect_timeout + 5
        self.always_run = options.always_run
        self.needs = frozenset({"view"} if picture is not None else ())
        schema = json.loads(json.dumps(tool.input_schema))
        self.arguments = _asked(schema, picture)
        self._known = fingerprint(tool)

    @property
    def owner(self) -> str:
        """The server, and the tool's name there."""
        return f"{self.remote} of the MCP server {self._link.label}"

    @cached_property
    def spec(self) -> ArgumentSpec:
        """Shows the server's schema whole, and checks all of it but for text patterns: a pattern
        of a stranger's can take hours to match, and the server checks it anyway."""
        assert isinstance(self.arguments, Mapping)
        checked = SchemaArguments(_without_patterns(dict(self.arguments)), where=self.owner)
        checked.schema = dict(self.arguments)
        return checked

    def setup(self, device: str) -> None:
        """Connect, unless another tool of the server did."""
        self._link.acquire()

    def close(self) -> None:
        """Hang up, unless another tool of the server is in use."""
        self._link.release()

    def run(self, arguments: dict[str, JsonValue], context: ToolContext) -> ToolOutput:
        """Send the call, and turn the answer into a result."""
        values: dict[str, Any] = dict(arguments)
        if self.picture is not None:
            values.pop("source", None)
            values[self.picture] = _data_url(context.require_view().image)
        answer = self._link.call(self.remote, self._known, values, context.cancelled)
        if answer.is_error:
            raise _error(answer)
        return _output(answer)


def mount(registry: ToolRegistry, server: object, options: MountOptions) -> tuple[McpTool, ...]:
    """Add the tools of ``server`` to ``registry``, all or none; those that cannot be tools are in
    ``registry.failed`` with their reason.

    ``server``: the address of a streamable HTTP server, the command that starts a stdio one (a
    list; it gets few environment variables, and ``env``), or what else the SDK's client takes.
    Names begin with ``prefix`` (default: the server's name and ``_``). ``only`` names the tools
    that are wanted. ``pictures`` is the argument that takes the picture a call looks at, for all
    tools that have it, or by tool. ``token`` is sent to an address as a bearer token. Raises
    :class:`UserError`, :class:`ServerError`, :class:`ToolDefinitionError` (a name is taken) and
    :class:`MissingExtraError`.
    """
    require_sdk()
    link = Link(*_target(server, options), seconds=options.connect_timeout)
    link.acquire()
    try:
        listed = _wanted(link, options)
        title = link.name() or "mcp"
    finally:
        link.release()  # the tools connect when they are set up, and hang up when they are closed
    prefix = options.prefix if options.prefix is not None else f"{_name(title)}_"
    tools: list[McpTool] = []
    failed: list[FailedTool] = []
    for tool in listed.values():
        name = f"{prefix}{_name(tool.name)}"[:64]
        try:
            made = _made(tool, link, name, options)
        except (ToolDefinitionError, RecursionError) as error:
            owner = f"{one_line(tool.name, 60)} of the MCP server {link.label}"
            failed.append(FailedTool(name, owner, one_line(error), str(error)))
        else:
            tools.append(made)
    registry.add_all(tools)
    registry.failed = (*registry.failed, *failed)
    return tuple(tools)


def _made(tool: Tool, link: Link, name: str, options: MountOptions) -> McpTool:
    size = len(json.dumps(tool.input_schema))
    if size > _LARGEST_SCHEMA:
        raise ToolDefinitionError(
            "the schema of a tool is too large",
            where=link.label,
            got=f"{size} characters",
            expected=f"at most {_LARGEST_SCHEMA}",
        )
    made = McpTool(tool, link, name=name, picture=_picture(tool, options), options=options)
    check_definition(made, made.owner)
    _ = made.spec
    return made


def _picture(tool: Tool, options: MountOptions) -> str | None:
    """The argument of a tool that takes the picture."""
    properties = tool.input_schema.get("properties", {})
    if isinstance(options.pictures, str):
        return options.pictures if options.pictures in properties else None
    name = (options.pictures or {}).get(tool.name)
    if name is not None and name not in properties:
        raise ToolDefinitionError(
            "a tool has no such argument for a picture",
            where=tool.name,
            got=name,
            expected=", ".join(properties) or "none",
        )
    return name


def _wanted(link: Link, options: MountOptions) -> dict[str, Tool]:
    listed = link.listing()
    if options.only is None:
        return listed
    unknown = sorted(set(options.only) - set(listed))
    if unknown:
        raise UserError(
            "the MCP server has no such tool",
            where=link.label,
            got=", ".join(unknown),
            expected=", ".join(listed) or "none",
        )
    return {name: listed[name] for name in options.only}


def _target(server: object, options: MountOptions) -> tuple[Any, str]:
    """What connects to a server, and how it is called in errors (no secrets of its address)."""
    if isinstance(server, str):
        parts = urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                "this is no MCP server",
                got=one_line(server, 80),
                expected="an http(s) address, or the command that starts one, as a list",
            )
        label = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        return lambda: _http(server, options.token), label
    if isinstance(server, Sequence):
        words = [str(word) for word in server]
        if not words:
            raise UserError("the command that starts an MCP server is empty")
        return lambda: _stdio(words, options), PurePath(words[0]).name
    return lambda: server, type(server).__name__


def _http(url: str, token: str | None) -> Any:
    if token is None:
        return url
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    headers = {"Authorization": f"Bearer {token}"}
    client = httpx2.AsyncClient(headers=headers, timeout=httpx2.Timeout(30.0, read=300.0))
    return streamable_http_client(url, http_client=client)


def _stdio(words: list[str], options: MountOptions) -> Any:
    from mcp import StdioServerParameters

    env = None if options.env is None else dict(options.env)
    return StdioServerParameters(command=words[0], args=words[1:], env=env, cwd=options.cwd)


def _name(text: str) -> str:
    """``text`` as the part of a tool's name."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_-") or "tool"
    return plain if not plain[0].isdigit() else f"_{plain}"


def _asked(schema: JsonSchema, picture: str | None) -> JsonSchema:
    """What a model is asked for: the server's arguments; with ``source``, the name of one of the
    run's pictures, in place of the picture itself (and of a ``source`` of the server's)."""
    properties = schema.get("properties")
    if picture is None or not isinstance(properties, dict):
        return schema
    properties.pop(picture)
    properties["source"] = dict(_SOURCE)
    required = schema.get("required")
    if isinstance(required, list):
        schema["required"] = [name for name in required if name not in (picture, "source")]
    return schema


def _without_patterns(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_without_patterns(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    left = {key: _without_patterns(value) for key, value in schema.items()}
    if isinstance(left.get("pattern"), str):
        del left["pattern"]
    if isinstance(left.get("patternProperties"), dict):
        # Which names are allowed is then not known.
        del left["patternProperties"]
        left.pop("additionalProperties", None)
    return left


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _clean(text: str, longest: int) -> str:
    """``text`` without control characters, cut where it is too long."""
    plain = "".join(c for c in text if c.isprintable() or c in "\n\t").strip()
    return plain if len(plain) <= longest else f"{plain[: longest - 1]}…"


def _error(answer: CallToolResult) -> ModelRetry:
    """What a server says of a call that failed; the kind, if it is a server of ours."""
    said = " ".join(block.text for block in answer.content if block.type == "text")
    content = answer.structured_content
    error = content.get("error") if isinstance(content, Mapping) else None
    if isinstance(error, Mapping) and error.get("kind") in _KINDS:
        return ModelRetry(one_line(error.get("message", said)), error["kind"])
    return ModelRetry(one_line(said) or "the MCP server gives no reason", "tool_failed")


def _output(answer: CallToolResult) -> ToolOutput:
    """A server's answer as a result: text, pictures, structured content."""
    texts: list[str] = []
    pictures: list[Image.Image] = []
    for block in answer.content:
        if block.type == "text":
            texts.append(block.text)
        elif block.type == "image":
            pictures.append(_decoded(block.data, len(pictures)))
        elif block.type == "resource_link":
            texts.append(f"[{block.name}: {block.uri}]")
        elif block.type == "resource":
            held = block.resource
            blob = getattr(held, "blob", None)
            if blob is None:
                texts.append(str(getattr(held, "text", "")))
            elif (held.mime_type or "").startswith("image/"):
                pictures.append(_decoded(blob, len(pictures)))
            else:
                texts.append(f"[{held.uri}: {held.mime_type or 'data'}, left out]")
        else:
            texts.append(f"[{block.type} left out]")
    structured = answer.structured_content
    names = _names(structured, len(pictures))
    if names:  # a server of ours: its names for the pictures mean nothing here
        texts = [text for text in texts if not text.startswith(names)]
        structured = structured.get("result")
    if structured is not None and len(json.dumps(structured)) > _LONGEST_TEXT:
        structured = None
        texts.append("[structured content left out: it is too long]")
    text = _clean("\n".join(texts), _LONGEST_TEXT)
    return ToolOutput(views=pictures, text=text or None, structured=structured)


def _names(structured: Any, pictures: int) -> tuple[str, ...]:
    """How the lines begin with which a server of ours names the pictures of a result."""
    views = structured.get("views") if isinstance(structured, Mapping) else None
    if not isinstance(views, list) or len(views) != pictures:
        return ()
    return tuple(f"{view.get('id')}: " for view in views if isinstance(view, Mapping))


def _decoded(data: str, before: int) -> Image.Image:
    if before >= _MOST_PICTURES:
        raise ToolFailed(f"the MCP server sent more than {_MOST_PICTURES} pictures")
    try:
        return _RECEIVED.image(f"data:;base64,{data}")
    except ModelRetry as error:
        raise ToolFailed(f"the MCP server sent a picture that cannot be used: {error}") from error
