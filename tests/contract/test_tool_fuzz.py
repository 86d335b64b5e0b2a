"""Ten thousand malformed calls and pictures at the call path: every one ends in a listed kind.

From the text of a model, through reading, check and run, to the result. What is thrown is made from
right calls, spoilt in one to four ways, by a seeded generator: a failure comes back.
"""

from __future__ import annotations

import gc
import io
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import get_args

import pytest
from PIL import Image

from vpt_agent.errors import CallErrorKind, ImageError
from vpt_agent.tool import (
    GridBox,
    Norm1000Boxes,
    PerceptionTool,
    PixelBox,
    SourceView,
    ToolArguments,
    ToolContext,
    ToolRegistry,
    execute,
    perception_tool,
    read_arguments,
    read_calls,
)
from vpt_agent.tool.text import one_line
from vpt_agent.types import Box, ToolCall, View
from vpt_agent.vision.images import load_image
from vpt_tools.crop_region import crop_region

CALLS, PICTURES = 9_000, 1_000
KINDS = set(get_args(CallErrorKind))
SECRET = "hunter2-0xC0FFEE"


class Find(ToolArguments):
    """What to find."""

    words: list[str]
    least: float = 0.5
    where: GridBox | None = None


class Finder(PerceptionTool):
    """Find things."""

    name = "find"
    arguments = Find
    timeout = None

    def run(self, arguments: Find, context: ToolContext) -> dict[str, object]:
        return {"found": len(arguments.words), "least": arguments.least}


class Foreign(PerceptionTool):
    """A tool from elsewhere, with a schema of its own."""

    name = "foreign"
    timeout = None
    arguments = {  # noqa: RUF012 - as a server sends it
        "type": "object",
        "properties": {
            "n": {"type": "integer", "maximum": 99},
            "mode": {"enum": ["a", "b"]},
            "deep": {"$ref": "#/$defs/deep"},
        },
        "required": ["n"],
        "additionalProperties": False,
        "$defs": {"deep": {"type": "object", "properties": {"deep": {"$ref": "#/$defs/deep"}}}},
    }

    def run(self, arguments: dict[str, object], context: ToolContext) -> str:
        return json.dumps(arguments)


@perception_tool(timeout=None)
def zoom(view: SourceView, boxes: Norm1000Boxes, pixel: PixelBox | None = None) -> str:
    """Zoom."""
    return f"{view.id} {len(boxes)}"


@perception_tool(timeout=None)
def leak(how: int) -> str:
    """Fail with what nobody must be told."""
    text = f"{SECRET} in {os.getcwd()}"
    raise [OSError(text), KeyError(text), RuntimeError(text)][how % 3]


TOOLS = ToolRegistry([crop_region, zoom, Finder, Foreign, leak])
VIEW = View("image_1", Image.new("RGB", (160, 80)), "image_1", Box(0, 0, 160, 80), (160, 80))
RIGHT: list[tuple[str, dict[str, object]]] = [
    ("crop_region", {"region": [1, 2, 3, 4]}),
    ("crop_region", {"box": [[0, 0, 50, 50], [9, 9, 20, 20]], "source": "image_1"}),
    ("zoom", {"boxes": [0, 0, 500, 500], "pixel": None}),
    ("find", {"words": ["red", "tag"], "least": 0.25, "where": [0, 0, 7, 7]}),
    ("leak", {"how": 1}),
    ("foreign", {"n": 3, "mode": "a", "deep": {"deep": {}}}),
]
ODD: list[object] = [
    None, True, -1, 10**30, 1.5, 1e308, "", "12", "\ud800", "x" * 500, [], {}, [[[[]]]], {"a": {}},
    [None], ["1", 2], "[1, 2, 3, 4]", "image_2", [9, 9, 1, 1], [-5, 0, 5000, 3], [3, 3, 3, 3],
    float("nan"), float("inf"), {"name": "zoom", "arguments": {}},
]  # fmt: skip
PIECES = [
    "<tool_call>", "</tool_call>", "```json\n", "```", "{", "}", "[", "]", '"', "'", ",", ":", "\\",
    "\n", "\x00", "\ud800", "NaN", "Infinity", "1e999", "None", "//", "/*", "<think>", "</think>",
    "\u202e", "<|im_end|>", "\U0001d7d9", "0" * 400, "[" * 90,
]  # fmt: skip


