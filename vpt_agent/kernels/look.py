"""Pixels to model inputs: ``vpt::look`` (Qwen-VL patches) and ``vpt::pixels`` (one plane stack).

The plain versions resample with Pillow on the CPU, and so define the answer: bicubic and bilinear
with antialiasing on 8-bit values, NEAREST by Pillow's rounding, then float32 normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from vpt_agent.kernels.registry import define, kernel_name, require

Rows = Tensor | Sequence[Sequence[int]]
Stages = Tensor | Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]


def lookup(mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float32]:
    """The normalised value of each 8-bit level by channel, float32 [256, 3]."""
    # 256 x 3 values say it all; the order of roundings is that of transformers' PIL processors.
    levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)[:, None]
    centre, spread = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
    return np.asarray((levels - centre) / spread, dtype=np.float32)  # [256, 3]


def _resample(
    image: npt.NDArray[np.uint8],
    box: Sequence[int],
    stages: Sequence[Sequence[int]],
    size: Sequence[int],
    resample: Image.Resampling,
) -> npt.NDArray[np.uint8]:
    left, top, right, bottom = box
    picture = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    for height, width in stages:
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
    picture = picture.resize((size[1], size[0]), resample)
    return np.asarray(picture)  # [H', W', 3]


def _look(
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
    pixels = image.numpy()
    table = lookup(mean, std)
    stages = [[] for _ in range(len(boxes))] if pre_sizes is None else pre_sizes.tolist()
    parts = [np.zeros((0, 3 * temporal * patch * patch), np.float32)]
    for box, size, before in zip(boxes.tolist(), sizes.tolist(), stages, strict=True):
        small = _resample(pixels, box, before, size, Image.Resampling.BICUBIC)
        values = table[small, np.arange(3)]  # [H', W', 3]
        high, wide = size[0] // (patch * merge), size[1] // (patch * merge)
        blocks = values.reshape(high, merge, patch, wide, merge, patch, 3)
        # rows: blocks of merge x merge patches; within one: channel, (time), y, x
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
        blocks = np.broadcast_to(blocks, (high, wide, merge, merge, 3, temporal, patch, patch))
        parts.append(blocks.reshape(high * wide * merge * merge, -1))
    return torch.from_numpy(np.concatenate(parts))


def _pixels(
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
    resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
    pairs = [stages[i : i + 2] for i in range(0, len(stages), 2)]
    small = _resample(image.numpy(), box, pairs, size, resample)
    left, top, right, bottom = window
    values = lookup(mean, std)[small[top:bottom, left:right], np.arange(3)]  # [h, w, 3]
    result = np.zeros((3, *canvas), np.float32)
    result[:, : bottom - top, : right - left] = values.transpose(2, 0, 1)
    return torch.from_numpy(result)


def _look_fake(
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
    rows = torch.library.get_ctx().new_dynamic_size()  # follows from the values of sizes
    return image.new_empty((rows, 3 * temporal * patch * patch), dtype=torch.float32)


def _pixels_fake(
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
    return image.new_empty((3, canvas[0], canvas[1]), dtype=torch.float32)


_look_op = define("look", _look, _look_fake, devices=("cpu",))
_pixels_op = define("pixels", _pixels, _pixels_fake, devices=("cpu",))


def _check_image(image: Tensor, where: str) -> None:
    require(
        image.dtype == torch.uint8 and image.dim() == 3 and image.shape[2] == 3,
        "the picture has another layout",
        where=where,
        got=f"{image.dtype} {tuple(image.shape)}",
        expected="torch.uint8 [H, W, 3]",
    )


def _check_boxes(boxes: Tensor, image: Tensor, where: str) -> None:
    height, width = image.shape[:2]
    for left, top, right, bottom in boxes.tolist():
        require(
            0 <= left < right <= width and 0 <= top < bottom <= height,
            "a box is empty or leaves the picture",
            where=where,
            got=(left, top, right, bottom),
            expected=f"left < right within 0..{width}, top < bottom within 0..{height}",
        )


def _rows(values: Rows, columns: int, count: int | None, name: str) -> Tensor:
    # An empty list has no columns to speak of.
    given = values if len(values) else torch.zeros(0, columns)
    rows = torch.as_tensor(given, dtype=torch.int64).cpu()
    require(
        rows.dim() == 2 and rows.shape[1] == columns and count in (None, rows.shape[0]),
        f"{name} has another shape",
        where="kernels.look",
        got=tuple(rows.shape),
        expected=f"[{'R' if count is None else count}, {columns}]",
    )
    return rows


def _stages(values: Stages | None, count: int) -> Tensor | None:
    if values is None or count == 0:
        return None
    given = torch.as_tensor(values, dtype=torch.int64).cpu()
    stages = given[:, None] if given.dim() == 2 else given  # [R, S, 2]
    require(
        stages.dim() == 3 and stages.shape[0] == count and stages.shape[2] == 2,
        "pre_sizes has another shape",
        where="kernels.look",
        got=tuple(given.shape),
        expected=f"[{count}, 2] or [{count}, S, 2]",
    )
    require(
        stages.numel() == 0 or int(stages.min()) > 0,
        "a size before the resize is empty",
        where="kernels.look",
        got=given.tolist(),
        expected="1 pixel or more",
    )
    return stages


def look(
    image: Tensor,
    boxes: Rows,
    sizes: Rows,
    pre_sizes: Stages | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    patch: int = 14,
    merge: int = 2,
    temporal: int = 2,
) -> Tensor:
    """Crop, resize, normalise and cut into the patches that Qwen-VL's vision tower reads.

    ``image`` uint8 [H, W, 3] RGB, on the CPU or, with Triton, on a GPU. ``boxes`` int64 [R, 4]:
    left, top, right, bottom in the image's pixels, right and bottom exclusive, not empty and inside
    the image. ``sizes`` int64 [R, 2]: height, width after the bicubic antialiased resize, multiples
    of patch * merge.
    ``pre_sizes``, if given, are the NEAREST stages before it: int64 [R, 2], or [R, S, 2] for S
    stages in order. Values become ``(v / 255 - mean) / std``.

    Returns float32 [sum of height * width / patch^2, 3 * temporal * patch^2], picture after
    picture in the layout of transformers' Qwen2-VL image processor. Anything else is a
    :class:`UserError`.
    """
    where = "kernels.look"
    _check_image(image, where)
    kernel_name("look", image)
    box_rows = _rows(boxes, 4, None, "boxes")
    size_rows = _rows(sizes, 2, len(box_rows), "sizes")
    stages = _stages(pre_sizes, len(box_rows))
    _check_boxes(box_rows, image, where)
    step = patch * merge
    for height, width in size_rows.tolist():
        require(
            height > 0 and width > 0 and height % step == 0 and width % step == 0,
            "a size does not fit the patches",
            where=where,
            got=(height, width),
            expected=f"height and width in multiples of {step}",
        )
    result: Tensor = _look_op(
        image, box_rows, size_rows, stages, list(mean), list(std), patch, merge, temporal
    )
    return result


def pixels(
    image: Tensor,
    box: Sequence[int],
    size: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    stages: Sequence[tuple[int, int]] = (),
    window: Sequence[int] | None = None,
    canvas: tuple[int, int] | None = None,
    bilinear: bool = False,
) -> Tensor:
    """Crop, resize, cut a window, normalise and zero-pad: one picture for an encoder.

    ``image`` and ``box`` as in :func:`look`; ``stages`` are NEAREST sizes (height, width) before
    the antialiased resize (bicubic, or bilinear) to ``size`` (height, width). ``window`` (left,
    top, right, bottom) is cut from the resized picture, all of it if not given; normalised values
    are padded with 0 on the right and at the bottom to ``canvas`` (height, width). Returns
    float32 [3, canvas height, canvas width].
    """
    where = "kernels.pixels"
    _check_image(image, where)
    kernel_name("pixels", image)
    _check_boxes(torch.tensor([list(box)]), image, where)
    require(
        all(side > 0 for pair in (*stages, size) for side in pair),
        "a size is empty",
        where=where,
        got=[*stages, size],
        expected="1 pixel or more",
    )
    left, top, right, bottom = window or (0, 0, size[1], size[0])
    require(
        0 <= left < right <= size[1] and 0 <= top < bottom <= size[0],
        "the window leaves the resized picture",
        where=where,
        got=(left, top, right, bottom),
        expected=f"within {size[1]} x {size[0]}",
    )
    high, wide = canvas or (bottom - top, right - left)
    require(
        high >= bottom - top and wide >= right - left,
        "the canvas is smaller than the picture",
        where=where,
        got=(high, wide),
        expected=f"at least {(bottom - top, right - left)}",
    )
    flat = [int(side) for pair in stages for side in pair]
    result: Tensor = _pixels_op(
        image,
        [int(v) for v in box],
        flat,
        list(size),
        [left, top, right, bottom],
        [high, wide],
        list(mean),
        list(std),
        bilinear,
    )
    return result
