"""The kernels against their limits: ``python benchmarks/kernel_limits.py [--device cuda]``.

``vpt-agent bench kernels`` compares each kernel with what it stands in for. Here *look* is measured
as it is used, from a picture to patches, in every mode and beside the processor of transformers
alone; and every kernel as a share of the memory's bandwidth: bytes that must be read and written
once, over the bytes a second that the machine reads. On a GPU the processor runs on that GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vpt_agent import kernels
from vpt_agent.bench.machine import describe, measure_rates, stamp, threads
from vpt_agent.bench.timing import Sample, in_turn, ratios, spreads, timer_for
from vpt_agent.types import Box, View
from vpt_agent.vision.patches import look
from vpt_agent.vision.policy import ImagePolicy

MODES = {
    "published, 640 x 480": (ImagePolicy(), (640, 480)),
    "published, 1920 x 1080": (ImagePolicy(), (1920, 1080)),
    "native, 640 x 480": (ImagePolicy(kind="native"), (640, 480)),
    "native, 1920 x 1080": (ImagePolicy(kind="native"), (1920, 1080)),
    "fit 448, 1920 x 1080": (ImagePolicy(kind="fit", longest=448), (1920, 1080)),
}
REGIONS, SIDE = 64, 1024
"""On a GPU: that many regions of a picture, each to about half its sides."""


def photo(size: tuple[int, int]) -> Image.Image:
    """Noise with large structures, as photographs have."""
    chance = np.random.default_rng(0)
    small = chance.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def look_modes(repeats: int) -> Iterable[dict[str, Any]]:
    """From a picture to patches on the CPU, beside the same through transformers' processor."""
    for name, (policy, size) in MODES.items():
        picture = photo(size)
        view = View("image_1", picture, "image_1", Box(0, 0, *size), size)
        plan = policy.plan(size)
        processor = Qwen2VLImageProcessorPil(
            do_resize=policy.kind != "fit",  # its own rule gives other sizes
            min_pixels=policy.min_pixels,
            max_pixels=policy.max_pixels,
        )

        def theirs(
            picture: Image.Image = picture, plan: Any = plan, run: Any = processor
        ) -> Tensor:
            for before in plan.pre_sizes:
                picture = picture.resize(before, Image.Resampling.NEAREST)
            if not run.do_resize:
                picture = picture.resize(plan.size, Image.Resampling.BICUBIC)
            made: Tensor = run([picture], return_tensors="pt")["pixel_values"]
            return made

        def ours(view: View = view, policy: ImagePolicy = policy) -> Tensor:
            return look([view], policy).pixel_values

        def resizing(picture: Image.Image = picture, plan: Any = plan) -> None:
            for before in plan.pre_sizes:
                picture = picture.resize(before, Image.Resampling.NEAREST)
            picture.resize(plan.size, Image.Resampling.BICUBIC)

        ways: dict[str, Callable[[], object]] = {
            "processor": theirs, "ours": ours, "Pillow's resizing alone": resizing
        }  # fmt: skip
        got = in_turn(ways, repeats=repeats)
        yield {
            "name": f"look, {name}",
            "same_bits": torch.equal(theirs(), ours()),
            "repeats_to_the_bit": torch.equal(ours(), ours()),
            **{way: spreads(samples) for way, samples in got.items()},
            "ratio": ratios(got["processor"], got["ours"]),
        }


def look_on_gpu(device: torch.device, repeats: int) -> tuple[Callable[[], object], int, Any]:
    """Many regions in one launch; bytes read and written once; the processor's way, if there."""
    image = torch.from_numpy(np.array(photo((2 * SIDE, 2 * SIDE)))).to(device)
    boxes = [(8 * i, 4 * i, 8 * i + SIDE, 4 * i + SIDE) for i in range(REGIONS)]
    policy = ImagePolicy(kind="native")
    side = SIDE // 2 // 28 * 28
    sizes = [(side, side)] * REGIONS

    def ours() -> Tensor:
        return kernels.look(image, boxes, sizes, mean=policy.mean, std=policy.std)

    moved = REGIONS * (SIDE * SIDE * 3 + side * side * 3 * 2 * 4)
    try:
        from transformers import Qwen2VLImageProcessor

        processor = Qwen2VLImageProcessor(min_pixels=side * side, max_pixels=side * side)
    except ImportError as error:  # without torchvision transformers has none for GPUs
        return ours, moved, f"not run: {error}"
    cut = [image[t:b, left:r].permute(2, 0, 1) for left, t, r, b in boxes]
    return ours, moved, lambda: processor(cut, return_tensors="pt", device=str(device))


