"""Thousands of malformed paths, addresses, data URLs, pictures and MCP calls: nothing gets out.

Every one ends in a listed error kind, said in one line, in which no path, no content of a file and
no secret of this machine stands; no thread, no file handle and no view is left over. What is thrown
is made by a seeded generator: a failure comes back.
"""

from __future__ import annotations

import base64
import gc
import io
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image

from vpt_agent.errors import CallErrorKind, ModelRetry
from vpt_agent.serving.tools import ServedTools, ServeOptions
from vpt_agent.serving.workspace import Room
from vpt_agent.tool import (
    Access,
    PixelBox,
    SourceView,
    ToolContext,
    ToolFailed,
    ToolRegistry,
    perception_tool,
)
from vpt_agent.tool.text import one_line
from vpt_agent.types import View
from vpt_tools.crop_region import crop_region

SOURCES, CALLS = 6_000, 6_000
KINDS = set(get_args(CallErrorKind))
SECRET = "hunter2-0xC0FFEE"  # in a file, in the environment, in exceptions


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root that may be read, and around it what may not."""
    monkeypatch.setenv("VPT_FUZZ_TOKEN", SECRET)
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    for path in (root / "a.png", root / "inner" / "b.png", tmp_path / "private" / "c.png"):
        Image.new("RGB", (24, 12), "gray").save(path)
    for path in (root / "notes.txt", tmp_path / "private" / "key"):
        path.write_text(SECRET)
    (root / "link.png").symlink_to(tmp_path / "private" / "c.png")
    (root / "away").symlink_to(tmp_path / "private", target_is_directory=True)
    (root / "round").symlink_to("round")
    os.mkfifo(root / "pipe")
    return tmp_path


def encoded(rng: random.Random) -> bytes:
    """A picture file, whole or spoilt."""
    kind, mode = rng.choice([("PNG", "RGBA"), ("JPEG", "RGB"), ("GIF", "P"), ("TIFF", "L"),
                             ("WEBP", "RGB"), ("BMP", "RGB"), ("ICO", "RGBA")])  # fmt: skip
    buffer = io.BytesIO()
    Image.new(mode, (rng.randint(1, 40), rng.randint(1, 40))).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(data) or 1)
        if rng.random() < 0.3:
            del data[at:]
        elif data:
            data[at : at + 1] = rng.randbytes(rng.randint(0, 4))
    return bytes(data)


PIECES = [
    "..", ".", "/", "//", "\\", "a.png", "inner", "b.png", "away", "link.png", "private", "key",
    "notes.txt", "round", "pipe", "root", "~", "$HOME", "%2e%2e", "\0", "\n", " ", "\u202e",
    "\ud800", "*", "C:", "x" * 300, "é", "-", ";id", "`id`", "a.png/",
]  # fmt: skip
FIXED = [
    "/etc/passwd", "/etc/shadow", "/dev/zero", "/dev/stdin", "/proc/self/environ",
    "/proc/self/mem", "/proc/self/fd/0", "/", "", "a.png", "inner/b.png", "./a.png",
]  # fmt: skip
HOSTS = [
    "127.0.0.1", "localhost", "0.0.0.0", "[::1]", "169.254.169.254", "10.0.0.1", "2130706433",
    "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "[fe80::1]", "user:pw@127.0.0.1", "[", "x.invalid",
    "a" * 300, "\u2460\u2461", "127.0.0.1\r\nX: y", "",
]  # fmt: skip


def source(rng: random.Random, place: Path) -> object:
    """What a call may say a picture is."""
    kind = rng.random()
    if kind < 0.35:
        path = "/".join(rng.choice(PIECES) for _ in range(rng.randint(1, 5)))
        return rng.choice(["", f"{place}/", f"{place}/root/", "/", "~/"]) + path
    if kind < 0.45:
        return rng.choice(FIXED)
    if kind < 0.65:
        port = rng.choice(["", ":80", ":port", ":99999", ":-1"])
        scheme = rng.choice(
            ["http", "https", "HTTP", "file", "ftp", "gopher", "javascript", "data"]
        )
        return f"{scheme}://{rng.choice(HOSTS)}{port}/{rng.choice(PIECES)}"
    plain = base64.b64encode(encoded(rng)).decode()
    if rng.random() < 0.2:
        at = rng.randrange(len(plain) or 1)
        plain = plain[:at] + rng.choice(["!", "=", "\n", "é", "\0", " "]) + plain[at + 1 :]
    head = rng.choice(["data:image/png;base64,", "data:;base64,", "data:image/png,", "data:", "",
                       "data:text/html;base64,", "DATA:image/x;base64,"])  # fmt: skip
    return head + plain


def told(line: str, place: Path) -> None:
    """What a model or a client is told: one line, and nothing of this machine."""
    assert line == one_line(line), "one line, printable, at most 300 characters"
    for word in (str(place), SECRET, SECRET[:6], "Traceback", 'File "', "hunter", "site-packages"):
        assert word not in line


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def views() -> int:
    gc.collect()
    return sum(isinstance(each, View) for each in gc.get_objects())


def settled(threads: int) -> None:
    """Threads that were told to end have a moment for it."""
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= threads


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the pictures
def test_no_path_address_or_picture_gets_anything_out(
    place: Path, figures: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def never(address: tuple[str, int], *_: object, **__: object) -> socket.socket:
        asked.append(address[0])
        raise OSError("the test has no network")

    monkeypatch.setattr(socket, "create_connection", never)
    known = {"127.0.0.1", "127.1", "0x7f.1", "2130706433", "localhost"}

    def resolve(host: str, port: int, **_: object) -> list[Any]:
        if not host or host.endswith(".invalid") or len(host) > 250 or not host.isascii():
            raise socket.gaierror("not known")
        address = "127.0.0.1" if host in known else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    rng, found, kinds = random.Random(6), Counter[str](), set[str]()
    access = Access(roots=(place / "root",), urls=True, max_pixels=900, max_bytes=20_000)
    files, threads, before = open_files(), threading.active_count(), time.process_time()
    for _ in range(SOURCES):
        try:
            image = access.image(str(source(rng, place)))
        except ModelRetry as error:
            told(one_line(error.message), place)
            kinds.add(error.kind)
            found[error.message[:40]] += 1
        else:
            found["read"] += 1
            assert image.mode == "RGB"
            assert image.width * image.height <= 900
    assert open_files() <= files
    settled(threads)
    assert kinds <= KINDS
    assert asked == [], "nothing was connected to"
    assert found["read"] > 100, "some are right, or nothing was tried"
    assert found["private addresses are not fetched"] > 50
    assert found["this file is not in a folder that may be"] > 100
    assert len(found) > 12
    figures("fuzz of what may be read", sources=SOURCES, read=found["read"], ways=len(found),
            seconds=time.process_time() - before)  # fmt: skip


CLIENTS = {(255, 0, 0), (0, 255, 0), (0, 0, 255)}
"""The colours of the clients' pictures; files, and what is spoilt, have others."""


