"""Fetching a picture from the web, with care: public hosts only, one host, a limit of bytes."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable
from urllib.parse import SplitResult, urljoin, urlsplit

from vpt_agent.errors import ImageError

TIMEOUT = 20.0  # seconds, for connecting and for each read
REDIRECTS = 3


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet (not private, local, or reserved)."""
    ip = ipaddress.ip_address(address.split("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_global and not ip.is_multicast


def _address(url: SplitResult, port: int, check: Callable[[str], bool]) -> str:
    host = url.hostname or ""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ImageError("the host is not known", where=url.geturl(), got=error) from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not check(address):
            raise ImageError(
                "private addresses are not fetched",
                where=url.geturl(),
                got=address,
                fix="download the picture yourself and pass its path",
            )
    return addresses[0]


def _connect(url: SplitResult, check: Callable[[str], bool]) -> http.client.HTTPConnection:
    secure = url.scheme == "https"
    port = url.port or (443 if secure else 80)
    # The address that was checked is the one connected to: a name may resolve differently later.
    raw = socket.create_connection((_address(url, port, check), port), timeout=TIMEOUT)
    connection = http.client.HTTPConnection(url.hostname or "", port, timeout=TIMEOUT)
    if secure:
        connection.sock = ssl.create_default_context().wrap_socket(
            raw, server_hostname=url.hostname
        )
    else:
        connection.sock = raw
    return connection


def fetch(url: str, max_bytes: int, *, check: Callable[[str], bool] = is_public) -> bytes:
    """The bytes at an http(s) ``url``, one more than ``max_bytes`` at most.

    Redirects are followed on the same host only; every address the host resolves to must pass
    ``check``. Anything else is an :class:`ImageError`.
    """
    here = url
    try:
        host = urlsplit(url).hostname
        for _ in range(REDIRECTS + 1):
            parts = urlsplit(here)
            if parts.scheme not in ("http", "https") or parts.hostname != host or not host:
                raise ImageError("redirects to another host are not followed", where=url, got=here)
            connection = _connect(parts, check)
            try:
                path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", path, headers={"User-Agent": "vpt-agent"})
                answer = connection.getresponse()
                if answer.status in (301, 302, 303, 307, 308):
                    here = urljoin(here, answer.getheader("Location") or "")
                    continue
                if answer.status != 200:
                    raise ImageError(
                        "the server did not give the picture", where=url, got=answer.status
                    )
                return answer.read(max_bytes + 1)
            finally:
                connection.close()
    except ImageError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ImageError("the picture cannot be fetched", where=url, got=error) from error
    raise ImageError("too many redirects", where=url, expected=f"at most {REDIRECTS}")
