"""What the model sees: whole scenes and crops resized, and their Qwen2-VL patches."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vpt_agent.tokens.grid import region_to_box

GRID: Final = 16
PATCH: Final = 14
MERGE: Final = 2
GLOBAL_LONGEST: Final = 224
CROP_LONGEST: Final = 280
# The region asked for reaches this far, in cells, beyond the tag on each side.
SLACK: Final = 0.25
# The mean and deviation of OpenAI's CLIP, which Qwen2-VL keeps.
MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
STD: Final = (0.26862954, 0.26130258, 0.27577711)

Box = tuple[int, int, int, int]


def fit_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """View size (width, height) in pixels for a source of that size; multiples of 28."""
    step = PATCH * MERGE
    scale = longest / max(width, height)
    return (
        max(step, int(width * scale / step + 0.5) * step),
        max(step, int(height * scale / step + 0.5) * step),
    )


def fit_view(image: Image.Image, longest: int, box: Box | None = None) -> Image.Image:
    """Resize an RGB picture, or the box (source pixels) cut out of it, in one step."""
    if box is not None:
        image = image.crop(box)
    return image.resize(fit_size(*image.size, longest), Image.Resampling.BICUBIC)


def cells_of(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Inclusive grid cells (min x, min y, max x, max y) that cover a box in source pixels."""
    left, top, right, bottom = box
    return (
        left * GRID // width,
        top * GRID // height,
        min(GRID - 1, (right - 1) * GRID // width),
        min(GRID - 1, (bottom - 1) * GRID // height),
    )


def asked_cells(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """The region to ask for: inclusive grid cells that cover a tag with some room around it."""
    room_x, room_y = SLACK * width / GRID, SLACK * height / GRID
    left, top, right, bottom = box
    wider = (
        max(0, int(left - room_x)),
        max(0, int(top - room_y)),
        min(width, math.ceil(right + room_x)),
        min(height, math.ceil(bottom + room_y)),
    )
    return cells_of(wider, width, height)


def crop_box(cells: tuple[int, int, int, int], width: int, height: int) -> Box:
    """Source-pixel box of a region of cells: the library's region policy `cover`."""
    left, top, right, bottom = region_to_box(cells, (width, height), GRID, "cover")
    return int(left), int(top), int(right), int(bottom)


def patches(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Patches of one view: uint8 RGB (height, width, 3) to (height/14 * width/14, 1176).

    Same order and values as transformers' Qwen2-VL image processor: 2 x 2 blocks of patches
    together, each patch as (channel, frame, row, column) with the one frame given twice.
    """
    values: NDArray[np.float32] = batch_patches(pixels[None])[0]
    return values


def batch_patches(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """As `patches` for views of one size: (n, height, width, 3) to (n, patches, 1176)."""
    n, height, width, _ = pixels.shape
    scale = (1.0 / 255.0 / np.array(STD)).astype(np.float32)
    shift = (-np.array(MEAN) / np.array(STD)).astype(np.float32)
    values = pixels.astype(np.float32) * scale + shift
    rows, columns = height // PATCH, width // PATCH
    blocks = values.reshape(
        n, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3
    ).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    frames = np.broadcast_to(blocks[:, :, :, :, :, :, None], (*blocks.shape[:6], 2, PATCH, PATCH))
    return np.ascontiguousarray(frames.reshape(n, rows * columns, 3 * 2 * PATCH * PATCH))