@perception_tool
def leak(view: SourceView, how: int) -> str:
    """Fail with what must not be told."""
    text = f"{os.environ.get('VPT_FUZZ_TOKEN')} in {os.getcwd()}"
    raise [OSError(text), KeyError(text), RuntimeError(text), RecursionError(text)][how % 4]


@perception_tool
def around(context: ToolContext) -> str:
    """Name all views that can be seen, and fail if one is another's."""
    colours = {view.image.getpixel((0, 0)) for view in context.views.values()} & CLIENTS
    if len(colours) > 1:
        raise ToolFailed(f"leaked: {sorted(colours)}")
    return " ".join(context.views)


@perception_tool
def mark(view: SourceView, box: PixelBox) -> dict[str, object]:
    """Say what is in a box."""
    return {"box": list(box), "colour": view.image.getpixel((0, 0))}


ODD: list[Any] = [None, True, -1, 10**30, 1.5, "", "12", "x" * 500, [], {}, [[[[]]]], {"a": {}},
                  [None], "image_1", "call_1.1", "0" * 32 + "-image_1", "session a", [9, 9, 1, 1],
                  [-5, 0, 5000, 3], [500, 500, 600, 600], {"name": "mark"}, "\u202e"]  # fmt: skip


def spoilt_call(rng: random.Random, place: Path, colour: str) -> tuple[str, dict[str, Any]]:
    """A tool's name and arguments, as a client may send them."""
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), colour).save(buffer, "PNG")
    own = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    name, arguments = rng.choice([
        ("open_image", {"image": own}),
        ("mark", {"image": own, "box": [1, 1, 9, 9]}),
        ("mark", {"source": "image_1", "box": [1, 1, 9, 9]}),
        ("crop_region", {"image": own, "box": [0, 0, 20, 20]}),
        ("crop_region", {"source": "call_2.1", "box": [0, 0, 9, 9]}),
        ("around", {"image": own}),
        ("around", {}),
        ("leak", {"image": own, "how": rng.randrange(4)}),
    ])  # fmt: skip
    arguments = dict(arguments)
    for _ in range(rng.choice([0, 1, 2])):
        change = rng.random()
        if change < 0.3:
            arguments["image"] = source(rng, place)
        elif change < 0.7 and arguments:
            arguments[rng.choice(list(arguments))] = rng.choice(ODD)
        elif change < 0.85:
            arguments[rng.choice(["extra", "source", "image", "show", "\0"])] = rng.choice(ODD)
        else:
            name = rng.choice(["", "mark@1", "mark@2", "steer", "a\nb", "x" * 400, "open_image@1"])
    return name, arguments


