"""What a call may read: files under named folders, addresses if allowed, and nothing else."""

from __future__ import annotations

import base64
import http.server
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from vpt_agent.errors import ModelRetry, UserError
from vpt_agent.tool import Access, Files, ToolContext, ToolRegistry, execute, perception_tool
from vpt_agent.tool import access as module
from vpt_agent.types import ToolCall


def png(colour: str = "red", side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """``allowed`` may be read, what lies beside it may not."""
    for folder in ("allowed/inner", "other", "allowed-too"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "allowed" / "a.png").write_bytes(png())
    (tmp_path / "allowed" / "inner" / "b.png").write_bytes(png("blue"))
    for folder in ("other", "allowed-too"):
        (tmp_path / folder / "secret.png").write_bytes(png())
    return tmp_path


def test_files_under_a_root(place: Path) -> None:
    access = Access(roots=(place / "allowed", place / "allowed-too"))
    assert access.read("a.png") == png()
    assert access.read("inner/../inner/b.png") == png("blue")
    assert access.read(str(place / "allowed" / "inner" / "b.png")) == png("blue")
    assert access.read("secret.png") == png(), "a relative path is looked for in every root"
    assert access.image("inner/b.png").getpixel((0, 0)) == (0, 0, 255)


def test_links_that_stay_inside_are_followed_and_others_are_not(place: Path) -> None:
    allowed = place / "allowed"
    (allowed / "same.png").symlink_to("a.png")
    (allowed / "folder").symlink_to(allowed / "inner", target_is_directory=True)
    (allowed / "out.png").symlink_to(place / "other" / "secret.png")
    (allowed / "away").symlink_to(place / "other", target_is_directory=True)
    (allowed / "round").symlink_to("round")
    access = Access(roots=(allowed,))
    assert access.read("same.png") == png()
    assert access.read("folder/b.png") == png("blue")
    for path in ("out.png", "away/secret.png", "folder/../../other/secret.png"):
        with pytest.raises(ModelRetry, match="not in a folder that may be read"):
            access.read(path)
    with pytest.raises(ModelRetry, match="this file cannot be read"):
        access.read("round")


def outside(place: Path) -> list[str]:
    return [
        "../other/secret.png",
        "inner/../../other/secret.png",
        str(place / "other" / "secret.png"),
        str(place / "allowed-too" / "secret.png"),  # its name begins like the root's
        str(place / "other" / "is not there.png"),
        "/etc/passwd",
        "/etc/is not there",
        "/dev/zero",
        "/proc/self/environ",
        "~/.ssh/id_rsa/../../../../../../etc/shadow",
    ]


def test_what_is_outside_is_refused_with_the_same_words_whether_it_exists_or_not(
    place: Path,
) -> None:
    access = Access(roots=(place / "allowed",))
    for path in outside(place):
        with pytest.raises(
            ModelRetry, match=r"^this file is not in a folder that may be read here$"
        ):
            access.read(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "this is no path of a file"),
        ("  ", "this is no path of a file"),
        ("a\0.png", "this is no path of a file"),
        ("x" * 5000, "this is no path of a file"),
        ("x" * 300, "cannot be read"),  # too long for the file system
        (".", "this is a folder, not a file"),
        ("inner", "this is not a regular file"),
        ("pipe", "this is not a regular file"),
        ("none.png", "there is no such file"),
        ("a.png/b.png", "cannot be read|no such file"),
        ("large.png", "the file is too large: at most 1000 bytes"),
        ("\ud800", "cannot be read|no such file"),
    ],
)
def test_what_is_no_file(place: Path, path: str, message: str) -> None:
    os.mkfifo(place / "allowed" / "pipe")
    (place / "allowed" / "large.png").write_bytes(b"x" * 1001)
    with pytest.raises(ModelRetry, match=message):
        Access(roots=(place / "allowed",), max_bytes=1000).read(path)


def test_a_folder_that_becomes_a_link_after_the_check_is_not_followed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between the check of a path and the opening, somebody swaps the folder for a link.
    (place / "allowed" / "inner" / "secret.png").write_bytes(png())
    real = module._parts

    def swapped(root: Path, path: str) -> tuple[str, ...] | None:
        parts = real(root, path)
        (place / "allowed" / "inner").rename(place / "allowed" / "was")
        (place / "allowed" / "inner").symlink_to(place / "other", target_is_directory=True)
        return parts

    monkeypatch.setattr(module, "_parts", swapped)
    with pytest.raises(ModelRetry, match="this file cannot be read"):
        Access(roots=(place / "allowed",)).read("inner/secret.png")


