"""Procedural cluttered backgrounds; some kinds are kept for the unseen split only."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from vpt_agent.nano.alphabet import Split, backgrounds_of

Rgb = tuple[int, int, int]


def muted(rng: random.Random, low: int = 60, high: int = 215) -> Rgb:
    """A colour of low saturation (0..255 RGB), so that it is no tag colour."""
    base = rng.randint(low, high)
    return tuple(  # type: ignore[return-value]
        max(0, min(255, base + rng.randint(-22, 22))) for _ in range(3)
    )


def _upscaled(grid: np.ndarray, size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(grid.clip(0, 255).astype(np.uint8), "RGB")
    return image.resize(size, Image.Resampling.BICUBIC)


def _noise_seed(rng: random.Random) -> np.random.Generator:
    return np.random.default_rng(rng.getrandbits(32))


def _gradient(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    corners = np.array([[muted(rng), muted(rng)], [muted(rng), muted(rng)]], dtype=np.float32)
    t = np.linspace(0, 1, 24, dtype=np.float32)
    rows = corners[0][None] * (1 - t)[:, None, None] + corners[1][None] * t[:, None, None]
    grid = rows[:, :1] * (1 - t)[None, :, None] + rows[:, 1:] * t[None, :, None]
    return _upscaled(grid, size)


def _noise(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    noise = _noise_seed(rng).normal(0, rng.uniform(8, 20), (192, 192, 1))
    tile = np.array(muted(rng, 80, 190)) + noise
    cell = rng.choice((1, 1, 2, 3))
    small = Image.fromarray(tile.clip(0, 255).astype(np.uint8), "RGB")
    small = small.resize((192 * cell, 192 * cell), Image.Resampling.BILINEAR)
    return _tiled(small, size)


def _tiled(tile: Image.Image, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size)
    for y in range(0, size[1], tile.height):
        for x in range(0, size[0], tile.width):
            image.paste(tile, (x, y))
    return image


def _stripes(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, muted(rng))
    draw = ImageDraw.Draw(image)
    colours = [muted(rng) for _ in range(3)]
    step = rng.randint(14, 90)
    slope = rng.uniform(-1.2, 1.2)
    reach = abs(slope) * size[1]
    for i, x in enumerate(np.arange(-reach, size[0] + reach, step)):
        start, end = (float(x), 0.0), (float(x) + slope * size[1], float(size[1]))
        draw.line([start, end], fill=colours[i % 3], width=int(step * 0.55) + 1)
    return image


def _blobs(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    cells = rng.randint(5, 24)
    grid = _noise_seed(rng).normal(0, 26, (cells, cells, 3))
    grid = grid.mean(axis=2, keepdims=True) + 0.35 * grid + np.array(muted(rng, 90, 180))
    return _upscaled(grid, size)


def _shelves(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, muted(rng, 40, 120))
    draw = ImageDraw.Draw(image)
    height = rng.randint(70, 190)
    for top in range(rng.randint(-60, 0), size[1], height):
        x = 0
        while x < size[0]:
            width = rng.randint(18, 90)
            lift = rng.randint(8, height // 2)
            draw.rectangle((x, top + lift, x + width - 3, top + height - 12), fill=muted(rng))
            x += width
        draw.rectangle((0, top + height - 12, size[0], top + height), fill=muted(rng, 30, 90))
    return image


def _bricks(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, muted(rng))
    draw = ImageDraw.Draw(image)
    width, height = rng.randint(50, 140), rng.randint(22, 60)
    palette = [muted(rng) for _ in range(5)]
    for row, y in enumerate(range(0, size[1], height)):
        for x in range(-(row % 2) * width // 2, size[0], width):
            draw.rectangle((x, y, x + width - 4, y + height - 4), fill=rng.choice(palette))
    return image


def _checker(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, muted(rng))
    draw = ImageDraw.Draw(image)
    step, other = rng.randint(24, 80), muted(rng)
    for row, y in enumerate(range(0, size[1], step)):
        for x in range((row % 2) * step, size[0], 2 * step):
            draw.rectangle((x, y, x + step, y + step), fill=other)
    return image


def _rings(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", size, muted(rng))
    draw = ImageDraw.Draw(image)
    cx, cy = rng.uniform(0, size[0]), rng.uniform(0, size[1])
    step = rng.randint(24, 70)
    palette = [muted(rng) for _ in range(3)]
    for radius in range(int(math.hypot(*size)), 0, -step):
        box = (cx - radius, cy - radius, cx + radius, cy + radius)
        draw.ellipse(box, fill=palette[(radius // step) % 3])
    return image


def _scratches(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    image = _gradient(rng, size)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(60, 160)):
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        angle, length = rng.uniform(0, math.pi), rng.uniform(30, 400)
        end = (x + math.cos(angle) * length, y + math.sin(angle) * length)
        draw.line([(x, y), end], fill=muted(rng), width=rng.randint(1, 5))
    return image


_KINDS: Final[dict[str, Callable[[random.Random, tuple[int, int]], Image.Image]]] = {
    "gradient": _gradient,
    "noise": _noise,
    "stripes": _stripes,
    "blobs": _blobs,
    "shelves": _shelves,
    "bricks": _bricks,
    "checker": _checker,
    "rings": _rings,
    "scratches": _scratches,
}


def _squiggle(
    rng: random.Random, draw: ImageDraw.ImageDraw, x: float, y: float, unit: float
) -> None:
    """A zigzag as high as the text of a tag that spells nothing."""
    points = [(x, y)]
    for _ in range(rng.randint(6, 16)):
        x += unit * rng.uniform(0.1, 0.5)
        points.append((x, y + unit * rng.uniform(-0.6, 0.6)))
    draw.line(points, fill=muted(rng, 20, 235), width=max(1, int(unit * 0.15)), joint="curve")


def _clutter(rng: random.Random, image: Image.Image, split: Split, unit: float) -> None:
    """Draw small muted things; `unit` is the capital height of the tags in pixels."""
    draw = ImageDraw.Draw(image)
    area = image.width * image.height / (unit * unit)
    for _ in range(int(area * rng.uniform(0.008, 0.028)) + 1):
        x, y = rng.uniform(0, image.width), rng.uniform(0, image.height)
        w, h = unit * rng.uniform(0.6, 6), unit * rng.uniform(0.6, 4)
        kind = rng.randrange(4)
        if kind == 0:
            _squiggle(rng, draw, x, y, unit)
        elif split == "unseen":
            points = [(x + w * rng.random(), y + h * rng.random()) for _ in range(3 + kind)]
            draw.polygon(points, fill=muted(rng))
        elif kind == 1:
            draw.rectangle((x, y, x + w, y + h), fill=muted(rng))
        elif kind == 2:
            draw.ellipse((x, y, x + w, y + h), fill=muted(rng))
        else:
            end = (x + w * rng.uniform(-2, 2), y + h * rng.uniform(-2, 2))
            draw.line([(x, y), end], fill=muted(rng), width=max(1, int(unit * 0.2)))


def paint(rng: random.Random, size: tuple[int, int], split: Split, unit: float) -> Image.Image:
    """Background of `size` (width, height) pixels; `unit` is the tags' capital height in pixels."""
    image = _KINDS[rng.choice(backgrounds_of(split))](rng, size)
    _clutter(rng, image, split, unit)
    return image
