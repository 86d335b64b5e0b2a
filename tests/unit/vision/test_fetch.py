"""Fetching pictures: refused unless asked for, public hosts only, one host, a limit of bytes."""

import http.server
import threading
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

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def _local(address: str) -> bool:
    return address == "127.0.0.1"


def test_bytes_and_their_limit(server: str) -> None:
    assert fetch(f"{server}/picture?a=1", 100, check=_local) == b"0123456789"
    assert fetch(f"{server}/picture?a=1", 4, check=_local) == b"01234"
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
