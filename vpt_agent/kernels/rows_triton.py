"""``vpt::condition``, ``vpt::project``, ``vpt::splice`` and ``vpt::place`` in Triton.

Sums are made in float32 (float64 for float64), in an order that depends on the shapes only, and
nothing is added atomically: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # values of a row at a time where a row is copied


def _acc(*tensors: Tensor) -> Any:
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def _whole(width: int) -> dict[str, int]:
    """How a program holds a whole row of ``width`` values."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


@triton.jit
def _condition_kernel(
    features, condition, segment, out, width, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    on = at < width
    f = tl.load(features + row * width + at, mask=on, other=0.0).to(ACC)
    c = tl.load(condition + tl.load(segment + row) * width + at, mask=on, other=0.0).to(ACC)
    weight = tl.sum(f * c, axis=0)
    tl.store(out + row * width + at, f + weight * c, mask=on)


@triton.jit
def _to_features_kernel(
    grad,
    features,
    condition,
    segment,
    out,
    dots,
    width,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    on = at < width
    g = tl.load(grad + row * width + at, mask=on, other=0.0).to(ACC)
    f = tl.load(features + row * width + at, mask=on, other=0.0).to(ACC)
    c = tl.load(condition + tl.load(segment + row) * width + at, mask=on, other=0.0).to(ACC)
    g_c, f_c = tl.sum(g * c, axis=0), tl.sum(f * c, axis=0)
    tl.store(out + row * width + at, g + g_c * c, mask=on)
    tl.store(dots + row * 2, g_c)
    tl.store(dots + row * 2 + 1, f_c)


@triton.jit
def _to_condition_kernel(
    grad,
    features,
    order,
    bounds,
    dots,
    out,
    width,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on = at < width
    total = tl.zeros((BLOCK,), ACC)
    i, end = tl.load(bounds + which), tl.load(bounds + which + 1)
    while i < end:
        row = tl.load(order + i)
        g = tl.load(grad + row * width + at, mask=on, other=0.0).to(ACC)
        f = tl.load(features + row * width + at, mask=on, other=0.0).to(ACC)
        total += tl.load(dots + row * 2) * f + tl.load(dots + row * 2 + 1) * g
        i += 1
    tl.store(out + which * width + at, total, mask=on)


@triton.jit
def _project_kernel(
    control,
    norm_weight,
    norm_bias,
    weight,
    bias,
    out,
    width,
    outputs,
    eps,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    here, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BLOCK)
    on = at < width
    x = tl.load(control + row * width + at, mask=on, other=0.0).to(ACC)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(on, x - mean, 0.0)
    spread = tl.sum(centred * centred, axis=0) / width
    scale = tl.load(norm_weight + at, mask=on, other=0.0).to(ACC)
    shift = tl.load(norm_bias + at, mask=on, other=0.0).to(ACC)
    normed = centred / tl.sqrt(spread + eps) * scale + shift
    w = tl.load(weight + here * width + at, mask=on, other=0.0).to(ACC)
    total = tl.sum(normed * w, axis=0) + tl.load(bias + here).to(ACC)
    tl.store(out + row * outputs + here, total)


@triton.jit
def _splice_kernel(features, index, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on = at < width
    values = tl.load(features + row * width + at, mask=on, other=0.0)
    tl.store(out + tl.load(index + row) * width + at, values, mask=on)


@triton.jit
def _place_kernel(
    embeds,
    features,
    stretches,
    out,
    positions,
    count,
    length,
    tokens,
    width,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    feature, number = token * 0 - 1, token * 0
    start, wide, inside = number, number, number
    k = 0
    while k < count:  # few: a picture or a text between two
        at = stretches + k * FIELDS
        first = tl.load(at) * length + tl.load(at + 1)
        here = (token >= first) & (token < first + tl.load(at + 2))
        inside = tl.where(here, 1, inside)
        number = tl.where(here, token - first, number)
        feature = tl.where(here, tl.load(at + 3), feature)
        start = tl.where(here, tl.load(at + 4), start)
        wide = tl.where(here, tl.load(at + 6), wide)
        k += 1
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    on = at < width
    shown = feature >= 0
    old = tl.load(embeds + token * width + at, mask=on & (feature < 0), other=0.0)
    row = tl.where(shown, feature + number, 0)
    new = tl.load(features + row * width + at, mask=on & shown, other=0.0)
    tl.store(out + token * width + at, tl.where(shown, new.to(old.dtype), old), mask=on)
    if tl.program_id(1) == 0:
        across = tl.maximum(wide, 1)
        flat = (start + number) * inside
        spread = wide > 0
        tl.store(positions + token, tl.where(spread, start, flat))
        tl.store(positions + tokens + token, tl.where(spread, start + number // across, flat))
        tl.store(positions + 2 * tokens + token, tl.where(spread, start + number % across, flat))


def _run(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    if min(grid) > 0:  # an empty grid is an error to CUDA, and nothing to do
        kernel[grid](*args, **options)


def condition_triton(features: Tensor, condition: Tensor, segment: Tensor) -> Tensor:
    """As the plain version of ``vpt::condition``."""
    features, condition = features.contiguous(), condition.contiguous()
    out = torch.empty_like(features)
    rows, width = features.shape
    acc = _acc(features, condition)
    _run(_condition_kernel, (rows,), features, condition, segment.contiguous(), out, width,
         ACC=acc, **_whole(width))  # fmt: skip
    return out


def condition_backward_triton(
    grad: Tensor, features: Tensor, condition: Tensor, segment: Tensor
) -> tuple[Tensor, Tensor]:
    """As the plain version of ``vpt::condition_backward``; the rows of a condition in order."""
    grad, features, condition = (t.contiguous() for t in (grad, features, condition))
    rows, width = features.shape
    acc = _acc(features, condition)
    to_features, to_condition = torch.empty_like(features), torch.empty_like(condition)
    dtype = torch.float64 if acc is tl.float64 else torch.float32
    dots = torch.empty(rows, 2, dtype=dtype, device=grad.device)
    _run(_to_features_kernel, (rows,), grad, features, condition, segment.contiguous(),
         to_features, dots, width, ACC=acc, **_whole(width))  # fmt: skip
    ordered, order = segment.sort(stable=True)
    edges = torch.arange(len(condition) + 1, device=segment.device)
    bounds = torch.searchsorted(ordered, edges)  # where each condition's rows begin
    block = min(256, triton.next_power_of_2(width))
    _run(_to_condition_kernel, (len(condition), triton.cdiv(width, block)), grad, features, order,
         bounds, dots, to_condition, width, ACC=acc, BLOCK=block)  # fmt: skip
    return to_features, to_condition


def project_triton(
    control: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    """As the plain version of ``vpt::project``."""
    control, weight = control.contiguous(), weight.contiguous()
    rows, width = control.shape
    out = control.new_empty(rows, len(weight))
    _run(_project_kernel, (len(weight), rows), control, norm_weight.contiguous(),
         norm_bias.contiguous(), weight, bias.contiguous(), out, width, len(weight), eps,
         ACC=_acc(control), **_whole(width))  # fmt: skip
    return out


def splice_triton(embeds: Tensor, features: Tensor, index: Tensor) -> Tensor:
    """As the plain version of ``vpt::splice``."""
    out = embeds.clone(memory_format=torch.contiguous_format)
    rows, width = features.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    _run(_splice_kernel, (rows, triton.cdiv(width, block)), features.contiguous(),
         index.contiguous(), out, width, BLOCK=block)  # fmt: skip
    return out


def place_triton(embeds: Tensor, features: Tensor, stretches: Tensor) -> tuple[Tensor, Tensor]:
    """As the plain version of ``vpt::place``, in one launch."""
    rows, length, width = embeds.shape
    out = torch.empty_like(embeds, memory_format=torch.contiguous_format)
    positions = stretches.new_empty(3, rows, length)
    block = min(BLOCK, triton.next_power_of_2(width))
    _run(_place_kernel, (rows * length, triton.cdiv(width, block)), embeds.contiguous(),
         features.contiguous(), stretches.contiguous(), out, positions, len(stretches), length,
         rows * length, width, FIELDS=stretches.shape[1], BLOCK=block)  # fmt: skip
    return out, positions
