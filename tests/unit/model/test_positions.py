"""M-RoPE positions agree with transformers' rule, whole and block by block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from vpt_agent.errors import UserError
from vpt_agent.model.positions import rope_positions, runs, span_positions

PAD = 7


class _Reference:
    """What transformers' method reads of its model."""

    class config:  # noqa: N801
        class vision_config:  # noqa: N801
            spatial_merge_size = 2

    get_vision_position_ids = Qwen2VLModel.get_vision_position_ids


pieces = st.lists(
    st.one_of(st.integers(1, 6), st.tuples(st.integers(1, 5), st.integers(1, 5))), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(pieces=pieces)
def test_positions_are_those_of_transformers(pieces: list[int | tuple[int, int]]) -> None:
    ids, grids, blocks, start = [1], [], [], 0
    spans: list[tuple[tuple[int, int, int] | None, int]] = [(None, 1)]
    for piece in pieces:
        if isinstance(piece, int):
            ids += [1] * piece
            spans.append((None, piece))
        else:
            grid = (1, 2 * piece[0], 2 * piece[1])
            grids.append(grid)
            ids += [PAD] * (piece[0] * piece[1]) + [1]
            spans += [(grid, piece[0] * piece[1]), (None, 1)]
    for grid, count in spans:
        block, start = span_positions(start, grid, count)
        blocks.append(block)
    sequence = torch.tensor(ids)
    expected, delta = Qwen2VLModel.get_rope_index(
        _Reference(),
        sequence[None],
        (sequence == PAD).int()[None],
        torch.tensor(grids) if grids else None,
    )
    assert torch.equal(rope_positions(sequence, grids, PAD), expected[:, 0])
    assert torch.equal(torch.cat(blocks, dim=1), expected[:, 0])
    assert start == len(ids) + int(delta)


def test_runs() -> None:
    assert runs(torch.tensor([True, True, False, True])) == [(0, 2), (3, 1)]
    assert runs(torch.zeros(3, dtype=torch.bool)) == []


def test_a_video_is_refused() -> None:
    with pytest.raises(UserError, match=r"one frame; videos are not supported.*\(2, 4, 4\)"):
        span_positions(0, (2, 4, 4), 8)


def test_a_grid_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"does not give this many tokens.*expected: 6 tokens"):
        span_positions(0, (1, 4, 6), 5)


def test_grids_and_runs_must_be_as_many() -> None:
    with pytest.raises(UserError, match=r"differ in number.*1 runs of placeholders, 0 grids"):
        rope_positions(torch.tensor([1, PAD]), [], PAD)
