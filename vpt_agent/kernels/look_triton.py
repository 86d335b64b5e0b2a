"""``vpt::look`` and ``vpt::pixels`` in Triton: one launch, and the plain version's bits.

A program makes a tile of new pixels: it goes once through the old lines that the tile needs, makes
each shorter with Pillow's integer weights (first pass), and adds it to every new line it is part of
(second pass). Nothing is written but the result. Integers and a table of 256 x 3 values do it all,
so the result does not depend on the device or on the order of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from vpt_agent.kernels.look import lookup
from vpt_agent.kernels.resample import PRECISION, Taps, antialias_taps, nearest_path, rows_first

TILE_A, TILE_B = 16, 16  # pixels along the axis of the first and of the second pass
FIELDS = 16


@dataclass(frozen=True)
class Region:
    """One picture to make: old lines of the image, by axis, and how new pixels come from them.

    ``map_x`` and ``map_y``: image columns and rows that the resize reads. ``swap``: along the
    height first. ``row``: the first row of patches in the result, ``wide`` blocks of patches a row.
    """

    map_x: npt.NDArray[np.int32]
    map_y: npt.NDArray[np.int32]
    taps_x: Taps
    taps_y: Taps
    swap: bool
    row: int
    wide: int


def region(
    box: Sequence[int],
    stages: Sequence[Sequence[int]],
    size: Sequence[int],
    *,
    row: int = 0,
    wide: int = 1,
    window: Sequence[int] | None = None,
    bilinear: bool = False,
) -> Region:
    """Tables for ``box`` resized by NEAREST ``stages`` and then to ``size`` (height, width), of
    which ``window`` (left, top, right, bottom) is made."""
    left, top, right, bottom = box
    map_x = left + nearest_path(right - left, [s[1] for s in stages])
    map_y = top + nearest_path(bottom - top, [s[0] for s in stages])
    taps_x = antialias_taps(len(map_x), size[1], bilinear=bilinear)
    taps_y = antialias_taps(len(map_y), size[0], bilinear=bilinear)
    swap = rows_first((len(map_x), len(map_y)), (size[1], size[0]))
    if window is not None:
        taps_x = Taps(*(t[window[0] : window[2]] for t in taps_x))
        taps_y = Taps(*(t[window[1] : window[3]] for t in taps_y))
    return Region(map_x, map_y, taps_x, taps_y, swap, row, wide)


def packed(regions: Sequence[Region]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], int]:
    """``regions`` as the kernel reads them: descriptors [R, FIELDS], one table, most tiles."""
    rows: list[list[int]] = []
    tables: list[npt.NDArray[np.int32]] = []
    end = most = 0

    def add(values: npt.NDArray[np.int32]) -> int:
        nonlocal end
        tables.append(values.reshape(-1))
        end += values.size
        return end - values.size

    for one in regions:
        along = [(one.map_x, one.taps_x), (one.map_y, one.taps_y)]
        fields: list[int] = []
        for lines, taps in reversed(along) if one.swap else along:
            places = [add(lines), add(taps.first), add(taps.weights)]
            fields += [len(taps.first), len(lines), taps.weights.shape[1], *places]
        tiles_a = -(-fields[0] // TILE_A)
        tiles = tiles_a * -(-fields[6] // TILE_B)
        most = max(most, tiles)
        rows.append([*fields, tiles_a, int(one.swap), one.wide, one.row])
    return np.array(rows, np.int32), np.concatenate(tables), most


@triton.jit
def _made_line(source, table, a, on, first, step, old, taps, lines, weights, BITS: tl.constexpr):
    """First pass: new pixels ``a`` of one old line; ``first`` the old pixel that each begins at."""
    made = tl.full(a.shape, 1 << (BITS - 1), tl.int32)
    # "while", since range() over values is broken in Triton 3.6's interpreter under numpy 2.4.
    tap = 0
    while tap < taps:
        weight = tl.load(table + weights + a * taps + tap, mask=on, other=0)
        place = tl.load(table + lines + tl.minimum(first + tap, old - 1), mask=on, other=0)
        made += tl.load(source + place * step, mask=on, other=0).to(tl.int32) * weight
        tap += 1
    return tl.minimum(tl.maximum(made >> BITS, 0), 255)


@triton.jit
def _place(x, y, wide, row, wide_patch, high_patch, MERGE: tl.constexpr, TEMPORAL: tl.constexpr):
    """Where pixel (x, y) of the first channel and frame stands among the patches."""
    patch_x, patch_y = x // wide_patch, y // high_patch
    block = (patch_y // MERGE) * wide + patch_x // MERGE
    patch = row + (block * MERGE + patch_y % MERGE) * MERGE + patch_x % MERGE
    inside = (y % high_patch) * wide_patch + x % wide_patch
    return patch.to(tl.int64) * (3 * TEMPORAL * high_patch * wide_patch) + inside


@triton.jit
def _look_kernel(
    image,
    line,
    regions,
    table,
    levels,
    out,
    wide_patch,
    high_patch,
    MERGE: tl.constexpr,
    TEMPORAL: tl.constexpr,
    FIELDS: tl.constexpr,
    BITS: tl.constexpr,
    TILE_A: tl.constexpr,
    TILE_B: tl.constexpr,
):
    at = regions + tl.program_id(1) * FIELDS
    n_a, old_a, k_a = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    map_a, first_a, weights_a = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
    n_b, old_b, k_b = tl.load(at + 6), tl.load(at + 7), tl.load(at + 8)
    map_b, first_b, weights_b = tl.load(at + 9), tl.load(at + 10), tl.load(at + 11)
    tiles_a, swap = tl.load(at + 12), tl.load(at + 13)
    wide, row = tl.load(at + 14), tl.load(at + 15)
    start_b = (tl.program_id(0) // tiles_a) * TILE_B
    if start_b < n_b:  # regions with fewer tiles than the largest have nothing to do here
        lane = tl.arange(0, 4 * TILE_A)  # 3 of 4 quarters work: Triton's blocks are powers of two
        channel = lane // TILE_A
        a = (tl.program_id(0) % tiles_a) * TILE_A + lane % TILE_A
        b = start_b + tl.arange(0, TILE_B)
        on_a = (a < n_a) & (channel < 3)
        on_b = b < n_b
        from_a = tl.load(table + first_a + a, mask=on_a, other=0)
        from_b = tl.load(table + first_b + b, mask=on_b, other=0)
        step_a = tl.where(swap != 0, line, 3).to(tl.int64)
        step_b = tl.where(swap != 0, 3, line).to(tl.int64)
        begin = tl.load(table + first_b + start_b)
        last = tl.load(table + first_b + tl.minimum(start_b + TILE_B, n_b) - 1)
        total = tl.full((TILE_B, 4 * TILE_A), 1 << (BITS - 1), tl.int32)
        old, end = begin, tl.minimum(last + k_b, old_b)
        while old < end:
            source = image + tl.load(table + map_b + old) * step_b + channel
            made = _made_line(
                source, table, a, on_a, from_a, step_a, old_a, k_a, map_a, weights_a, BITS
            )
            tap_b = old - from_b
            used = on_b & (tap_b >= 0) & (tap_b < k_b)
            weight_b = tl.load(table + weights_b + b * k_b + tap_b, mask=used, other=0)
            total += weight_b[:, None] * made[None, :]
            old += 1
        level = tl.minimum(tl.maximum(total >> BITS, 0), 255)
        on = on_b[:, None] & on_a[None, :]
        value = tl.load(levels + level * 3 + channel[None, :], mask=on, other=0.0)
        x = tl.where(swap != 0, b[:, None], a[None, :])
        y = tl.where(swap != 0, a[None, :], b[:, None])
        plane = high_patch * wide_patch
        target = out + _place(x, y, wide, row, wide_patch, high_patch, MERGE, TEMPORAL)
        for frame in tl.static_range(TEMPORAL):
            tl.store(target + (channel[None, :] * TEMPORAL + frame) * plane, value, mask=on)


def launch(
    image: Tensor,
    regions: Sequence[Region],
    out: Tensor,
    levels: Tensor,
    *,
    patch: tuple[int, int],
    merge: int,
    temporal: int,
) -> None:
    """Make all ``regions`` of ``image`` uint8 [H, W, 3] into ``out`` float32, in one launch.

    ``levels`` float32 [256, 3]: the value of each 8-bit level; ``patch`` (height, width).
    """
    fields, table, most = packed(regions)
    kernel: Any = _look_kernel
    kernel[(most, len(regions))](
        image,
        3 * image.shape[1],
        torch.from_numpy(fields).to(image.device, non_blocking=True),
        torch.from_numpy(table).to(image.device, non_blocking=True),
        levels.to(image.device, non_blocking=True),
        out,
        patch[1],
        patch[0],
        MERGE=merge,
        TEMPORAL=temporal,
        FIELDS=FIELDS,
        BITS=PRECISION,
        TILE_A=TILE_A,
        TILE_B=TILE_B,
    )


def look_triton(
    image: Tensor,
    boxes: Tensor,
    sizes: Tensor,
    pre_sizes: Tensor | None,
    mean: list[float],
    std: list[float],
    patch: int,
    merge: int,
    temporal: int,
) -> Tensor:
    """As the plain version of ``vpt::look``; ``image`` on the device, the lists on the CPU."""
    stages = [[] for _ in range(len(boxes))] if pre_sizes is None else pre_sizes.tolist()
    regions, row = [], 0
    for box, before, size in zip(boxes.tolist(), stages, sizes.tolist(), strict=True):
        regions.append(region(box, before, size, row=row, wide=size[1] // (patch * merge)))
        row += (size[0] // patch) * (size[1] // patch)
    out = torch.empty(row, 3 * temporal * patch * patch, device=image.device)
    if regions:
        levels = torch.from_numpy(lookup(mean, std))
        launch(
            image.contiguous(),
            regions,
            out,
            levels,
            patch=(patch, patch),
            merge=merge,
            temporal=temporal,
        )
    return out


def pixels_triton(
    image: Tensor,
    box: list[int],
    stages: list[int],
    size: list[int],
    window: list[int],
    canvas: list[int],
    mean: list[float],
    std: list[float],
    bilinear: bool,
) -> Tensor:
    """As the plain version of ``vpt::pixels``: one patch as large as the canvas."""
    pairs = [stages[i : i + 2] for i in range(0, len(stages), 2)]
    one = region(box, pairs, size, window=window, bilinear=bilinear)
    out = torch.zeros(3, *canvas, device=image.device)
    levels = torch.from_numpy(lookup(mean, std))
    patch = (canvas[0], canvas[1])
    launch(image.contiguous(), [one], out, levels, patch=patch, merge=1, temporal=1)
    return out
