"""Views to the input of the base vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vpt_agent import kernels
from vpt_agent.types import View
from vpt_agent.vision.policy import ImagePolicy


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


def look(views: Sequence[View], policy: ImagePolicy) -> Patches:
    """Resize, normalise and cut ``views`` as ``policy`` says; a view with a parent is a crop."""
    width = 3 * policy.temporal * policy.patch**2
    parts = [torch.zeros(0, width)]
    grids: list[tuple[int, int, int]] = []
    tokens: list[int] = []
    names: dict[str, None] = {}
    for view in views:
        plan = policy.plan(view.size, crop=view.parent is not None)
        image = pixels_of(view)  # [H, W, 3]
        # Plans hold (width, height), kernels take (height, width).
        before = [[(h, w) for w, h in plan.pre_sizes]] if plan.pre_sizes else None
        patches = kernels.look(
            image,
            [(0, 0, *view.size)],
            [plan.size[::-1]],
            before,
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
    return Patches(torch.cat(parts), grid_thw, tuple(tokens), tuple(names))
