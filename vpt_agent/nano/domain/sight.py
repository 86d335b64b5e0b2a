"""What each encoder sees of a whole picture: at which scale, which part, and as which pixels."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt_agent.errors import UserError
from vpt_agent.nano.views import GLOBAL_LONGEST, Box, fit_size, fit_view

AGAIN: Final = {"clip": 504, "dino": 448, "sam": 512}
"""Input size of each re-encoding kind in pixels: the longer side (clip, sam), or the side of the
square that is cut out of the middle (dino). The first look has 224 on the longer side."""

_DINO_SHORTEST: Final = AGAIN["dino"] * 256 // 224

PADDING: Final = (124, 116, 104)
"""Colour of SAM's padding in :func:`again_view`: the mean, which is zero when normalised."""

Pixels = NDArray[np.uint8]


def _resized(kind: str, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels of a whole picture of ``size`` as a kind resizes it."""
    width, height = size
    if kind in ("global", "clip"):
        return fit_size(width, height, AGAIN.get(kind, GLOBAL_LONGEST))
    if kind == "dino":
        shortest = min(size)
        return int(_DINO_SHORTEST * width / shortest), int(_DINO_SHORTEST * height / shortest)
    if kind == "sam":
        scale = AGAIN["sam"] / max(size)
        return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
    raise UserError(
        "nothing looks at whole pictures under this name",
        got=kind,
        expected=", ".join(("global", *AGAIN)),
    )


def scale_of(kind: str, size: tuple[int, int]) -> tuple[float, float]:
    """Pixels of the kind's input for each pixel of a picture of ``size``, along x and y.

    ``kind`` is ``global`` for the first look, or a re-encoding kind.
    """
    width, height = _resized(kind, size)
    return width / size[0], height / size[1]


def window_of(kind: str, size: tuple[int, int]) -> Box:
    """The part of a picture of ``size`` that a kind sees, in its pixels: all of it, but for dino.

    DINOv2's processor cuts the middle square out, 7/8 of the shorter side.
    """
    width, height = _resized(kind, size)
    if kind != "dino":
        return 0, 0, *size
    side = AGAIN["dino"]
    left, top = (width - side) // 2, (height - side) // 2
    sx, sy = size[0] / width, size[1] / height
    return (
        int(left * sx + 0.999),
        int(top * sy + 0.999),
        int((left + side) * sx),
        int((top + side) * sy),
    )


def place_in(kind: str, size: tuple[int, int], x: float, y: float) -> tuple[float, float]:
    """A point of the picture (pixels) in pixels of the kind's input."""
    sx, sy = scale_of(kind, size)
    if kind != "dino":
        return x * sx, y * sy
    width, height = _resized(kind, size)
    side = AGAIN["dino"]
    return x * sx - (width - side) // 2, y * sy - (height - side) // 2


def global_view(image: Image.Image) -> Image.Image:
    """The first look at an RGB picture: 224 pixels on the longer side."""
    return fit_view(image, GLOBAL_LONGEST)


def again_view(image: Image.Image, kind: str) -> Image.Image:
    """An RGB picture as the kind's encoder gets it, before its mean and deviation.

    As :mod:`vpt_agent.vision.encoders` makes them, in PIL. SAM's padding, zero there, is
    :data:`PADDING` here.
    """
    if kind == "clip":
        return fit_view(image, AGAIN["clip"])
    width, height = _resized(kind, image.size)
    if kind == "dino":
        side = AGAIN["dino"]
        left, top = (width - side) // 2, (height - side) // 2
        large = image.resize((width, height), Image.Resampling.BICUBIC)
        return large.crop((left, top, left + side, top + side))
    canvas = Image.new("RGB", (AGAIN["sam"], AGAIN["sam"]), PADDING)
    canvas.paste(image.resize((width, height), Image.Resampling.BILINEAR), (0, 0))
    return canvas
