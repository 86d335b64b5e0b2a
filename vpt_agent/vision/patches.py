"""Views to the input of the base vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from vpt_agent import kernels
from vpt_agent.types import View
from vpt_agent.vision.policy import ImagePolicy, Size


@dataclass(frozen=True)
class Patches:
    """Input of the base tower for N pictures, one after the other.

    ``pixel_values`` float32 [P, 3 * temporal * patch^2], ``grid_thw`` int64 [N, 3] patches in time,
    height and width, ``visual_tokens`` what each becomes in the language model. ``kernels`` names
    what ran.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    visual_tokens: tuple[int, ...]
    kernels: tuple[str, ...]


def pixels_of(view: View) -> torch.Tensor:
    """The view's picture, uint8 [H, W, 3], a copy on the CPU."""
    return torch.from_numpy(np.array(view.image, dtype=np.uint8))


def reduced(
    view: View,
    stages: Sequence[Size],
    size: Size,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """The view's picture, uint8 [H, W, 3], and the NEAREST stages (height, width) still to do.

    For kernels on the CPU: of a resize (``stages``, then ``size``, all (width, height)) what makes
    the picture smaller, and the last step if it comes to that, is done here, where the picture need
    not be copied first. The kernels resize to the same bits. What is done is stored in planes line
    by line (strides 3 W, 1, W), as they read it.
    """
    image, left = view.image, list(stages)
    while left and _area(left[0]) < _area(image.size):
        image = image.resize(left.pop(0), Image.Resampling.NEAREST)
    if left:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels, [(height, width) for width, height in left]
    lines = bytearray(image.resize(size, resample).tobytes("raw", "RGB;L"))
    return torch.frombuffer(lines, dtype=torch.uint8).view(size[1], 3, size[0]).mT, []


def _area(size: Size) -> int:
    return size[0] * size[1]


def look(
    views: Sequence[View], policy: ImagePolicy, *, device: torch.device | None = None
) -> Patches:
    """Resize, normalise and cut ``views`` as ``policy`` says; a view with a parent is a crop.

    With another ``device`` than the CPU the pictures go there as they are, 8 bits a value, and its
    kernel does the rest; a device without one is a :class:`UserError`.
    """
    width = 3 * policy.temporal * policy.patch**2
    parts: list[torch.Tensor] = []
    grids: list[tuple[int, int, int]] = []
    tokens: list[int] = []
    names: dict[str, None] = {}
    for view in views:
        plan = policy.plan(view.size, crop=view.parent is not None)
        # Plans hold (width, height), kernels take (height, width).
        if device is None or device.type == "cpu":
            image, before = reduced(view, plan.pre_sizes, plan.size)  # [H, W, 3]
        else:
            image, before = pixels_of(view).to(device), [(h, w) for w, h in plan.pre_sizes]
        patches = kernels.look(
            image,
            [(0, 0, image.shape[1], image.shape[0])],
            [plan.size[::-1]],
            [before] if before else None,
            mean=policy.mean,
            std=policy.std,
            patch=policy.patch,
            merge=policy.merge,
            temporal=policy.temporal,
        )  # [grid_h * grid_w, width]
        parts.append(patches)
        grids.append(plan.grid_thw)
        tokens.append(plan.visual_tokens)
        names[kernels.kernel_name("look", image)] = None
    grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    parts = parts or [torch.zeros(0, width)]
    pixels = parts[0] if len(parts) == 1 else torch.cat(parts)
    return Patches(pixels, grid_thw, tuple(tokens), tuple(names))