@pytest.mark.filterwarnings("ignore")
def test_no_mcp_call_gets_anything_out(
    place: Path, figures: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL")
    files, threads, held, before = (
        open_files(), threading.active_count(), views(), time.process_time()
    )  # fmt: skip
    options = ServeOptions(
        access=Access(roots=(place / "root" / "inner",), max_pixels=900, max_bytes=20_000),
        room=Room(views=12, pixels=8_000, clients=6),
        longest=16,
    )
    served = ServedTools(ToolRegistry([crop_region, mark, leak, around]), options)
    rng, found = random.Random(7), Counter[str]()
    # Every client has a colour of its own: a picture of another colour is another's.
    clients: list[tuple[str | None, str]] = [
        ("a", "red"), ("b", "lime"), ("c", "blue"), (None, "red"),
    ]  # fmt: skip
    for _ in range(CALLS):
        session, colour = rng.choice(clients)
        result = served.call(*spoilt_call(rng, place, colour), session).run()
        text = " ".join(block.text for block in result.content if block.type == "text")
        json.dumps(result.model_dump(mode="json"))
        if not result.is_error:
            found["ok"] += 1
            continue
        error = result.structured_content["error"]
        assert error["kind"] in KINDS
        assert text == f"{error['kind']}: {error['message']}"
        assert "leaked" not in text
        told(error["message"], place)
        found[error["kind"]] += 1
        assert len(served.spaces) <= 6
    for session in "abc":
        assert len(served.spaces.of(session).seen()) <= 12
    assert found["ok"] > 300, "some are right still, or nothing was tried"
    wanted = {"invalid_arguments", "unknown_tool", "unknown_source", "tool_failed", "box_outside"}
    assert wanted <= set(found)
    served.close()
    settled(threads)
    gc.collect()
    assert open_files() <= files
    assert views() <= held, "no view is left over"
    figures("fuzz of MCP calls", calls=CALLS, seconds=time.process_time() - before,
            **dict(sorted(found.items())))  # fmt: skip
