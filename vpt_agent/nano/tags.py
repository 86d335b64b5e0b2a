"""Draw one tag: a coloured shape with a short string, and know where each character lies."""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vpt_agent.nano.alphabet import (
    COLOURS,
    MAX_LENGTH,
    MIN_LENGTH,
    SHAPES,
    SYMBOLS,
    Split,
    fonts_of,
)

_FONT_DIR = Path(__file__).parent / "fonts"
Quad = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class TagStyle:
    """What a tag says and looks like; `cap` is the capital height in scene pixels."""

    text: str
    colour: str
    shape: str
    font: str
    cap: float


@dataclass(frozen=True)
class TagPatch:
    """A drawn tag: RGBA image and character corners, in pixels of that image."""

    image: Image.Image
    quads: tuple[Quad, ...]


def random_text(rng: random.Random) -> str:
    """A random string of 3 to 6 scene symbols."""
    return "".join(rng.choice(SYMBOLS) for _ in range(rng.randint(MIN_LENGTH, MAX_LENGTH)))


def random_style(rng: random.Random, split: Split, cap: float) -> TagStyle:
    """A random tag of a split with capitals `cap` scene pixels high."""
    return TagStyle(
        random_text(rng),
        rng.choice(tuple(COLOURS)),
        rng.choice(SHAPES),
        rng.choice(fonts_of(split)),
        cap,
    )


@lru_cache(maxsize=64)
def _cap_ratio(name: str) -> float:
    font = ImageFont.truetype(_FONT_DIR / f"{name}.ttf", 200)
    box = font.getbbox("H", anchor="ls")
    return float(-box[1]) / 200.0


@lru_cache(maxsize=512)
def _font(name: str, cap_tenths: int) -> ImageFont.FreeTypeFont:
    size = cap_tenths / 10.0 / _cap_ratio(name)
    return ImageFont.truetype(_FONT_DIR / f"{name}.ttf", size, layout_engine=ImageFont.Layout.BASIC)


def _rgb(rng: random.Random, colour: str) -> tuple[int, int, int]:
    hue, saturation, value = COLOURS[colour]
    parts = colorsys.hsv_to_rgb(
        ((hue + rng.uniform(-6, 6)) % 360) / 360.0, rng.uniform(*saturation), rng.uniform(*value)
    )
    return tuple(int(255 * p) for p in parts)  # type: ignore[return-value]


def _ink(rng: random.Random, fill: tuple[int, int, int]) -> tuple[int, int, int]:
    """A text colour far in brightness from the tag's own."""
    luma = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2]
    base = rng.randint(0, 35) if luma > 120 else rng.randint(220, 255)
    return tuple(  # type: ignore[return-value]
        max(0, min(255, base + rng.randint(-20, 20))) for _ in range(3)
    )


def _outline(
    rng: random.Random, shape: str, text: float, cap: float
) -> tuple[float, float, list[tuple[float, float]]]:
    """Width, height and corner points of a shape around text `text` wide and `cap` high."""
    pad_x, pad_y = cap * rng.uniform(0.6, 1.0), cap * rng.uniform(0.55, 0.9)
    w, h = text + 2 * pad_x, cap + 2 * pad_y
    if shape == "round":
        w = h = math.hypot(text, cap) + 0.9 * cap
    elif shape == "oval":
        h = cap * rng.uniform(2.7, 3.2)
        w = text / math.sqrt(1 - (1.25 * cap / h) ** 2) + 0.8 * cap
    elif shape == "hexagonal":
        t = h * 0.5
        w = text + 0.6 * cap + 2 * t
        return w, h, [(0, h / 2), (t, 0), (w - t, 0), (w, h / 2), (w - t, h), (t, h)]
    elif shape == "arrow-shaped":
        t, wing = h * 0.6, h * 0.25
        body = text + 1.2 * cap
        w, low = body + t, h + wing
        head = [(body, wing), (body, 0.0), (w, wing + h / 2), (body, h + 2 * wing), (body, low)]
        return w, h + 2 * wing, [(0.0, wing), *head, (0.0, low)]
    return w, h, [(0, 0), (w, 0), (w, h), (0, h)]


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    points: list[tuple[float, float]],
    fill: tuple[int, int, int],
    edge: tuple[int, int, int],
    width: int,
) -> None:
    if shape in ("round", "oval"):
        (x0, y0), (x1, y1) = points[0], points[2]
        draw.ellipse((x0, y0, x1, y1), fill=fill, outline=edge, width=width)
    else:
        draw.polygon(points, fill=fill, outline=edge, width=width)


