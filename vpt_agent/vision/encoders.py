"""Views to the inputs of the re-encoding towers DINOv2 and SAM, without torchvision."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from PIL import Image

from vpt_agent import kernels
from vpt_agent.tokens.table import PerceptionKind
from vpt_agent.types import View
from vpt_agent.vision.patches import reduced
from vpt_agent.vision.policy import ImagePolicy, Size, limit_aspect, published_stages

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

DINO_LONGEST = 512  # published: the NEAREST stage before DINO; before SAM it is SAM's own size


def _stages(size: Size, policy: ImagePolicy | None, longest: int) -> tuple[Size, ...]:
    if policy is not None and policy.kind == "published":
        return published_stages(size, longest)
    limited = limit_aspect(size)  # or a line of pixels would become gigabytes
    return () if limited == size else (limited,)


def dino_pixels(
    view: View, policy: ImagePolicy | None = None, *, size: int = 224, shortest: int | None = None
) -> torch.Tensor:
    """DINOv2's input, float32 [3, size, size], as the processor of dinov2-base makes it.

    The shortest side becomes ``shortest`` (256 for 224, and in that proportion) by bicubic, the
    centre is cut out, ImageNet mean and std. The ``published`` policy has the longest side at most
    512 by NEAREST first. What lies outside the centre square is not seen.
    """
    shortest = shortest or size * 256 // 224
    stages = _stages(view.size, policy, DINO_LONGEST)
    width, height = stages[-1] if stages else view.size
    if width <= height:
        width, height = shortest, int(shortest * height / width)
    else:
        width, height = int(shortest * width / height), shortest
    left, top = (width - size) // 2, (height - size) // 2
    image, still = reduced(view, stages, (width, height))
    return kernels.pixels(
        image,
        (0, 0, image.shape[1], image.shape[0]),
        (height, width),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        stages=still,
        window=(left, top, left + size, top + size),
    )


def sam_pixels(view: View, policy: ImagePolicy | None = None, *, size: int = 1024) -> torch.Tensor:
    """SAM's input, float32 [3, size, size], as SAM's processor makes it.

    The longest side becomes ``size`` by bilinear, ImageNet mean and std, then zeros on the right
    and at the bottom. The ``published`` policy has the longest side at most ``size`` by NEAREST
    first.
    """
    stages = _stages(view.size, policy, size)
    before = stages[-1] if stages else view.size
    scale = size / max(before)
    width, height = (max(1, int(side * scale + 0.5)) for side in before)
    image, still = reduced(view, stages, (width, height), Image.Resampling.BILINEAR)
    return kernels.pixels(
        image,
        (0, 0, image.shape[1], image.shape[0]),
        (height, width),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        stages=still,
        canvas=(size, size),
        bilinear=True,
    )


ENCODER_PIXELS: Mapping[str, Callable[..., torch.Tensor]] = {
    "dino": dino_pixels,
    "sam": sam_pixels,
}
"""Input of each encoder besides the base tower, by the name that a kind's row gives it."""


def encoder_pixels(kind: PerceptionKind, view: View, policy: ImagePolicy) -> torch.Tensor:
    """The input [3, size, size] of a re-encoding kind's own encoder, float32.

    The size is the row's. Only the ``published`` policy resizes the picture beforehand.
    """
    made = policy if policy.kind == "published" else None
    make = ENCODER_PIXELS[kind.encoder]
    if kind.input_size is None:
        return make(view, made)
    return make(view, made, size=kind.input_size)