def test_no_handle_is_left_open(place: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("handles cannot be counted here")
    access, before = Access(roots=(place / "allowed",)), len(os.listdir("/proc/self/fd"))
    for path in ["a.png", "inner/b.png", "inner", "none/x", "a.png/x", *outside(place)] * 5:
        try:
            access.read(path)
        except ModelRetry:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("none", "there is no such folder.*Access.roots"),
        ("allowed/a.png", "this is no folder"),
        ("/", "the whole machine is too much to allow.*name the folder"),
    ],
)
def test_roots_are_folders(place: Path, root: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Access(roots=(place / root,))


def test_limits_are_positive() -> None:
    for name in ("max_bytes", "max_pixels", "seconds"):
        with pytest.raises(UserError, match=rf"more than 0; where: Access.{name}; got: 0"):
            Access(**{name: 0})


def test_nothing_is_allowed_by_default(place: Path) -> None:
    with pytest.raises(ModelRetry, match="no files may be read here: send the picture itself"):
        Access().image(str(place / "allowed" / "a.png"))
    with pytest.raises(ModelRetry, match="addresses are not fetched here"):
        Access().image("https://example.org/a.png")


def test_data_urls_and_base64() -> None:
    plain = base64.b64encode(png("blue")).decode()
    wrapped = "\n".join(plain[at : at + 40] for at in range(0, len(plain), 40))
    for source in (
        plain,
        f"data:image/png;base64,{plain}",
        f"DATA:image/png;charset=x;base64,{wrapped}",
        f"data:;base64,{plain}",
    ):
        assert Access().image(source).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data:image/png,abc", "a data URL begins with data:image/...;base64,"),
        ("data:image/png;base64,!!!!", "this is no base64"),
        ("data:image/png;base64,QUJD", "this is not a picture that can be read .expected PNG"),
        ("data:image/png;base64,", "the file is empty"),
        ("data:image/png;base64," + "A" * 4000, "the picture is too large: at most 1000 bytes"),
        ("iVBORw0KGgo" + "!" * 60, "this is no base64"),
        ("file:///etc/passwd", "a path, a data URL or an http"),
        ("ftp://example.org/x.png", "a path, a data URL or an http"),
        ("javascript:alert(1)", "a path, a data URL or an http"),
        ("http://" + "x" * 5000, "this address is too long"),
    ],
)
def test_what_is_no_picture(source: str, message: str) -> None:
    with pytest.raises(ModelRetry, match=message):
        Access(urls=True, max_bytes=1000).image(source)


def test_pixels_are_counted_before_decoding() -> None:
    with pytest.raises(ModelRetry, match=r"the picture is too large .expected at most 100 pixels"):
        Access(max_pixels=100).decoded(png(side=11))


def test_what_a_file_holds_is_not_told(place: Path) -> None:
    (place / "allowed" / "notes.txt").write_text("PASSWORD=hunter2")
    with pytest.raises(ModelRetry) as caught:
        Access(roots=(place / "allowed",)).image("notes.txt")
    assert "PASS" not in caught.value.message
    assert str(place) not in caught.value.message


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(png("green"))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/a.png"
        server.shutdown()
        thread.join()


def test_addresses_are_fetched_if_allowed_and_private_ones_only_then(address: str) -> None:
    assert Access(urls=True, private=True).image(address).getpixel((0, 0)) == (0, 128, 0)
    with pytest.raises(ModelRetry, match=r"^private addresses are not fetched$"):
        Access(urls=True).image(address)
    with pytest.raises(ModelRetry, match=r"^the file is too large$"):
        Access(urls=True, private=True, max_bytes=10).image(address)


@perception_tool
def read_part(name: str, files: Files) -> str:
    """Say how large a file is."""
    return f"{len(files.read(name))} bytes"


def test_a_tool_reads_what_its_context_allows(place: Path) -> None:
    def call(name: str, context: ToolContext) -> object:
        made = ToolCall("c1", "read_part", {"name": name}, "json")
        result = execute(read_part, made, lambda: context)
        return result.text if result.error is None else result.error

    allowed = ToolContext(access=Access(roots=(place / "allowed",)))
    assert call("a.png", allowed) == f"{len(png())} bytes"
    refused = call("../other/secret.png", allowed)
    assert (refused.kind, refused.message) == (
        "invalid_arguments",
        "this file is not in a folder that may be read here",
    )
    assert "no files may be read here" in call("a.png", ToolContext()).message
    assert ToolRegistry().access == Access()
