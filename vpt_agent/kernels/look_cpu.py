"""``vpt::look`` and ``vpt::pixels`` on the CPU: what the plain versions give, bit for bit, sooner.

Pillow resizes here too: its integer arithmetic is the answer, and nothing in torch gives the same
bits in less time. What is saved is all around it: of a NEAREST stage only the rows that are needed
are unpacked, pixels are normalised line by line in planes, and patches are written once, in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from vpt_agent.kernels.resample import nearest_index

CACHED = 2**19  # bytes of values at a time


def _resized(
    image: npt.NDArray[np.uint8],
    box: Sequence[int],
    stages: Sequence[Sequence[int]],
    size: Sequence[int],
    resample: Image.Resampling,
) -> Image.Image:
    left, top, right, bottom = box
    part = image[top:bottom, left:right]
    if stages and stages[0][0] < bottom - top:
        part = part[nearest_index(bottom - top, stages[0][0])]
    picture = Image.fromarray(np.ascontiguousarray(part))
    for height, width in stages:
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
    return picture.resize((size[1], size[0]), resample)


def _lines(picture: Image.Image) -> npt.NDArray[np.uint8]:
    """Pixels of ``picture`` in planes line by line, uint8 [H, 3, W]."""
    width, height = picture.size
    packed = np.frombuffer(picture.tobytes("raw", "RGB;L"), np.uint8)
    return packed.reshape(height, 3, width)


def _normalised(
    lines: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Values of ``lines`` [H, 3, W], float32, rounded as the plain version's table."""
    values = lines.astype(np.float32)
    values /= np.float32(255)
    values -= np.array(mean, np.float32)[:, None]
    values /= np.array(std, np.float32)[:, None]
    return torch.from_numpy(values)


def _each(work: Sequence[Callable[[], None]]) -> None:
    """Do all of ``work``, on as many threads as torch was given: Pillow and torch let go of the
    interpreter's lock, and no piece touches what another writes."""
    threads = min(len(work), torch.get_num_threads())
    if threads < 2:
        for piece in work:
            piece()
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(piece) for piece in work]:
            done.result()


def look_cpu(
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
    """As the plain version of ``vpt::look``."""
    pixels = image.numpy()
    counts = [(h // patch) * (w // patch) for h, w in sizes.tolist()]
    stages = [[] for _ in counts] if pre_sizes is None else pre_sizes.tolist()
    result = torch.empty(sum(counts), 3 * temporal * patch * patch)

    def write(
        rows: Tensor, box: Sequence[int], before: Sequence[Sequence[int]], size: Sequence[int]
    ) -> None:
        small = _resized(pixels, box, before, size, Image.Resampling.BICUBIC)
        lines, step = _lines(small), patch * merge
        high, wide = size[0] // step, size[1] // step
        # rows: blocks of merge x merge patches; within one: channel, time, y, x
        blocks = rows.view(high, wide, merge, merge, 3, temporal, patch, patch)
        strip = max(1, CACHED // (step * 3 * size[1] * 4))  # blocks whose values stay in the cache
        for first in range(0, high, strip):
            part = blocks[first : first + strip]
            values = _normalised(lines[first * step : (first + strip) * step], mean, std)
            values = values.view(len(part), merge, patch, 3, wide, merge, patch)
            values = values.permute(0, 4, 1, 5, 3, 2, 6)
            part[:, :, :, :, :, 0].copy_(values)
            for frame in range(1, temporal):
                part[:, :, :, :, :, frame].copy_(part[:, :, :, :, :, 0])

    parts = zip(result.split(counts), boxes.tolist(), stages, sizes.tolist(), strict=True)
    _each([lambda part=part: write(*part) for part in parts])  # type: ignore[misc]
    return result


def pixels_cpu(
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
    """As the plain version of ``vpt::pixels``."""
    resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    pairs = [stages[i : i + 2] for i in range(0, len(stages), 2)]
    small = _resized(image.numpy(), box, pairs, size, resample)
    left, top, right, bottom = window
    high, wide = bottom - top, right - left
    if (left, top, right, bottom) != (0, 0, *small.size):
        small = small.crop((left, top, right, bottom))
    values = _normalised(_lines(small), mean, std)  # [h, 3, w]
    result = torch.empty(3, *canvas)
    result[:, :high, :wide].copy_(values.permute(1, 0, 2))
    result[:, high:].zero_()
    result[:, :high, wide:].zero_()
    return result
