"""Fetching pictures from the web with care: public hosts only, limits of bytes and of time."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import SplitResult, urljoin, urlsplit

from vpt_agent.errors import ImageError

TIMEOUT = 20.0  # seconds, for connecting and for each read
SECONDS = 120.0  # for all of a fetch, redirects included
REDIRECTS = 3
_CHUNK = 2**16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet (not private, local, or reserved).

    An IPv6 address that stands for an IPv4 one is as public as that.
    """
    ip = ipaddress.ip_address(address.split("%")[0])
    inner = _inside(ip) if isinstance(ip, ipaddress.IPv6Address) else None
    return all(each.is_global and not each.is_multicast for each in (ip, inner) if each is not None)


def _inside(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one leads to: mapped, by NAT64, 6to4 or Teredo."""
    if ip in _NAT64 or ip in _COMPATIBLE:
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    teredo = ip.teredo
    return ip.ipv4_mapped or ip.sixtofour or (teredo[1] if teredo else None)


def _address(url: SplitResult, port: int, check: Callable[[str], bool]) -> str:
    host = url.hostname or ""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
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


@contextlib.contextmanager
def _connected(
    url: SplitResult, check: Callable[[str], bool], ends: float
) -> Iterator[http.client.HTTPConnection]:
    """A connection that is cut at ``ends``, whatever the server does meanwhile."""
    secure = url.scheme == "https"
    port = url.port or (443 if secure else 80)
    connection = http.client.HTTPConnection(url.hostname or "", port)
    # The address that was checked is the one connected to: a name may resolve differently later.
    address = _address(url, port, check)
    wait = min(TIMEOUT, _left(ends))
    raw = socket.create_connection((address, port), timeout=wait)
    watch = threading.Timer(_left(ends), _cut, (raw, connection))
    watch.daemon = True
    watch.start()
    try:
        connection.sock = raw
        if secure:
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(raw, server_hostname=url.hostname)
        yield connection
    finally:
        watch.cancel()
        connection.close()
        raw.close()


def _cut(raw: socket.socket, connection: http.client.HTTPConnection) -> None:
    """End what waits on a socket, from another thread. TLS takes the plain socket's place."""
    for each in (raw, connection.sock):
        with contextlib.suppress(OSError, AttributeError):
            each.shutdown(socket.SHUT_RDWR)


class _OutOfTimeError(OSError):
    pass


def _left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise _OutOfTimeError("out of time")
    return left


def fetch(
    url: str,
    max_bytes: int,
    *,
    check: Callable[[str], bool] = is_public,
    seconds: float = SECONDS,
) -> bytes:
    """The bytes at an http(s) ``url``, ``max_bytes`` at most, in ``seconds`` at most.

    Redirects are followed on the same host only; every address the host resolves to must pass
    ``check``. Anything else is an :class:`ImageError`.
    """
    here, ends = url, time.monotonic() + seconds
    try:
        host = urlsplit(url).hostname
        for _ in range(REDIRECTS + 1):
            parts = urlsplit(here)
            if parts.scheme not in ("http", "https") or parts.hostname != host or not host:
                raise ImageError("redirects to another host are not followed", where=url, got=here)
            with _connected(parts, check, ends) as connection:
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
                return _body(answer, url, max_bytes, ends)
    except ImageError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        if time.monotonic() >= ends:
            raise ImageError(
                "the picture did not come in time", where=url, expected=f"{seconds:g} s at most"
            ) from error
        raise ImageError("the picture cannot be fetched", where=url, got=error) from error
    raise ImageError("too many redirects", where=url, expected=f"at most {REDIRECTS}")


def _body(answer: http.client.HTTPResponse, url: str, max_bytes: int, ends: float) -> bytes:
    """What a server sends; refused as soon as it is known to be too much."""
    data, large = bytearray(), (answer.length or 0) > max_bytes
    while not large and (part := answer.read1(_CHUNK)):
        data += part
        large = len(data) > max_bytes
    _left(ends)  # a connection that was cut ends like one that is through
    if large:
        raise ImageError(
            "the file is too large",
            where=url,
            expected=f"at most {max_bytes} bytes",
            fix="make it smaller, or raise max_bytes",
        )
    if answer.length:  # what the server said is still to come
        raise ImageError("the picture cannot be fetched", where=url, got="it ended too soon")
    return bytes(data)
