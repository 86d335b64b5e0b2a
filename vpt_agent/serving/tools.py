"""The registry's tools as another agent calls them: a picture comes with the call, or is named."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mcp_types import CallToolResult, TextContent, Tool, ToolAnnotations
from pydantic import Field, JsonValue

from vpt_agent.errors import ModelRetry, ToolDefinitionError, UserError
from vpt_agent.serving.content import OUTPUT, failed, picture, said
from vpt_agent.serving.workspace import ROOM, Room, Workspace, Workspaces
from vpt_agent.tokens.grid import RegionPolicy
from vpt_agent.tokens.table import PerceptionKind
from vpt_agent.tool import (
    Access,
    Pending,
    PerceptionTool,
    Submitted,
    ToolArguments,
    ToolContext,
    ToolPool,
    ToolRegistry,
    call_error,
)
from vpt_agent.tool.access import NOTHING
from vpt_agent.tool.arguments import read_values
from vpt_agent.tool.call import RAISED
from vpt_agent.tool.text import one_line
from vpt_agent.types import Box, CallError, ToolCall, ToolResult, View
from vpt_agent.vision.frames import crop_view

log = logging.getLogger(__name__)

IMAGE = "image"
"""The argument that brings a picture with a call."""

OPEN = "open_image"
"""The tool of the server's own: it makes a view of a picture."""


@dataclass(frozen=True)
class ServeOptions:
    """How tools are served. ``access``: what pictures may be named; ``room``: what clients may
    hold; ``seconds`` for one call, waiting included; ``longest`` side of a picture as it is sent,
    in pixels; ``regions`` and ``kinds``: a model's own grid, for clients that are such a model;
    ``device`` and ``workers`` for the tools."""

    access: Access = NOTHING
    room: Room = ROOM
    seconds: float = 120.0
    longest: int = 1568
    regions: RegionPolicy = "published"
    kinds: Mapping[str, PerceptionKind] = field(default_factory=dict)
    device: str = "cpu"
    workers: int = 8


class OpenArguments(ToolArguments):
    """Arguments of ``open_image``."""

    image: str = Field(description="")
    show: bool = Field(default=False, description="whether the picture comes back, too")


class _OpenImage(PerceptionTool):
    """Open a picture, so that later calls can look at it: they name it as their source."""

    name = OPEN
    arguments = OpenArguments

    def run(self, arguments: OpenArguments, context: ToolContext) -> str:
        raise ToolDefinitionError("the server answers this itself", where=OPEN)


def left_out(tool: PerceptionTool) -> str | None:
    """Why a tool cannot be served, if it cannot: what it needs only a model can give."""
    if "control" in tool.needs:
        return "it needs a control state, which only a model's perception tokens carry"
    encoders = sorted(need.partition(":")[2] for need in tool.needs if ":" in need)
    if encoders:
        return f"it needs the encoder {' and '.join(encoders)} of a model"
    return None


def _lacks(registry: ToolRegistry, tool: PerceptionTool) -> str | None:
    """What is missing here for a tool to work, and how to get it. No paths: clients read it."""
    error = registry.lacks(tool.name)
    if error is None:
        return None
    return error.what if error.fix is None else f"{error.what}; {error.fix}"


