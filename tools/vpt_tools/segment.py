"""Outline what is pointed at, with SAM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pydantic import Field

from vpt_agent.errors import CheckpointError, ModelRetry, ToolFailed, VPTError
from vpt_agent.tool import (
    PerceptionTool,
    PixelBox,
    PixelPoints,
    ToolArguments,
    ToolContext,
    ToolOutput,
)
from vpt_agent.vision.frames import clamp
from vpt_tools import _draw
from vpt_tools._outline import outlines, signed_area, simplified
from vpt_tools._sam import (
    Mask,
    OriginalSam,
    Prompt,
    Sam,
    TransformersSam,
    missing_original,
)

CHECKPOINT = "VPT_SAM_CHECKPOINT"
"""Environment variable that names the checkpoint of the installed tool."""

MOST_POINTS = 24
"""Points of an outline that the model is told."""

MOST_PARTS = 8


class SegmentArguments(ToolArguments):
    """What is pointed at."""

    points: PixelPoints | None = None
    not_points: PixelPoints | None = None
    box: PixelBox | None = None
    show: bool = Field(default=True, description="show the picture with the part coloured, too")
    source: str | None = Field(
        default=None, description="id of the picture to look at; the latest one by default"
    )


class Segment(PerceptionTool):
    """Find the exact outline and the area of the thing in a box, or at one or more points.

    not_points lie on what does not belong to it.
    """

    name = "segment"
    arguments = SegmentArguments
    needs = frozenset({"view"})
    timeout = 300.0
    extra = "sam"
    licence = "Apache-2.0"

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        """``checkpoint``: a folder that transformers wrote, a name on the hub, or an original
        ``.pth`` file (extra ``sam``). Without it, what VPT_SAM_CHECKPOINT names."""
        self._given = checkpoint
        self._sam: Sam | None = None

    @property
    def checkpoint(self) -> str:
        """The checkpoint in use, or an empty text."""
        return str(self._given or os.environ.get(CHECKPOINT, ""))

    def lacks(self) -> VPTError | None:
        """A checkpoint, or what it needs."""
        name = self.checkpoint
        if not name:
            return CheckpointError(
                "segment has no SAM checkpoint",
                expected="a folder that transformers wrote, a name on the hub, or a .pth file",
                fix=f"make one with Segment('sam_vit_b_01ec64.pth') of vpt_tools.segment, or set "
                f"{CHECKPOINT}",
            )
        if not name.endswith((".pth", ".pt")):
            return None
        if not Path(name).is_file():
            return CheckpointError("there is no such SAM checkpoint", where=name)
        return missing_original()

    def setup(self, device: str) -> None:
        """Load the model."""
        error = self.lacks()
        if error is not None:
            raise error
        name = self.checkpoint
        original = name.endswith((".pth", ".pt"))
        self._sam = OriginalSam(Path(name), device) if original else TransformersSam(name, device)

    def close(self) -> None:
        """Let go of the model."""
        self._sam = None

    def run(self, arguments: SegmentArguments, context: ToolContext) -> ToolOutput:
        """Outlines and area of the best mask, in pixels of the view; and an overlay."""
        view = context.require_view()
        prompt = _prompt(arguments, view.size)
        if self._sam is None:
            raise ToolFailed("segment is not set up")
        mask, quality = self._sam.find(view, prompt)
        pixels = int(mask.sum())
        if pixels == 0:
            return ToolOutput(text="Nothing was found there.", structured={"pixels": 0})
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
        parts = [line for line in outlines(mask) if signed_area(line) > 0][:MOST_PARTS]
        share = pixels / mask.size
        line = [[round(x), round(y)] for x, y in simplified(parts[0], MOST_POINTS)]
        values: dict[str, Any] = {
            "of": view.id,
            "pixels": pixels,
            "share": round(share, 6),
            "box": box,
            "quality": round(quality, 4),
            "outlines": [[[x, y] for x, y in simplified(part, 200)] for part in parts],
        }
        drawn = [context.redrawn(view, _overlay(view.image, mask))] if arguments.show else []
        return ToolOutput(
            views=drawn,
            text=f"It covers {pixels} pixels of {view.id}, {share:.2%} of it, in the box {box}; "
            f"outline of its largest part: {line}; the model's sureness is {quality:.2f}.",
            structured=values,
        )


def _prompt(arguments: SegmentArguments, size: tuple[int, int]) -> Prompt:
    box = None if arguments.box is None else clamp(arguments.box, size)
    wanted, unwanted = arguments.points or [], arguments.not_points or []
    if not wanted and box is None:
        raise ModelRetry("give a box, or one or more points on the thing")
    for x, y in (*wanted, *unwanted):
        if not (0 <= x <= size[0] and 0 <= y <= size[1]):
            raise ModelRetry(
                f"point [{x:g}, {y:g}] lies outside the picture of {size[0]} x {size[1]} pixels",
                "box_outside",
            )
    points = [(p[0], p[1]) for p in (*wanted, *unwanted)]
    inside = [True] * len(wanted) + [False] * len(unwanted)
    return Prompt(points, inside, box)


def _overlay(image: Image.Image, mask: Mask) -> Image.Image:
    """The picture with the mask coloured and its outline drawn."""
    tint = Image.blend(image, Image.new("RGB", image.size, _draw.colour(0)), 0.45)
    drawn = Image.composite(tint, image, Image.fromarray(mask.astype(np.uint8) * 255))
    draw, wide = ImageDraw.Draw(drawn), _draw.pen(image.size)
    for line in outlines(mask):
        draw.line([*line, line[0]], fill=_draw.colour(1), width=wide)
    return drawn


segment = Segment()
