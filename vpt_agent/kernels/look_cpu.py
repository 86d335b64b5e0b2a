"""``vpt::look`` and ``vpt::pixels`` on the CPU: what the plain versions give, bit for bit, sooner.

Pillow resizes here too: its integer arithmetic is the answer, and nothing in torch gives the same
bits in less time. What is saved is all around it: of a NEAREST stage only the rows that are needed
are unpacked, pixels are normalised line by line in planes, and patches are written once, in place.
A picture that has its size already, in planes line by line (strides 3 W, 1, W), is not copied.
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


def _lines(
    image: Tensor,
    box: Sequence[int],
    stages: Sequence[Sequence[int]],
    size: Sequence[int],
    resample: Image.Resampling,
) -> npt.NDArray[np.uint8]:
    """The resized picture in planes line by line, uint8 [H, 3, W]."""
    left, top, right, bottom = box
    part = image[top:bottom, left:right].numpy()
    if not stages and tuple(size) == part.shape[:2]:
        return part.transpose(0, 2, 1)
    if stages and stages[0][0] < bottom - top:
        part = part[nearest_index(bottom - top, stages[0][0])]
    picture = Image.fromarray(np.ascontiguousarray(part))
    for height, width in stages:
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
    picture = picture.resize((size[1], size[0]), resample)
    packed = np.frombuffer(picture.tobytes("raw", "RGB;L"), np.uint8)
    return packed.reshape(size[0], 3, size[1])


def _normalised(
    lines: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]
) -> npt.NDArray[np.float32]:
    """Values of ``lines`` [H, 3, W], float32, rounded as the plain version's table."""
    values = lines.astype(np.float32, order="C")
    values /= np.float32(255)
    values -= np.array(mean, np.float32)[:, None]
    values /= np.array(std, np.float32)[:, None]
    return values


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
    counts = [(h // patch) * (w // patch) for h, w in sizes.tolist()]
    stages = [[] for _ in counts] if pre_sizes is None else pre_sizes.tolist()
    result = torch.empty(sum(counts), 3 * temporal * patch * patch)

    step, run = patch * merge, f"V{4 * patch}"  # a patch's row of values moves as one

    def write(
        rows: Tensor, box: Sequence[int], before: Sequence[Sequence[int]], size: Sequence[int]
    ) -> None:
        lines = _lines(image, box, before, size, Image.Resampling.BICUBIC)
        high, wide = size[0] // step, size[1] // step
        # rows: blocks of merge x merge patches; within one: channel, time, y, (x)
        blocks = rows.numpy().view(run).reshape(high, wide, merge, merge, 3, temporal, patch)
        strip = max(1, CACHED // (step * 3 * size[1] * 4))  # blocks whose values stay in the cache
        for first in range(0, high, strip):
            part = blocks[first : first + strip]
            values = _normalised(lines[first * step : (first + strip) * step], mean, std)
            runs = values.view(run).reshape(len(part), merge, patch, 3, wide, merge)
            for frame in range(temporal):
                part[:, :, :, :, :, frame] = runs.transpose(0, 4, 1, 5, 3, 2)

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
    lines = _lines(image, box, pairs, size, resample)
    left, top, right, bottom = window
    high, wide = bottom - top, right - left
    values = torch.from_numpy(_normalised(lines[top:bottom, :, left:right], mean, std))  # [h, 3, w]
    result = torch.empty(3, *canvas)
    result[:, :high, :wide].copy_(values.permute(1, 0, 2))
    result[:, high:].zero_()
    result[:, :high, wide:].zero_()
    return result
