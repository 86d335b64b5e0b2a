"""One query a row over the slots of a cache that the row may see: ``vpt::attend``.

Decoding asks this of every layer for every token. The plain version copies the slots together and
lets torch's attention read them; a kernel of the device reads them where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vpt_agent.kernels.registry import define, one_device, require


def _attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, lengths: Tensor) -> Tensor:
    rows, heads, _, width = queries.shape
    index = seen.reshape(-1)
    k, v = (
        store.index_select(0, index).view(rows, -1, heads, width).transpose(1, 2)
        for store in (keys, values)
    )  # [R, K, S, d]
    places = torch.arange(seen.shape[1], device=seen.device)
    mask = (places < lengths[:, None])[:, None, None]  # [R, 1, 1, S]
    return functional.scaled_dot_product_attention(queries, k, v, attn_mask=mask).contiguous()


def _attend_fake(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, lengths: Tensor
) -> Tensor:
    return torch.empty_like(queries, memory_format=torch.contiguous_format)


_op = define("attend", _attend, _attend_fake)


def attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, lengths: Tensor) -> Tensor:
    """Attention of ``queries`` [R, K, G, d] (G heads share each of K key heads) over a cache.

    ``keys`` and ``values`` [slots, K * d] are a layer's, in the dtype of ``queries``; row r sees
    the slots ``seen[r, :lengths[r]]``: ``seen`` [R, S] and ``lengths`` [R] int64, each length from
    1 to S. Returns [R, K, G, d]. Values of ``seen`` and ``lengths`` are not looked at; wrong
    shapes, dtypes and devices are a :class:`UserError`.
    """
    where = "kernels.attend"
    rows, heads, _, width = queries.shape if queries.dim() == 4 else (0, 0, 0, 0)
    require(
        rows > 0 and keys.dim() == 2 and keys.shape[1] == heads * width
        and keys.shape == values.shape,
        "keys and values do not fit the queries",
        where=where,
        got=f"{tuple(queries.shape)}, {tuple(keys.shape)} and {tuple(values.shape)}",
        expected="[R, K, G, d], and [slots, K * d] twice",
    )  # fmt: skip
    require(
        seen.dim() == 2 and seen.shape[0] == rows and tuple(lengths.shape) == (rows,)
        and seen.dtype == lengths.dtype == torch.int64,
        "each row needs the slots that it sees",
        where=where,
        got=f"{seen.dtype} {tuple(seen.shape)} and {lengths.dtype} {tuple(lengths.shape)}",
        expected=f"torch.int64 ({rows}, S) and torch.int64 ({rows},)",
    )  # fmt: skip
    require(
        queries.dtype == keys.dtype == values.dtype,
        "queries, keys and values are of different types",
        where=where,
        got=f"{queries.dtype}, {keys.dtype}, {values.dtype}",
        expected="one dtype",
    )
    one_device(where, queries, keys, values, seen, lengths)
    result: Tensor = _op(queries, keys, values, seen, lengths)
    return result
