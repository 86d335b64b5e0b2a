"""A connection to an MCP server, kept on a thread of its own, by the official SDK's client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from vpt_agent.errors import MissingExtraError, ServerError, ToolFailed
from vpt_agent.tool.text import one_line

if TYPE_CHECKING:
    from mcp import Client
    from mcp_types import CallToolResult, Tool

T = TypeVar("T")

_POLL = 0.02
"""Seconds between looks at whether a call is still wanted."""

FRESH = 5.0
"""Seconds for which a server's listing is trusted; not all servers tell when it changes."""

_LONGEST_END = 8.0
"""Seconds that the SDK takes at most to end a server's process."""

_MOST_PAGES, _MOST_TOOLS = 32, 256


def require_sdk() -> None:
    """Raise :class:`MissingExtraError` if the official SDK is not installed."""
    try:
        import mcp  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "tools of MCP servers need the official SDK",
            where="ToolRegistry.mount_mcp",
            fix="pip install 'vpt-agent[mcp]'",
        ) from error


def fingerprint(tool: Tool) -> str:
    """SHA-256 of what a server says of a tool: equal as long as it means the same."""
    said = [tool.name, tool.description, tool.input_schema]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class Link:
    """The tools of one mount share it: connected while one of them is set up.

    ``make`` gives what the SDK's client connects to, anew each time. ``label`` names the server in
    errors. What a server does wrong is a :class:`ToolFailed` in a call.
    """

    def __init__(self, make: Callable[[], Any], label: str, *, seconds: float) -> None:
        self.label, self.seconds = label, seconds
        self._make = make
        self._lock = threading.RLock()
        self._users = 0
        self._running: _Running | None = None

    def acquire(self) -> None:
        """One user more; the first one connects. Raises :class:`ServerError`."""
        with self._lock:
            self._connected()
            self._users += 1

    def release(self) -> None:
        """One user less; the last one hangs up."""
        with self._lock:
            self._users -= 1
            if self._users <= 0:
                self._hang_up()

    def listing(self) -> dict[str, Tool]:
        """The server's tools by name. Raises :class:`ServerError`."""
        with self._lock:
            return self._connected().listed

    def name(self) -> str:
        """What the server calls itself, if it says. Raises :class:`ServerError`."""
        with self._lock:
            info = self._connected().client.server_info
        return "" if info is None else info.name

    def call(
        self,
        name: str,
        known: str,
        arguments: Mapping[str, Any],
        cancelled: threading.Event,
    ) -> CallToolResult:
        """What the server answers. ``known`` is the fingerprint of the tool when it was mounted.

        Raises :class:`ToolFailed` for a server that is gone, or that changed the tool.
        """
        try:
            with self._lock:
                running = self._connected()
                current = running.current(self.seconds).get(name)
        except ServerError as error:
            raise ToolFailed("the MCP server of this tool does not answer") from error
        if current is None:
            raise ToolFailed("the MCP server does not have this tool any more")
        if fingerprint(current) != known:
            raise ToolFailed("the MCP server changed this tool since it was mounted: not called")
        return running.ask(running.client.call_tool(name, dict(arguments)), cancelled)

    def _connected(self) -> _Running:
        if self._running is not None and self._running.gone():
            self._hang_up()
        if self._running is None:
            self._running = _Running(self._make, self.label, self.seconds)
        return self._running

    def _hang_up(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.end()


class _Running:
    """One connection, from its handshake to its end."""

    client: Client
    _task: asyncio.Task[None]

    def __init__(self, make: Callable[[], Any], label: str, seconds: float) -> None:
        self._make, self._label = make, label
        self._up: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._loop = asyncio.new_event_loop()
        self._over = asyncio.Event()
        self._stale = self._gone = False
        self.listed: dict[str, Tool] = {}
        self._asked = 0.0
        # A daemon: a program that never closes its agent must still be able to end.
        self._thread = threading.Thread(target=self._work, name="vpt-mcp", daemon=True)
        self._thread.start()
        try:
            self._up.result(seconds)
            self.listed = self._list(seconds)
        except concurrent.futures.TimeoutError as error:
            self.end()
            raise self._trouble(f"nothing in {seconds:g} s") from error
        except Exception as error:
            self.end()
            raise self._trouble(one_line(_innermost(error))) from error

    def _trouble(self, got: str) -> ServerError:
        return ServerError(
            "an MCP server does not answer as one",
            where=self._label,
            got=got,
            fix="start it by hand to see what it says",
        )

    def _work(self) -> None:
        self._task = self._loop.create_task(self._serve())
        try:
            self._loop.run_until_complete(self._task)
        except BaseException as error:
            if not self._up.done():
                self._up.set_exception(error)  # raised again by the thread that connects
        finally:
            self._gone = True
            with contextlib.suppress(RuntimeError):
                self._loop.run_until_complete(_cancel_all(self._loop))
            self._loop.close()

    async def _serve(self) -> None:
        from mcp import Client
        from mcp_types import ToolListChangedNotification

        async def heard(message: object) -> None:
            if isinstance(message, ToolListChangedNotification):
                self._stale = True

        async with Client(self._make(), cache=None, message_handler=heard) as client:
            self.client = client
            self._up.set_result(None)
            listening = asyncio.ensure_future(self._listen(client))
            try:
                await self._over.wait()
            finally:
                listening.cancel()

    async def _listen(self, client: Client) -> None:
        """Newer servers tell of changes only to those who ask."""
        from mcp.client.subscriptions import ListenNotSupportedError, SubscriptionLost

        tools = client.server_capabilities.tools
        if tools is None or not tools.list_changed:
            return
        try:
            async with client.listen(tools_list_changed=True) as changes:
                async for _ in changes:
                    self._stale = True
        except ListenNotSupportedError:
            return  # an older one tells of itself
        except SubscriptionLost:
            self._stale = True

    def _list(self, seconds: float) -> dict[str, Tool]:
        found: dict[str, Tool] = self._do(self._pages(), seconds)
        self._asked = time.monotonic()
        return found

    async def _pages(self) -> dict[str, Tool]:
        found: dict[str, Tool] = {}
        cursor: str | None = None
        for _ in range(_MOST_PAGES):
            page = await self.client.list_tools(cursor=cursor)
            found |= {tool.name: tool for tool in page.tools}
            cursor = page.next_cursor
            if cursor is None:
                break
        if cursor is not None or len(found) > _MOST_TOOLS:
            raise ValueError(f"more than {_MOST_TOOLS} tools")
        return found

    def current(self, seconds: float) -> dict[str, Tool]:
        """The listing, asked for again if it is old, or the server said that it changed."""
        if self._stale or time.monotonic() - self._asked > FRESH:
            self._stale = False
            try:
                self.listed = self._list(seconds)
            except Exception as error:
                self._stale = True
                raise self._trouble(one_line(_innermost(error))) from error
        return self.listed

    def _do(self, work: Any, seconds: float) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise

    def ask(self, work: Any, cancelled: threading.Event) -> CallToolResult:
        """The answer, waited for until ``cancelled``."""
        from mcp import MCPError

        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while not concurrent.futures.wait([future], timeout=_POLL).done:
            if cancelled.is_set():
                future.cancel()
                raise ToolFailed("the call was ended")
            if self._gone:
                break
        try:
            answer: CallToolResult = future.result(timeout=0)
        except MCPError as error:
            self._gone = self._gone or error.code == _closed_code()
            what = "is gone" if self._gone else f"refused the call: {one_line(error.message, 150)}"
            raise ToolFailed(f"the MCP server of this tool {what}") from error
        except (concurrent.futures.CancelledError, concurrent.futures.TimeoutError) as error:
            self._gone = True
            raise ToolFailed("the MCP server of this tool is gone") from error
        return answer

    def gone(self) -> bool:
        """Whether the connection is over."""
        return self._gone or not self._thread.is_alive()

    def end(self) -> None:
        """Hang up; the process of a server that was started here is ended."""
        # Politely, or out of a handshake that goes on.
        over = self._over.set if self._up.done() else self._task.cancel
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(over)
        self._thread.join(_LONGEST_END)


def _closed_code() -> int:
    from mcp_types import CONNECTION_CLOSED

    return CONNECTION_CLOSED


async def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    tasks = [task for task in asyncio.all_tasks(loop) if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
