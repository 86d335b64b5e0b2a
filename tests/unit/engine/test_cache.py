"""The paged cache: rows, blocks, growth, budget, shared beginnings, and what attention sees."""

from __future__ import annotations

import pytest
import torch

from vpt_agent.engine.blocks import Beginning, Blocks, TokenKey, beginning_of
from vpt_agent.engine.cache import KVShape, PooledCache
from vpt_agent.engine.parts import Block
from vpt_agent.errors import InternalError, UserError

SHAPE = KVShape(2, 2, 4, torch.float32, torch.device("cpu"))


def small(**options: int | None) -> PooledCache:
    return PooledCache(SHAPE, block=4, **options)  # type: ignore[arg-type]


def block(rows: int, length: int, value: float) -> torch.Tensor:
    """Tokens that say their value, head and place: [rows, 2, length, 4]."""
    base = torch.full((rows, 2, length, 4), value)
    return base + torch.arange(length)[:, None] / 100 + torch.arange(2)[:, None, None] / 10


def write(cache: PooledCache, rows: list[int], counts: list[int], value: float) -> torch.Tensor:
    cache.begin(rows, counts)
    new = block(len(rows), max(counts), value)
    seen = [cache.update(new, -new, layer) for layer in range(2)]
    cache.commit(rows, counts)
    for keys, values in seen:
        assert torch.equal(keys, -values)
    return seen[0][0]


