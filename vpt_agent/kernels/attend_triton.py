"""``vpt::attend`` in Triton: a cache's slots are read where they lie, those that a row sees only.

A row and a key head are worked on by several programs, each over a span of slots, so that one row
alone keeps a GPU busy; a second kernel puts their shares together. Sums are in float32 and in an
order that the shapes fix: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32
"""Slots at a time."""
SPANS = (64, 256)
"""Slots of a program: where there are few programs, and where there are many."""
MANY = 1024


@triton.jit
def _attend_kernel(
    queries, keys, values, seen, lengths, tops, sums, slots, parts, heads, scale,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
    SPAN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row).to(tl.int32)
    g, c, t = tl.arange(0, GROUPS), tl.arange(0, WIDE), tl.arange(0, TILE)
    own = (row * heads + head) * GROUP
    kept = (g < GROUP)[:, None] & (c < WIDTH)[None, :]
    q = tl.load(queries + (own + g)[:, None] * WIDTH + c[None, :], mask=kept, other=0.0)
    best = tl.full([GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    mixed = tl.zeros([GROUPS, WIDE], tl.float32)
    for start in range(part * SPAN, tl.minimum((part + 1) * SPAN, length), TILE):
        on = start + t < length
        slot = tl.load(seen + row * slots + start + t, mask=on, other=0)
        place = slot[:, None] * (heads * WIDTH) + head * WIDTH + c[None, :]
        there = on[:, None] & (c < WIDTH)[None, :]
        k = tl.load(keys + place, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(on[None, :], scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, axis=1))
        weight = tl.exp(scores - top[:, None])
        shrink = tl.exp(best - top)
        total = total * shrink + tl.sum(weight, axis=1)
        v = tl.load(values + place, mask=there, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        best = top
    at = (own * parts + part * GROUP) + g
    tl.store(tops + at * 2, best, mask=g < GROUP)
    tl.store(tops + at * 2 + 1, total, mask=g < GROUP)
    tl.store(sums + at[:, None] * WIDTH + c[None, :], mixed, mask=kept)


@triton.jit
def _join_kernel(
    tops, sums, out, parts,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)  # a row and a head
    g, c = tl.arange(0, GROUPS), tl.arange(0, WIDE)
    kept = (g < GROUP)[:, None] & (c < WIDTH)[None, :]
    best = tl.full([GROUPS], float("-inf"), tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    mixed = tl.zeros([GROUPS, WIDE], tl.float32)
    for part in range(parts):
        at = (pair * parts + part) * GROUP + g
        # The first part always has a slot; later ones may have none: -inf and 0.
        own = tl.load(tops + at * 2, mask=g < GROUP, other=0.0)
        count = tl.load(tops + at * 2 + 1, mask=g < GROUP, other=0.0)
        share = tl.load(sums + at[:, None] * WIDTH + c[None, :], mask=kept, other=0.0)
        top = tl.maximum(best, own)
        shrink, grow = tl.exp(best - top), tl.exp(own - top)
        total = total * shrink + count * grow
        mixed = mixed * shrink[:, None] + share * grow[:, None]
        best = top
    answer = mixed / tl.maximum(total, 1e-30)[:, None]
    place = (pair * GROUP + g)[:, None] * WIDTH + c[None, :]
    tl.store(out + place, answer, mask=kept)


def attend_triton(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, lengths: Tensor
) -> Tensor:
    """See :func:`vpt_agent.kernels.attend`."""
    queries, seen, lengths = queries.contiguous(), seen.contiguous(), lengths.contiguous()
    rows, heads, group, width = queries.shape
    slots = seen.shape[1]
    span = SPANS[rows * heads * -(-slots // SPANS[0]) > MANY]
    parts = -(-slots // span)
    shape = {
        "GROUP": group,
        "GROUPS": max(16, triton.next_power_of_2(group)),
        "WIDTH": width,
        "WIDE": max(16, triton.next_power_of_2(width)),
    }
    tops = torch.empty(rows, heads, parts, group, 2, dtype=torch.float32, device=queries.device)
    sums = torch.empty(rows, heads, parts, group, width, dtype=torch.float32, device=queries.device)
    out = torch.empty_like(queries)
    _attend_kernel[(rows, heads, parts)](
        queries, keys, values, seen, lengths, tops, sums, slots, parts, heads, width**-0.5,
        SPAN=span, TILE=TILE, num_warps=4, **shape,
    )  # fmt: skip
    _join_kernel[(rows * heads,)](tops, sums, out, parts, num_warps=4, **shape)
    return out
