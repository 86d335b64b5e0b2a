"""Tools, pictures and clients for the tests of serving."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import uvicorn
from mcp import Client
from mcp_types import CallToolResult, ImageContent, TextContent
from PIL import Image

from vpt_agent.serving.mcp_server import http_app
from vpt_agent.serving.tools import ServedTools
from vpt_agent.tool import PixelBox, SourceView, ToolContext, ToolFailed, perception_tool

T = TypeVar("T")


@perception_tool
def cut(context: ToolContext, box: PixelBox, source: str | None = None) -> list[Any]:
    """Cut a box out of a picture."""
    view = context.require_view()
    return [context.crop(view, box), {"colour": list(view.image.getpixel((0, 0)))}]


@perception_tool(needs=())
def seen(context: ToolContext) -> str:
    """Name every picture that this call could look at."""
    return " ".join(context.views) or "nothing"


@perception_tool
def break_down(how: str) -> str:
    """Fail in some way."""
    if how == "tool":
        raise ToolFailed("the lens is dirty")
    if how == "author":
        return 12  # type: ignore[return-value]
    raise RuntimeError("cannot open /home/somebody/secret.key")


@perception_tool(timeout=0.3, needs=())
def sleep(seconds: float, context: ToolContext) -> str:
    """Take long."""
    context.cancelled.wait(seconds)
    return "awake"


@perception_tool(needs={"view", "control"})
def steer(view: SourceView) -> str:
    """Needs a control state."""
    return view.id


@perception_tool(needs={"view", "encoder:clip"})
def reencode(view: SourceView) -> str:
    """Needs an encoder."""
    return view.id


@perception_tool
def own_image(image: int, view: SourceView) -> str:
    """Has an argument called image itself."""
    return f"{view.id} {image}"


TOOLS = [cut, seen, break_down, sleep, steer, reencode, own_image]


def data_url(colour: str = "red", size: tuple[int, int] = (40, 20)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def texts(result: CallToolResult) -> list[str]:
    return [block.text for block in result.content if isinstance(block, TextContent)]


def pictures(result: CallToolResult) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(block.data)))
        for block in result.content
        if isinstance(block, ImageContent)
    ]


def kind(result: CallToolResult) -> str:
    """The kind of an error; what a client sees of it is checked on the way."""
    assert result.is_error
    error = result.structured_content["error"]
    assert texts(result) == [f"{error['kind']}: {error['message']}"]
    return str(error["kind"])


def talk(server: Any, work: Callable[[Client], Awaitable[T]], **options: Any) -> T:
    """Do ``work`` with the official client."""

    async def run() -> T:
        async with Client(server, **options) as client:
            return await work(client)

    return asyncio.run(run())


@contextmanager
def over_http(served: ServedTools, token: str | None = None) -> Iterator[str]:
    """The address of the served tools on this machine."""
    app = http_app(served, host="127.0.0.1", token=token)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.should_exit = True
        thread.join()