class ServedTools:
    """Lists and answers; for all clients of a server. ``left_out`` says what is not served, why:
    what only a model can give, or what is not installed here.

    Raises :class:`ToolDefinitionError` if a tool has the name of the server's own.
    """

    def __init__(self, registry: ToolRegistry, options: ServeOptions = ServeOptions()) -> None:
        self.options = options
        self.spaces = Workspaces(options.room)
        reasons = {tool.name: left_out(tool) or _lacks(registry, tool) for tool in registry}
        self.left_out = {name: reason for name, reason in reasons.items() if reason is not None}
        self.registry = ToolRegistry(t for t in registry if t.name not in self.left_out)
        self.registry.failed = registry.failed
        if OPEN in registry:
            raise ToolDefinitionError(
                f"a tool is called {OPEN}, which is the server's own",
                where=registry.owner(OPEN),
                fix="rename it, or serve a registry without it",
            )
        self._open = _OpenImage()
        self._pool = ToolPool(workers=options.workers)

    def close(self) -> None:
        """Take no more calls, let go of all views, and close the tools."""
        self._pool.close()
        self.spaces.clear()

    # -- what clients are told -----------------------------------------------------------------

    def listing(self) -> list[Tool]:
        """The tools as MCP lists them."""
        hints = ToolAnnotations(
            read_only_hint=True, idempotent_hint=True, open_world_hint=self.options.access.urls
        )
        return [
            Tool(
                name=tool.name,
                description=tool.description,
                input_schema=self.schema(tool),
                output_schema=OUTPUT,
                annotations=hints,
            )
            for tool in (self._open, *self.registry)
        ]

    def schema(self, tool: PerceptionTool) -> dict[str, JsonValue]:
        """What a tool takes: its own arguments, and :data:`IMAGE` if it looks at a picture."""
        schema = tool.json_schema()
        properties = schema.setdefault("properties", {})
        if isinstance(properties, dict) and (tool is self._open or takes_image(tool)):
            properties[IMAGE] = {"type": "string", "description": self.ways()}
        return schema

    def ways(self) -> str:
        """How a picture is given."""
        ways = ["a data URL (data:image/png;base64,...)"]
        if self.options.access.roots:
            ways.append("the path of a file under the server's folders")
        if self.options.access.urls:
            ways.append("an http(s) address")
        return f"the picture to look at: {' or '.join(ways)}"

    def instructions(self) -> str:
        """What a client should know before it calls."""
        return (
            f"Tools that look at a picture take it as `{IMAGE}` ({self.ways()}), or look at one "
            "that they know: every result names its pictures, and `source` names one of them. "
            f"`{OPEN}` opens a picture once for several calls. Without both, tools look at the "
            "picture opened last. Names of pictures are good for this client only, for a while."
        )

    # -- calls ---------------------------------------------------------------------------------

    def call(self, name: str, arguments: Mapping[str, Any], session: str | None) -> Call:
        """A call that can be run on any thread, and cancelled from any other. ``session`` is the
        client's; None for one that has none."""
        return Call(self, name, dict(arguments), session)

    def tool(self, name: str) -> PerceptionTool | CallError:
        """The tool that a call names, or the error that the client is told."""
        if name == OPEN:
            return self._open
        plain = name.partition("@")[0]
        if plain in self.left_out and name not in self.registry:
            return CallError("unknown_tool", f"{plain} is not served: {self.left_out[plain]}")
        return self.registry.get(name)


def takes_image(tool: PerceptionTool) -> bool:
    """Whether a picture can come with a call: the tool looks at one, and has no argument of that
    name itself."""
    properties = tool.json_schema().get("properties", {})
    return "view" in tool.needs and isinstance(properties, dict) and IMAGE not in properties