def held(cache: PooledCache, row: int, layer: int = 1) -> list[float]:
    """What the first head of ``row`` holds, by slot."""
    b = cache.block
    slots = [cache.tables[row][i // b] * b + i % b for i in range(cache.lengths[row])]
    return [round(float(v), 2) for v in cache.keys[layer][slots, 0]]


@pytest.mark.parametrize("size", [1, 4, 16])
def test_rows_are_written_each_at_its_own_index(size: int) -> None:
    cache = PooledCache(SHAPE, block=size)
    rows = [cache.allocate() for _ in range(3)]
    write(cache, rows, [2, 5, 1], 1.0)
    seen = write(cache, rows, [1, 1, 3], 2.0)
    assert cache.lengths[:3] == [3, 6, 4]
    first = seen[:, 0, :, 0]
    torch.testing.assert_close(first[0, :3], torch.tensor([1.0, 1.01, 2.0]))
    torch.testing.assert_close(first[1, :6], torch.tensor([1.0, 1.01, 1.02, 1.03, 1.04, 2.0]))
    torch.testing.assert_close(first[2, :4], torch.tensor([1.0, 2.0, 2.01, 2.02]))
    torch.testing.assert_close(seen[:, 1], seen[:, 0] + 0.1)
    assert held(cache, rows[2]) == [1.0, 2.0, 2.01, 2.02]


def test_rows_in_any_order_and_behind_their_end_nothing_of_others() -> None:
    cache = small()
    rows = [cache.allocate() for _ in range(3)]
    write(cache, rows, [1, 2, 3], 1.0)
    cache.keys[0][cache.tables[rows[1]][0] * 4 :][:4] = float("nan")  # a row that went wrong
    seen = write(cache, [rows[2], rows[0]], [1, 2], 5.0)
    torch.testing.assert_close(seen[0, 0, :4, 0], torch.tensor([1.0, 1.01, 1.02, 5.0]))
    torch.testing.assert_close(seen[1, 0, :3, 0], torch.tensor([1.0, 5.0, 5.01]))
    assert cache.lengths[:3] == [3, 2, 4]
    assert bool(seen.isfinite().all()), "masked places hold a row's own numbers"


def test_the_mask_is_causal_over_each_rows_own_past() -> None:
    cache = small()
    rows = [cache.allocate() for _ in range(2)]
    write(cache, rows, [3, 1], 1.0)
    mask = cache.begin(rows, [2, 1])
    assert mask is not None
    assert mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    # The padded second query of row 1 sees that row's tokens, not nothing.
    assert mask[1, 0].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]


def test_no_mask_where_none_is_needed() -> None:
    cache = small()
    row = cache.allocate()
    assert cache.begin([row], [4]) is None
    cache.commit([row], [4])
    assert cache.begin([row], [1]) is None
    cache.commit([row], [1])
    assert cache.begin([row], [2]) is not None


def test_one_row_in_neighbouring_blocks_is_read_without_a_copy() -> None:
    cache = small()
    row, other = cache.allocate(), cache.allocate()
    write(cache, [row], [6], 1.0)
    seen = write(cache, [row], [1], 2.0)
    assert seen.untyped_storage().data_ptr() == cache.keys[0].untyped_storage().data_ptr()
    write(cache, [other], [1], 3.0)
    seen = write(cache, [row], [4], 4.0)  # the neighbour is taken
    assert seen.untyped_storage().data_ptr() != cache.keys[0].untyped_storage().data_ptr()
    assert held(cache, row)[5:] == [1.05, 2.0, 4.0, 4.01, 4.02, 4.03]


def test_growth_keeps_what_is_there_and_a_free_row_is_used_again() -> None:
    cache = PooledCache(SHAPE)
    row = cache.allocate()
    write(cache, [row], [200], 3.0)
    write(cache, [row], [400], 4.0)
    other = cache.allocate()
    assert cache.keys[0].shape[0] >= 600
    assert held(cache, row) == [round(3 + i / 100, 2) for i in range(200)] + [
        round(4 + i / 100, 2) for i in range(400)
    ]
    assert cache.used_rows == 2
    cache.release(row)
    assert cache.used_rows == 1
    assert cache.blocks.used == 0
    assert cache.allocate() == row
    assert cache.lengths[row] == 0
    assert other != row


def test_the_budget_is_a_clear_refusal() -> None:
    cache = small(max_tokens=64)
    row, other = cache.allocate(), cache.allocate()
    write(cache, [row], [40], 1.0)
    assert cache.keys[0].shape[0] == 64, "all of it at once, and no more"
    assert cache.free == 6
    with pytest.raises(UserError, match="the KV cache budget is used up"):
        cache.begin([row], [30])
    assert cache.lengths[row] == 40
    with pytest.raises(UserError, match="the KV cache budget is used up"):
        cache.begin([other], [25])
    write(cache, [other], [24], 2.0)
    with pytest.raises(UserError, match="the KV cache budget is smaller than one block"):
        small(max_tokens=3)


def test_misuse_is_named() -> None:
    cache = small()
    row = cache.allocate()
    with pytest.raises(InternalError, match="outside begin/commit"):
        cache.update(block(1, 1, 0.0), block(1, 1, 0.0), 0)
    with pytest.raises(UserError, match="cannot truncate a session to a length it never had"):
        cache.truncate(row, 5)
    with pytest.raises(InternalError, match="no block is free"):
        Blocks(None).take(None)


# --- beginnings ---------------------------------------------------------------------------


def beginning(ids: range) -> Beginning:
    return Beginning([TokenKey(i, 0, 0, 0, 0, 0) for i in ids])


def test_rows_that_begin_alike_hold_the_same_blocks() -> None:
    cache = small()
    first, second, third = (cache.allocate() for _ in range(3))
    write(cache, [first], [10], 1.0)
    cache.register(first, beginning(range(10)))
    assert cache.attachable(beginning(range(20)), 19) == 8
    assert cache.attach(second, beginning(range(20)), 19) == 10
    assert cache.tables[second][:2] == cache.tables[first][:2]
    assert cache.blocks.used == 4, "two shared, and the third of each"
    assert held(cache, second) == held(cache, first)
    write(cache, [second], [3], 7.0)
    assert held(cache, first) == [round(1 + i / 100, 2) for i in range(10)]
    assert cache.attach(third, beginning(range(10)), 6) == 6, "as far as is asked"
    cache.release(first)
    cache.release(third)
    assert held(cache, second)[8:] == [1.08, 1.09, 7.0, 7.01, 7.02]
    assert cache.used_rows == 1
    assert cache.attachable(beginning(range(8)), 8) == 8, "as long as anybody holds it"
    cache.release(second)
    assert cache.used_rows == 0
    assert cache.blocks.used == 0
    assert cache.attachable(beginning(range(8)), 8) == 0


def test_a_shared_block_is_copied_before_it_is_written() -> None:
    cache = small()
    first, second = cache.allocate(), cache.allocate()
    write(cache, [first], [8], 1.0)
    cache.register(first, beginning(range(8)))
    cache.attach(second, beginning(range(8)), 8)
    cache.truncate(second, 6)
    assert cache.needed(second, 1) == 1, "the copy counts"
    write(cache, [second], [2], 9.0)
    assert held(cache, first) == [round(1 + i / 100, 2) for i in range(8)]
    assert held(cache, second)[5:] == [1.05, 9.0, 9.01]


def test_what_is_written_over_is_no_beginning_any_more() -> None:
    cache = small()
    first, second = cache.allocate(), cache.allocate()
    write(cache, [first], [8], 1.0)
    cache.register(first, beginning(range(8)))
    cache.truncate(first, 5)
    write(cache, [first], [3], 9.0)
    assert cache.attach(second, beginning(range(8)), 8) == 4
    assert held(cache, second) == [1.0, 1.01, 1.02, 1.03]


def test_a_copied_row_shares_full_blocks() -> None:
    cache = small()
    first, second = cache.allocate(), cache.allocate()
    write(cache, [first], [6], 1.0)
    cache.copy_row(first, second)
    assert cache.blocks.used == 3
    write(cache, [first], [1], 2.0)
    write(cache, [second], [1], 3.0)
    assert held(cache, first)[4:] == [1.04, 1.05, 2.0]
    assert held(cache, second)[4:] == [1.04, 1.05, 3.0]


def test_features_are_told_apart_by_the_object_that_they_are() -> None:
    positions, ends = torch.zeros(3, 4, dtype=torch.long), [1, 1, 1, 1]
    one, same = torch.zeros(2, 3), torch.zeros(2, 3)

    def keys(features: torch.Tensor) -> list[TokenKey]:
        blocks = [Block([5, 6, 6, 7], positions, ends, [(1, features)])]
        return list(beginning_of(blocks).keys)

    assert keys(one) == keys(one)
    assert keys(one)[0] == keys(same)[0]
    assert keys(one)[1] != keys(same)[1]
    assert keys(one)[1] != keys(one)[2]._replace(place=0, features=0)
    moved = [Block([5, 6, 6, 7], positions + 1, ends, [(1, one)])]
    assert beginning_of(moved).keys[0] != keys(one)[0], "positions count, too"