def spoilt(rng: random.Random) -> str:
    """The text of a call that was right, and is not any more."""
    name, values = rng.choice(RIGHT)
    arguments: object = {k: rng.choice(ODD) if rng.random() < 0.3 else v for k, v in values.items()}
    if rng.random() < 0.1:
        arguments = rng.choice(ODD)
    if rng.random() < 0.1 and isinstance(arguments, dict):
        arguments[rng.choice(["extra", "name", "source", "\U0001d7d9"])] = rng.choice(ODD)
    if rng.random() < 0.1:
        name = rng.choice(["crop", "zoom@1", "zoom@9", "", "a\nb", "x" * 300, "auto"])
    value = {"name": name, "arguments": arguments}
    text = repr(value) if rng.random() < 0.3 else json.dumps(value)
    text = rng.choice(["<tool_call>{}</tool_call>", "<tool_call>{}", "```json\n{}\n```", "{}"]
                      ).replace("{}", text)  # fmt: skip
    for _ in range(rng.randint(0, 4)):
        at = rng.randint(0, len(text))
        change = rng.random()
        if change < 0.3:
            text = text[:at] + rng.choice(PIECES) + text[at:]
        elif change < 0.6:
            text = text[:at] + text[at + rng.randint(1, 9) :]
        elif change < 0.8:
            text = text[:at]
        else:
            text += text[at : at + 40]
    return text


def handled(text: str, *, cut: bool, found: Counter[str]) -> None:
    """The whole way of one text; what comes out must be one of the listed outcomes."""
    items = [*read_calls(text, cut=cut).items, read_arguments(text, cut=cut)]
    for number, item in enumerate(items):
        if not hasattr(item, "arguments"):
            error = item
        else:
            name = item.name or "find"
            call = ToolCall(f"c{number}", name, item.arguments, "json", repairs=item.repairs)
            result = execute(
                TOOLS.get(name), call, lambda: ToolContext(views={"image_1": VIEW}, view=VIEW)
            )
            json.dumps(list(result.metadata.get("repairs", ())))
            if result.error is None:
                found["ok"] += 1
                continue
            error = result.error
        assert error.kind in KINDS
        assert error.message == one_line(error.message), (
            "one line, printable, at most 300 characters"
        )
        for word in ("Traceback", SECRET, os.getcwd(), "site-packages"):
            assert word not in error.message
        found[error.kind] += 1


def test_every_malformed_call_ends_in_a_listed_kind(figures: Callable[..., None]) -> None:
    rng, found = random.Random(4), Counter[str]()
    threads, files, held = threading.active_count(), open_files(), views()
    began = time.process_time()
    for _ in range(CALLS):
        handled(spoilt(rng), cut=rng.random() < 0.3, found=found)
    assert threading.active_count() <= threads
    assert open_files() <= files
    assert views() <= held, "no view is left over"
    assert found["ok"] > 500, "some are right still, or nothing was tried"
    assert {"invalid_json", "invalid_arguments", "unknown_tool", "unknown_source", "box_outside",
            "box_too_small", "tool_failed"} <= set(found)  # fmt: skip
    seconds = time.process_time() - began
    figures("fuzz of the call path", texts=CALLS, seconds=seconds, **dict(sorted(found.items())))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def views() -> int:
    gc.collect()
    return sum(isinstance(each, View) for each in gc.get_objects())


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the pictures
def test_every_malformed_picture_is_an_image_error(figures: Callable[..., None]) -> None:
    rng, found = random.Random(5), Counter[str]()
    whole = []
    for kind, mode in (("PNG", "RGBA"), ("JPEG", "RGB"), ("GIF", "P"), ("TIFF", "I;16"),
                       ("WEBP", "RGB"), ("BMP", "L"), ("PPM", "RGB")):  # fmt: skip
        buffer = io.BytesIO()
        Image.new(mode, (31, 17)).save(buffer, kind)
        whole.append(buffer.getvalue())
    files = open_files()
    for _ in range(PICTURES):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data) or 1)
            if rng.random() < 0.3:
                del data[at:]
            elif data:
                data[at : at + 1] = rng.randbytes(rng.randint(0, 3))
        try:
            image = load_image(bytes(data))
        except ImageError as error:
            found[error.what] += 1
        else:
            found["read"] += 1
            assert image.mode == "RGB"
    gc.collect()
    assert open_files() <= files
    assert sum(found.values()) == PICTURES
    assert len(found) > 1
    figures(
        "fuzz of pictures", pictures=PICTURES, read=found["read"], refused=PICTURES - found["read"]
    )
