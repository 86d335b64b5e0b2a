"""Fetching pictures: refused unless asked for, public hosts only, one host, a limit of bytes."""

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from vpt_agent.errors import ImageError
from vpt_agent.vision import load_image
from vpt_agent.vision.fetch import fetch, is_public


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/picture?a=1":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"0123456789")
            return
        if self.path in ("/said-large", "/short", "/endless", "/slow-body", "/slow-head"):
            self.awkward()
            return
        target = {
            "/moved": "/picture?a=1",
            "/loop": "/loop",
            "/away": "http://example.invalid/picture",
            "/file": "file:///etc/hostname",
        }.get(self.path)
        self.send_response(404 if target is None else 302)
        if target is not None:
            self.send_header("Location", target)
        self.end_headers()

    def awkward(self) -> None:
        """Servers that say one thing and do another, or do not come to an end."""
        length = {"/said-large": "1000000000000", "/short": "20"}.get(self.path)
        if self.path == "/slow-head":
            self.wfile.write(b"HTTP/1.0 200 OK\r\n")
        else:
            self.send_response(200)
            if length is not None:
                self.send_header("Content-Length", length)
            self.end_headers()
        with contextlib.suppress(OSError):  # the other side hangs up
            for _ in range(400 if self.path != "/short" else 0):
                self.wfile.write(b"x: y\r\n" * (1 if "slow" in self.path else 1000))
                if "slow" in self.path:
                    time.sleep(0.02)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def _local(address: str) -> bool:
    return address == "127.0.0.1"


def test_bytes_and_their_limit(server: str) -> None:
    assert fetch(f"{server}/picture?a=1", 100, check=_local) == b"0123456789"
    assert fetch(f"{server}/picture?a=1", 10, check=_local) == b"0123456789"
    assert fetch(f"{server}/moved", 100, check=_local) == b"0123456789"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nothing", "did not give the picture.*got: 404"),
        ("/loop", "too many redirects.*at most 3"),
        ("/away", "redirects to another host are not followed.*example.invalid"),
        ("/file", "redirects to another host are not followed"),
    ],
)
def test_what_is_not_followed(server: str, path: str, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        fetch(server + path, 100, check=_local)


@pytest.mark.parametrize("path", ["/picture?a=1", "/said-large", "/endless"])
def test_too_many_bytes_are_refused(server: str, path: str) -> None:
    with pytest.raises(ImageError, match=r"the file is too large.*at most 9 bytes"):
        fetch(server + path, 9, check=_local)


def test_what_ends_too_soon_is_not_taken_for_whole(server: str) -> None:
    with pytest.raises(ImageError, match=r"cannot be fetched.*it ended too soon"):
        fetch(f"{server}/short", 100, check=_local)


@pytest.mark.parametrize("path", ["/slow-head", "/slow-body"])
def test_a_server_that_drips_is_cut_off(server: str, path: str) -> None:
    began = time.monotonic()
    with pytest.raises(ImageError, match=r"did not come in time.*0\.3 s at most"):
        fetch(server + path, 10**6, check=_local, seconds=0.3)
    assert time.monotonic() - began < 3
    with pytest.raises(ImageError, match="did not come in time"):
        fetch(server + path, 10**6, check=_local, seconds=1e-9)


def test_the_address_that_was_checked_is_the_one_connected_to(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name that leads elsewhere when it is asked a second time (DNS rebinding).
    answers = iter(["127.0.0.1", "10.0.0.1"])
    asked = []

    def resolve(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    to: list[str] = []

    def connect(address: tuple[str, int], **options: float) -> socket.socket:
        to.append(address[0])
        raw = socket.socket()
        raw.settimeout(options["timeout"])
        raw.connect(address)
        return raw

    monkeypatch.setattr(socket, "create_connection", connect)
    url = server.replace("127.0.0.1", "pictures.test")
    assert fetch(f"{url}/picture?a=1", 100, check=_local) == b"0123456789"
    assert (asked, to) == (["pictures.test"], ["127.0.0.1"])
    # A redirect asks again, and what it finds is checked again.
    answers = iter(["127.0.0.1", "10.0.0.1"])
    with pytest.raises(ImageError, match=r"private addresses are not fetched.*got: 10\.0\.0\.1"):
        fetch(f"{url}/moved", 100, check=_local)


def test_nothing_is_left_open(server: str) -> None:
    threads = threading.active_count()
    for path in ("/picture?a=1", "/nothing", "/loop", "/said-large"):
        with contextlib.suppress(ImageError):
            fetch(server + path, 100, check=_local)
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_private_addresses_are_refused(server: str) -> None:
    with pytest.raises(ImageError, match=r"private addresses are not fetched.*got: 127\.0\.0\.1"):
        load_image(f"{server}/picture?a=1", allow_urls=True)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::127.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("2002:7f00:1::", False),
        ("2002:c0a8:1::", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("64:ff9b::808:808", True),
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
    ],
)
def test_what_is_public(address: str, public: bool) -> None:
    assert is_public(address) is public


def test_unreachable_and_malformed(server: str) -> None:
    with pytest.raises(ImageError, match="the host is not known"):
        fetch("http://host.invalid/x.png", 100)
    with pytest.raises(ImageError, match="cannot be fetched"):
        fetch("http://127.0.0.1:1/x.png", 100, check=_local)
    with pytest.raises(ImageError, match="cannot be fetched"):
        fetch(server.replace("http", "https") + "/x.png", 100, check=_local)
    with pytest.raises(ImageError, match="cannot be fetched"):
        fetch("http://127.0.0.1:port/x.png", 100, check=_local)


def test_addresses_are_refused_unless_asked_for() -> None:
    with pytest.raises(ImageError, match=r"not fetched unless asked for.*allow_urls=True"):
        load_image("https://example.org/cat.png")
    for source in ("file:///etc/passwd", "ftp://example.org/x.png", "data:image/png;base64,AA"):
        with pytest.raises(ImageError, match="only http and https addresses can be pictures"):
            load_image(source, allow_urls=True)