def draw_tag(rng: random.Random, style: TagStyle) -> TagPatch:
    """Draw a tag with random slant, tilt, spacing and weight; sizes in scene pixels."""
    scale = 2 if style.cap < 20 else 1
    cap = style.cap * scale
    font = _font(style.font, int(cap * 10))
    gap = cap * rng.uniform(0.02, 0.16)
    advance = [font.getlength(c) + gap for c in style.text]
    text = sum(advance) - gap
    shear = rng.choice((0.0, 0.0, rng.uniform(-0.12, 0.3)))
    angle = math.radians(rng.uniform(-9, 9))
    w, h, points = _outline(rng, style.shape, text + abs(shear) * cap, cap)
    margin = 2 * scale
    size = (int(w) + 2 * margin, int(h) + 2 * margin)
    fill = _rgb(rng, style.colour)
    ink = _ink(rng, fill)
    layer = Image.new("RGBA", size, (*fill, 0))
    draw = ImageDraw.Draw(layer)
    shifted = [(x + margin, y + margin) for x, y in points]
    edge = ink if rng.random() < 0.5 else tuple(int(c * 0.55) for c in fill)
    _draw_shape(draw, style.shape, shifted, fill, edge, max(1, int(cap * rng.uniform(0.06, 0.16))))  # type: ignore[arg-type]
    # The string sits in the arrow's body, left of its head.
    right = shifted[1][0] + margin if style.shape == "arrow-shaped" else size[0]
    x0 = (right - text) / 2
    base = size[1] / 2 + cap / 2
    mask = Image.new("L", size, 0)
    pen = ImageDraw.Draw(mask)
    bold = 1 if rng.random() < 0.2 and cap > 22 else 0
    corners: list[Quad] = []
    for char, step in zip(style.text, advance, strict=True):
        pen.text((x0, base), char, fill=255, font=font, anchor="ls", stroke_width=bold)
        x1 = x0 + step - gap
        corners.append(((x0, base - cap), (x1, base - cap), (x1, base), (x0, base)))
        x0 += step
    middle = size[1] / 2
    if shear:
        # Output (x, y) shows input (x + shear * (y - middle), y): the tops lean right.
        matrix = (1.0, shear, -shear * middle, 0.0, 1.0, 0.0)
        mask = mask.transform(
            size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC
        )
    layer.paste((*ink, 255), (0, 0), mask)
    return _tilted(layer, corners, shear, angle, scale)


def _tilted(
    layer: Image.Image, corners: list[Quad], shear: float, angle: float, scale: int
) -> TagPatch:
    """Rotate a tag by `angle` (radians, clockwise on screen) and undo the supersampling."""
    w, h = layer.size
    cos, sin = math.cos(angle), math.sin(angle)
    out = (
        math.ceil((w * cos + h * abs(sin)) / scale),
        math.ceil((h * cos + w * abs(sin)) / scale),
    )
    ox, oy = out[0] / 2, out[1] / 2
    a, b = cos * scale, sin * scale
    matrix = (a, b, w / 2 - a * ox - b * oy, -b, a, h / 2 + b * ox - a * oy)
    if scale > 1:
        # The affine filter does not average, so rotate at full size first, then reduce.
        big = (out[0] * scale, out[1] * scale)
        full = (cos, sin, w / 2 - cos * ox * scale - sin * oy * scale)
        rest = (-sin, cos, h / 2 + sin * ox * scale - cos * oy * scale)
        turned = layer.transform(
            big, Image.Transform.AFFINE, full + rest, resample=Image.Resampling.BICUBIC
        ).reduce(scale)
    else:
        turned = layer.transform(
            out, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC
        )
    quads = []
    for quad in corners:
        points = np.array(quad)
        x = points[:, 0] - shear * (points[:, 1] - h / 2) - w / 2
        y = points[:, 1] - h / 2
        px = (cos * x - sin * y) / scale + ox
        py = (sin * x + cos * y) / scale + oy
        quads.append(tuple((float(i), float(j)) for i, j in zip(px, py, strict=True)))
    return TagPatch(turned, tuple(quads))