def row_kernels(device: torch.device, dtype: torch.dtype) -> Iterable[tuple[str, Any, int]]:
    """*condition*, its gradient, *project*, *splice*, *place*: run, and bytes they must move."""
    torch.manual_seed(0)
    width, pictures, each = 1536, 8, 256
    rows = pictures * each
    features, grad = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    states = torch.randn(pictures, width, device=device).to(dtype) * 0.02
    segment = torch.arange(pictures, device=device).repeat_interleave(each)
    row = width * dtype.itemsize
    yield "condition", lambda: torch.ops.vpt.condition(features, states, segment), 2 * rows * row
    backward = torch.ops.vpt.condition_backward
    yield "condition, gradient", lambda: backward(grad, features, states, segment), 3 * rows * row
    scale, shift = states[0].contiguous(), states[1].contiguous()
    weight = torch.randn(width, width, device=device).to(dtype)
    yield (
        "project",
        lambda: torch.ops.vpt.project(states, scale, shift, weight, shift, 1e-5),
        width * row,
    )
    embeds = torch.randn(2, 2 * rows, width, device=device).to(dtype)
    index = torch.arange(rows, device=device) + 100
    moved = 2 * embeds.shape[0] * embeds.shape[1] * row
    yield "splice", lambda: torch.ops.vpt.splice(embeds, features, index), moved
    stretches = torch.tensor(
        [[0, 100 + each * i, each, each * i, 100, 16, 16] for i in range(pictures)], device=device
    )
    yield "place", lambda: torch.ops.vpt.place(embeds, features, stretches), moved


def share(
    name: str, samples: list[Sample], moved: int, device: torch.device, bandwidth: float
) -> dict[str, Any]:
    """A kernel's figures: seconds, bytes, and what share of the bandwidth that is."""
    times = spreads(samples)
    seconds = times[timer_for(device)]["median"]
    return {
        "name": name,
        "kernel": kernels.kernel_name(name.split(",")[0], torch.empty(0, device=device)),
        "ours": times,
        "bytes": moved,
        "share_of_bandwidth": moved / seconds / bandwidth,
    }


def measure(device: torch.device, repeats: int) -> dict[str, Any]:
    """All figures of one run, for JSON."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = measure_rates(dtype, device)
    found: list[dict[str, Any]] = []
    if device.type == "cuda":
        ours, moved, theirs = look_on_gpu(device, repeats)
        ways = {"ours": ours} | ({"processor": theirs} if callable(theirs) else {})
        got = in_turn(ways, repeats=repeats, device=device, warmup=3)
        figures = share("look", got["ours"], moved, device, rates.bytes_per_second)
        figures["name"] = f"look, {REGIONS} regions"
        if callable(theirs):
            figures["ratio"] = ratios(got["processor"], got["ours"])
        else:
            figures["processor"] = theirs
        found.append(figures)
    else:
        found += look_modes(repeats)
    for name, run, moved in row_kernels(device, dtype):
        samples = in_turn({"ours": run}, repeats=repeats, device=device, warmup=3)["ours"]
        found.append(share(name, samples, moved, device, rates.bytes_per_second))
    return {
        "what": "kernels against their limits",
        "when": stamp(),
        "machine": describe(device).to_dict(),
        "timer": timer_for(device),
        "rates": rates.to_dict(),
        "kernels": found,
        "aims": list(aims(found, timer_for(device), device)),
    }


def aims(found: list[dict[str, Any]], timer: str, device: torch.device) -> Iterable[dict[str, Any]]:
    """The issue's aims for *look*, each met or missed."""
    for row in (r for r in found if r["name"].startswith("look")):
        wanted = [("times faster than the processor", 5.0 if device.type == "cuda" else 2.0)]
        figures = {wanted[0][0]: row.get("ratio", {}).get(timer, {}).get("median")}
        if "share_of_bandwidth" in row:
            wanted.append(("share of bandwidth", 0.6))
            figures["share of bandwidth"] = row["share_of_bandwidth"]
        for what, least in wanted:
            figure = figures[what]
            met = None if figure is None else figure >= least
            yield {"aim": f"{row['name']}: {what}", "figure": figure, "wanted": least, "met": met}


def main() -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with threads(1):
        figures = measure(torch.device(given.device), given.repeats)
    timer = figures["timer"]
    for row in figures["kernels"]:
        line = f"{row['name']}: {row['ours'][timer]['median'] * 1e3:.2f} ms"
        if "ratio" in row:
            spread = row["ratio"][timer]
            line += f", {spread['median']:.2f} times faster than the processor"
            line += f" ({spread['low']:.2f} to {spread['high']:.2f})"
        if "same_bits" in row:
            alone = row["Pillow's resizing alone"][timer]["median"] * 1e3
            line += f"; Pillow's resizing alone {alone:.2f} ms; same bits: {row['same_bits']}"
        if "share_of_bandwidth" in row:
            line += f" [{row['kernel']}], {row['share_of_bandwidth']:.0%} of the bandwidth"
        print(line)
    for aim in figures["aims"]:
        said = {True: "met", False: "missed", None: "not measured"}[aim["met"]]
        figure = "-" if aim["figure"] is None else f"{aim['figure']:.2f}"
        print(f"{said}: {aim['aim']}: {figure} (aim {aim['wanted']})")
    if given.out:
        given.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
