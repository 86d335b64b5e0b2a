"""The library's operators beside what they stand in for, in turn, on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vpt_agent import kernels
from vpt_agent.bench.machine import describe, stamp, threads
from vpt_agent.bench.timing import in_turn, ratios, spreads, timer_for
from vpt_agent.vision.policy import PUBLISHED_POLICY, ImagePolicy

LOOK_AIM = {"cpu": 2.0, "cuda": 5.0}
"""Aims for ``look`` beside the processor's path, by device."""

SIZE, REGIONS = (1280, 960), 4


def bench_kernels(
    *,
    device: torch.device,
    repeats: int = 9,
    count: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Times of each operator and of its baseline, and their ratios; ``count`` threads."""
    with threads(count):
        machine, timer = describe(device), timer_for(device)
        found: list[dict[str, Any]] = []
        for name, baseline, slow, fast, kernel in _pairs(device):
            tell(name)
            got = in_turn({"baseline": slow, "ours": fast}, repeats=repeats, device=device)
            found.append(
                {
                    "name": name,
                    "kernel": kernel,
                    "against": baseline,
                    "baseline": spreads(got["baseline"]),
                    "ours": spreads(got["ours"]),
                    "ratio": ratios(got["baseline"], got["ours"]),
                }
            )
    wanted = LOOK_AIM.get(device.type, LOOK_AIM["cpu"])
    looks = [row for row in found if row["name"].startswith("look")]
    return {
        "what": "kernels",
        "when": stamp(),
        "machine": machine.to_dict(),
        "timer": timer,
        "kernels": found,
        "aims": [
            {
                "aim": f"{row['name']}: times faster than {row['against']}",
                "figure": row["ratio"][timer]["median"],
                "wanted": wanted,
                "at_least": True,
                "met": row["ratio"][timer]["median"] >= wanted,
            }
            for row in looks
        ],
    }


_Pair = tuple[str, str, Callable[[], object], Callable[[], object], str]


def _pairs(device: torch.device) -> list[_Pair]:
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    own = ImagePolicy(kind="fit", longest=448)
    return [
        _look(pixels, own, device, "look: one resize to 448"),
        _look(pixels, PUBLISHED_POLICY, device, "look: published, NEAREST to 512 first"),
        _condition(device),
        _splice(device),
    ]


def _look(
    pixels: np.ndarray[Any, Any], policy: ImagePolicy, device: torch.device, name: str
) -> _Pair:
    """``REGIONS`` regions of one picture, to patches; the baseline crops, resizes (NEAREST first,
    where the policy does) and hands over to transformers' image processor."""
    height, width = pixels.shape[:2]
    boxes = [(i * 32, i * 24, width - i * 32, height - i * 24) for i in range(REGIONS)]
    plans = [policy.plan((b[2] - b[0], b[3] - b[1])) for b in boxes]
    # Plans hold (width, height), kernels take (height, width).
    sizes = [plan.size[::-1] for plan in plans]
    before = [[(h, w) for w, h in plan.pre_sizes] for plan in plans]
    image = torch.from_numpy(pixels).to(device)
    processor = Qwen2VLImageProcessorPil(
        min_pixels=policy.min_pixels,
        max_pixels=policy.max_pixels,
        image_mean=list(policy.mean),
        image_std=list(policy.std),
    )
    picture = Image.fromarray(pixels)

    def theirs() -> Tensor:
        cut = [picture.crop(box) for box in boxes]
        for i, plan in enumerate(plans):
            for size in plan.pre_sizes:
                cut[i] = cut[i].resize(size, Image.Resampling.NEAREST)
            if not plan.pre_sizes:
                cut[i] = cut[i].resize(plan.size, Image.Resampling.BICUBIC)
        made: Tensor = processor(images=cut, return_tensors="pt")["pixel_values"]
        return made.to(device)

    stages = before if any(before) else None

    def ours() -> Tensor:
        return kernels.look(
            image,
            boxes,
            sizes,
            stages,
            mean=policy.mean,
            std=policy.std,
            patch=policy.patch,
            merge=policy.merge,
            temporal=policy.temporal,
        )

    kernel = kernels.kernel_name("look", image)
    return name, "Pillow and transformers' processor", theirs, ours, kernel


def _condition(device: torch.device) -> _Pair:
    """Eight pictures of 256 visual tokens, each on its own state; the baseline goes one by one."""
    torch.manual_seed(0)
    features = torch.randn(8, 256, 1536, device=device)
    states = torch.randn(8, 1536, device=device)
    flat = features.flatten(0, 1)
    segment = torch.arange(8, device=device).repeat_interleave(256)

    def theirs() -> list[Tensor]:
        return [f + (f @ c[:, None]) * c for f, c in zip(features, states, strict=True)]

    def ours() -> Tensor:
        return kernels.condition(flat, states, segment)

    name = kernels.kernel_name("condition", flat)
    return "condition: 8 pictures", "one product a picture", theirs, ours, name


def _splice(device: torch.device) -> _Pair:
    """1024 visual tokens into two rows of 1024; the baseline fills a mask."""
    torch.manual_seed(0)
    embeds = torch.randn(2, 1024, 1536, device=device)
    features = torch.randn(1024, 1536, device=device)
    index = torch.arange(0, 2048, 2, device=device)
    ids = torch.zeros(2048, dtype=torch.bool, device=device)
    ids[index] = True
    mask = ids.view(2, 1024)

    def theirs() -> Tensor:
        return embeds.masked_scatter(mask[..., None], features)

    def ours() -> Tensor:
        return kernels.splice(embeds, features, index)

    name = kernels.kernel_name("splice", embeds)
    return "splice: 1024 visual tokens", "a mask over the sequence", theirs, ours, name
