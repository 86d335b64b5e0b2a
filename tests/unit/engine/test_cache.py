"""The pooled cache: rows, growth, budget, and what attention gets to see."""

from __future__ import annotations

import pytest
import torch

from vpt_agent.engine.cache import KVShape, PooledCache
from vpt_agent.errors import InternalError, UserError

SHAPE = KVShape(2, 2, 4, torch.float32, torch.device("cpu"))


def block(rows: int, length: int, value: float) -> torch.Tensor:
    return torch.full((rows, 2, length, 4), value)


def write(cache: PooledCache, rows: list[int], counts: list[int], value: float) -> torch.Tensor:
    cache.begin(rows, counts)
    new = block(len(rows), max(counts), value)
    seen = [cache.update(new, new, layer)[0] for layer in range(2)]
    cache.commit(rows, counts)
    return seen[0]


def test_rows_are_written_each_at_its_own_index() -> None:
    cache = PooledCache(SHAPE)
    rows = [cache.allocate() for _ in range(3)]
    write(cache, rows, [2, 5, 1], 1.0)
    seen = write(cache, rows, [1, 1, 3], 2.0)
    assert cache.lengths[:3] == [3, 6, 4]
    first = seen[:, 0, :, 0]
    assert first[0, :3].tolist() == [1, 1, 2]
    assert first[1, :6].tolist() == [1, 1, 1, 1, 1, 2]
    assert first[2, :4].tolist() == [1, 2, 2, 2]


def test_rows_that_are_no_neighbours_are_gathered() -> None:
    cache = PooledCache(SHAPE)
    rows = [cache.allocate() for _ in range(3)]
    write(cache, rows, [1, 2, 3], 1.0)
    seen = write(cache, [rows[2], rows[0]], [1, 2], 5.0)
    assert seen[0, 0, :4, 0].tolist() == [1, 1, 1, 5]
    assert seen[1, 0, :3, 0].tolist() == [1, 5, 5]
    assert cache.lengths[:3] == [3, 2, 4]


def test_the_mask_is_causal_over_each_rows_own_past() -> None:
    cache = PooledCache(SHAPE)
    rows = [cache.allocate() for _ in range(2)]
    write(cache, rows, [3, 1], 1.0)
    mask = cache.begin(rows, [2, 1])
    assert mask is not None
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    # The padded second query of row 1 sees that row's tokens, not nothing.
    assert mask[1, 0].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]


def test_no_mask_where_none_is_needed() -> None:
    cache = PooledCache(SHAPE)
    row = cache.allocate()
    assert cache.begin([row], [4]) is None
    cache.commit([row], [4])
    assert cache.begin([row], [1]) is None
    cache.commit([row], [1])
    assert cache.begin([row], [2]) is not None


def test_growth_keeps_what_is_there_and_a_free_row_is_used_again() -> None:
    cache = PooledCache(SHAPE)
    row = cache.allocate()
    write(cache, [row], [200], 3.0)
    write(cache, [row], [400], 4.0)
    other = cache.allocate()
    assert cache.keys[0][row, 0, :600, 0].sum() == 200 * 3 + 400 * 4
    cache.release(row)
    assert cache.allocate() == row
    assert cache.lengths[row] == 0
    assert other != row


def test_the_budget_is_a_clear_refusal() -> None:
    cache = PooledCache(SHAPE, max_tokens=64)
    row = cache.allocate()
    write(cache, [row], [40], 1.0)
    with pytest.raises(UserError, match="the KV cache budget is used up"):
        cache.begin([row], [30])
    with pytest.raises(UserError, match="the KV cache budget is used up"):
        cache.allocate()
    assert cache.lengths[row] == 40


def test_misuse_is_named() -> None:
    cache = PooledCache(SHAPE)
    row = cache.allocate()
    with pytest.raises(InternalError, match="outside begin/commit"):
        cache.update(block(1, 1, 0.0), block(1, 1, 0.0), 0)
    with pytest.raises(UserError, match="cannot truncate a session to a length it never had"):
        cache.truncate(row, 5)
