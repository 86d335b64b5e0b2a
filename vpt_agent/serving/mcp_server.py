"""``vpt-agent mcp``: the served tools over stdio and streamable HTTP, by the official SDK.

A client over stdio, or over HTTP with a session (protocols up to 2025-11-25), has its views by
plain names. Protocol 2026-07-28 has no sessions over HTTP: there the names of views carry a key
that cannot be guessed (:mod:`vpt_agent.serving.workspace`).
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp_types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
)
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

from vpt_agent import __version__
from vpt_agent.errors import UserError
from vpt_agent.serving.tools import ServedTools

if TYPE_CHECKING:
    from mcp.server.context import ServerRequestContext

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

PATH = "/mcp"
SESSION = "mcp-session-id"
LOCAL = "local"
"""The session of the one client of a server that has one: over stdio."""


def make_server(served: ServedTools) -> Server[Any]:
    """An MCP server of the SDK with our tools. It may serve many clients at once."""
    limiter = anyio.CapacityLimiter(4 * served.options.workers)

    async def list_tools(
        context: ServerRequestContext[Any], params: PaginatedRequestParams | None
    ) -> ListToolsResult:
        return ListToolsResult(tools=served.listing())

    async def call_tool(
        context: ServerRequestContext[Any], params: CallToolRequestParams
    ) -> CallToolResult:
        call = served.call(params.name, params.arguments or {}, session_of(context))
        try:
            return await anyio.to_thread.run_sync(call.run, abandon_on_cancel=True, limiter=limiter)
        except anyio.get_cancelled_exc_class():
            call.cancel()
            raise

    return Server(
        "vpt-agent",
        version=__version__,
        title="Perception tools",
        instructions=served.instructions(),
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )


def session_of(context: ServerRequestContext[Any]) -> str | None:
    """What tells a client from others: the session of its transport; None if it has none."""
    if context.request is None:
        return LOCAL
    if context.protocol_version not in HANDSHAKE_PROTOCOL_VERSIONS:
        return None  # nobody has checked the header then: it could name another client's session
    header = context.request.headers.get(SESSION)
    return None if header is None else str(header)


def serve_stdio(served: ServedTools) -> None:
    """Serve the process that started this one, until it hangs up."""

    async def run() -> None:
        server = make_server(served)
        async with stdio_server() as (read, write):
            await server.run(read, write, server.create_initialization_options())

    try:
        anyio.run(run)
    finally:
        served.close()


def http_app(
    served: ServedTools, *, host: str, token: str | None = None, names: tuple[str, ...] = ()
) -> App:
    """The ASGI application: MCP at :data:`PATH`.

    ``token``: every request must bear it. ``names``: what the Host header may say besides
    ``host``. Raises :class:`UserError` for a ``host`` that others reach without a token.
    """
    from mcp.server.transport_security import TransportSecuritySettings

    if not is_loopback(host) and not token:
        raise UserError(
            "other machines could use this server",
            where="vpt-agent mcp --http",
            got=host,
            fix="set VPT_AGENT_MCP_TOKEN to a secret that clients send as a bearer token, or "
            "serve on 127.0.0.1",
        )
    local = ("127.0.0.1", "localhost", "[::1]") if is_loopback(host) else (host,)
    hosts = [entry for name in (*local, *names) for entry in (name, f"{name}:*")]
    inner = make_server(served).streamable_http_app(
        streamable_http_path=PATH,
        host=host,
        max_request_body_size=served.options.access.max_bytes * 4 // 3 + 2**16,
        session_idle_timeout=served.options.room.seconds,
        max_sessions=served.options.room.clients,
        transport_security=TransportSecuritySettings(
            # A page in a browser could otherwise reach a local server under a name of its own.
            enable_dns_rebinding_protection=is_loopback(host) or bool(names),
            allowed_hosts=hosts,
            allowed_origins=[f"http://{entry}" for entry in hosts],
        ),
    )
    return _Guarded(inner, served, token)


class _Guarded:
    """Asks for the token, and lets go of a session's views when its client ends it."""

    def __init__(self, inner: App, served: ServedTools, token: str | None) -> None:
        self.inner, self.served, self.token = inner, served, token

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self.token is not None:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
                said = [(b"www-authenticate", b"Bearer"), (b"content-type", b"text/plain")]
                await send({"type": "http.response.start", "status": 401, "headers": said})
                await send({"type": "http.response.body", "body": b"a bearer token is needed"})
                return
        await self.inner(scope, receive, send)
        if scope["method"] == "DELETE" and SESSION.encode() in headers:
            self.served.spaces.drop(headers[SESSION.encode()].decode("latin-1"))


def serve_http(
    served: ServedTools,
    *,
    host: str,
    port: int,
    token: str | None = None,
    names: tuple[str, ...] = (),
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve at ``http://host:port/mcp`` until interrupted. ``port`` 0 takes a free one; ``ready``
    hears the address once it is open. Raises :class:`UserError` if it cannot be."""
    import socket

    import uvicorn

    app = http_app(served, host=host, token=token, names=names)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise UserError(
                "this address cannot be served at", where=f"{host}:{port}", got=error.strerror
            ) from error
        shown = f"[{host}]" if ":" in host else host
        if ready is not None:
            ready(f"http://{shown}:{listening.getsockname()[1]}{PATH}")
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=2
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            served.close()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
