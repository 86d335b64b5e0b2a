"""Makes docs/tools.png: the result of every tool that shows something, by calling it.

Run it with `python tools/pictures.py docs/tools.png`; read_text needs its extra and its program. No
checkpoint ships with the library, so behind `segment` and `detect_objects` stand models that know
the drawn scene: what they show is the form of a result.
"""

from __future__ import annotations

import sys
import textwrap
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from vpt_agent.tool import PerceptionTool, ToolContext, execute
from vpt_agent.types import Box, ToolCall, ToolResult, View
from vpt_tools._sam import Found, Prompt
from vpt_tools.compare_views import compare_views
from vpt_tools.crop_region import crop_region
from vpt_tools.detect_objects import DetectObjects
from vpt_tools.image_zoom_in_tool import image_zoom_in_tool
from vpt_tools.measure import measure
from vpt_tools.read_text import read_text
from vpt_tools.segment import Segment

Edges = tuple[int, int, int, int]
PARTS: dict[str, Edges] = {
    "disc": (24, 24, 104, 104),
    "plate": (150, 30, 260, 90),
    "wedge": (290, 20, 370, 110),
}
WORDS: Edges = (60, 150, 340, 210)


def scene() -> Image.Image:
    """A workbench with three parts and a label."""
    image = Image.new("RGB", (400, 240), "#e4ded0")
    draw = ImageDraw.Draw(image)
    draw.ellipse(PARTS["disc"], fill="#d33a2c")
    draw.ellipse((52, 52, 76, 76), fill="#e4ded0")
    draw.rectangle(PARTS["plate"], fill="#2f6fd0")
    left, top, right, bottom = PARTS["wedge"]
    draw.polygon(((left, bottom), (right, bottom), ((left + right) // 2, top)), fill="#e0a020")
    draw.rectangle(WORDS, fill="white", outline="#888888")
    draw.text((84, 162), "BOLT M8 x 40", fill="black", font=ImageFont.load_default(32))
    return image


class OfOneColour:
    """In SAM's place: what has the colour of the first point."""

    def find(self, seen: View, prompt: Prompt) -> Found:
        """The pixels that hang together with the point."""
        grown = seen.image.copy()
        x, y = (int(v) for v in prompt.points[0])
        ImageDraw.floodfill(grown, (x, y), (1, 254, 3))
        return Found((np.asarray(grown) == (1, 254, 3)).all(-1), 1.0)


class KnowsTheParts:
    """In YOLO's place: the parts as they were drawn."""

    names = dict(enumerate(PARTS))  # noqa: RUF012 - as ultralytics has it

    def predict(self, images: list[Image.Image], **_: object) -> list[Any]:
        """A result for each picture, in ultralytics' form."""
        sure = [0.97, 0.93, 0.88]
        boxes = SimpleNamespace(
            cls=torch.arange(3), conf=torch.tensor(sure), xyxy=torch.tensor(list(PARTS.values()))
        )
        return [SimpleNamespace(boxes=boxes) for _ in images]


class ShownSegment(Segment):
    """The tool around a model that knows the scene."""

    name = "segment"

    def setup(self, device: str) -> None:
        """Nothing is loaded."""
        self._sam = OfOneColour()


class ShownDetect(DetectObjects):
    """The tool around a model that knows the scene."""

    name = "detect_objects"

    def setup(self, device: str) -> None:
        """Nothing is loaded."""
        self._model = KnowsTheParts()


def called(tool: PerceptionTool, image: Image.Image, **arguments: object) -> ToolResult:
    """The result of a call, as an agent makes it."""
    view = View("image_1", image, "image_1", Box(0, 0, *image.size), image.size)
    made = ToolCall("c1", tool.name, arguments, "json")
    result = execute(tool, made, lambda: ToolContext(views={"image_1": view}))
    if result.error is not None:
        raise SystemExit(f"{tool.name}: {result.error.message}\n{result.error.detail}")
    return result


def page(panels: list[tuple[str, ToolResult | Image.Image]]) -> Image.Image:
    """Pictures and texts of the results, three in a row."""
    wide, high, head, letters = 340, 320, 24, ImageFont.load_default(13)
    rows = -(-len(panels) // 3)
    canvas = Image.new("RGB", (3 * wide, rows * high), "white")
    draw = ImageDraw.Draw(canvas)
    for number, (title, shown) in enumerate(panels):
        x, y = number % 3 * wide + 10, number // 3 * high
        draw.text((x, y + 4), title, fill="black", font=ImageFont.load_default(15))
        image = (shown if isinstance(shown, Image.Image) else shown.views[0].image).copy()
        image.thumbnail((wide - 20, high - head - 86), Image.Resampling.LANCZOS)
        canvas.paste(image, (x, y + head))
        text = "" if isinstance(shown, Image.Image) else shown.text or ""
        lines = [piece for line in text.splitlines() for piece in textwrap.wrap(line, 50)]
        if len(lines) > 4:
            lines[3:] = ["..."]
        draw.text((x, y + head + image.height + 6), "\n".join(lines), fill="#333333", font=letters)
    return canvas


def main(target: str) -> None:
    """Call the tools and write the picture."""
    image = scene()
    disc, plate, wedge = PARTS.values()
    ends = [[(p[0] + p[2]) / 2, (p[1] + p[3]) / 2] for p in (disc, plate)]
    panels: list[tuple[str, ToolResult | Image.Image]] = [
        ("the picture", image),
        (
            "crop_region, region of a grid of 4",
            called(crop_region, image, region=[0, 2, 3, 3], grid=4),
        ),
        ("crop_region, rotate 90", called(crop_region, image, box=wedge, rotate=90)),
        ("image_zoom_in_tool", called(image_zoom_in_tool, image, bbox_2d=[80, 155, 160, 205])),
        (
            "measure, distance",
            called(measure, image, what="distance", points=ends, scale=0.5, unit="mm", show=True),
        ),
        (
            "compare_views, difference",
            called(compare_views, image, first=disc, second=wedge, difference=True),
        ),
        ("read_text", called(read_text, image, box=WORDS, show=True)),
        ("segment, one point", called(ShownSegment(), image, points=[[35, 64]])),
        ("detect_objects", called(ShownDetect(), image)),
    ]
    page(panels).save(target)


if __name__ == "__main__":
    main(sys.argv[1])