class Call:
    """One call of one client."""

    def __init__(
        self, served: ServedTools, name: str, arguments: dict[str, Any], session: str | None
    ) -> None:
        self.served, self.name, self.arguments, self.session = served, name, arguments, session
        self._lock = threading.Lock()
        self._pending: Pending | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """Nobody waits for the result any more."""
        with self._lock:
            self._cancelled = True
            pending = self._pending
        if pending is not None:
            pending.cancel()

    def run(self) -> CallToolResult:
        """The result, or the error with one line; never raises for what a client sent or a tool
        did."""
        tool = self.served.tool(self.name)
        if isinstance(tool, CallError):
            return failed(tool)
        try:
            return self._run(tool)
        except ModelRetry as error:
            return failed(call_error(tool, error))
        except CancelledError:
            return failed(CallError("limit", "the call was cancelled"))
        except Exception as error:
            # Users' and authors' faults, and ours: the client can mend none of them, and must not
            # learn more of this machine than that.
            log.error("%s failed", tool.full_name, exc_info=error)
            known = isinstance(error, (*RAISED, UserError))
            told = one_line(getattr(error, "what", "")) if known else "the server failed"
            return failed(CallError("tool_failed", f"{tool.name}: {told}"))

    def _run(self, tool: PerceptionTool) -> CallToolResult:
        space = self._space()
        longest = self.served.options.longest
        if tool.name == OPEN:
            values, _ = read_values(tool.spec, self.arguments)
            assert isinstance(values, OpenArguments)
            view = self._opened(space, values.image)
            blocks = picture(view, longest=longest)
            told = ToolResult("", OPEN, text=None)
            shown = said(told, [view], longest=longest)
            content = blocks if values.show else [b for b in blocks if isinstance(b, TextContent)]
            return shown.model_copy(update={"content": content})
        source = self.arguments.pop(IMAGE, None) if takes_image(tool) else None
        given = None if source is None else self._given(tool, space, source)
        result = self._result(tool, space, given)
        if result.error is not None and result.error.detail:
            log.warning("%s: %s\n%s", tool.full_name, result.error.message, result.error.detail)
        if result.features is not None and not result.views and result.text is None:
            line = f"{tool.name} gives visual features only, which MCP cannot carry"
            return failed(CallError("tool_failed", line))
        views = space.add(result.views)
        self.served.spaces.hold(space)
        return said(result, views, longest=longest)

    def _space(self) -> Workspace:
        if self.session is not None:
            return self.served.spaces.of(self.session)
        return self.served.spaces.named(_texts(self.arguments))

    def _given(self, tool: PerceptionTool, space: Workspace, source: object) -> View:
        """The picture that came with the call. The other arguments are checked first: a call that
        is none opens no picture."""
        if self.arguments.get("source") is not None:
            raise ModelRetry(f"give {IMAGE} or source, not both")
        if not isinstance(source, str):
            raise ModelRetry(f"{IMAGE}: {self.served.ways()}")
        read_values(tool.spec, self.arguments)
        return self._opened(space, source)

    def _opened(self, space: Workspace, source: str) -> View:
        view = space.open(self.served.options.access.image(source))
        self.served.spaces.hold(space)
        return view

    def _result(self, tool: PerceptionTool, space: Workspace, view: View | None) -> ToolResult:
        options = self.served.options
        call = ToolCall(space.call_id(), tool.name, self.arguments, "json")
        ends = time.monotonic() + options.seconds
        make = partial(_context, options, space, call, view, ends)
        with self._lock:
            if self._cancelled:
                raise CancelledError
            pool = self.served._pool
            self._pending = pool.submit([Submitted(tool, call, make, deadline=ends)])
        self._pending.start()
        return self._pending.futures[0].result()


def _context(
    options: ServeOptions, space: Workspace, call: ToolCall, view: View | None, ends: float
) -> ToolContext:
    views = space.seen()
    count = itertools.count(1)

    def crop(parent: View, box: Box) -> View:
        resized = parent.size != (parent.box.width, parent.box.height)
        root = views.get(parent.root) if resized else None
        name = f"{call.id}.{next(count)}"
        return crop_view(parent, box, id=name, origin=call.name, root=root)

    opened = [each for each in views.values() if each.origin == "given" and each.parent is None]
    return ToolContext(
        views=views,
        view=view or (opened[-1] if opened else None),
        rng=random.Random(f"0:{call.id.rpartition('-')[2]}"),
        deadline=ends,
        regions=options.regions,
        kinds=options.kinds,
        device=options.device,
        access=options.access,
        crop=crop,
    )


def _texts(value: object) -> Iterator[str]:
    """All texts in the arguments of a call; not pictures, which are long."""
    if isinstance(value, str):
        if len(value) <= 200:
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
