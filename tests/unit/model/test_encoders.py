"""A row and its encoder must fit; another encoder than those known is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model.encoders import build_parts, run_encoder
from vpt_agent.model.testing import DINO, SAM
from vpt_agent.tokens.table import PUBLISHED, PerceptionKind

SHAPES: dict[str, dict[str, Any]] = {"detection": DINO, "seg": SAM}
SMALL = {"dino": (16, 56), "sam": (16, 64)}


def row(name: str, **values: Any) -> PerceptionKind:
    tokens, size = SMALL[name]
    return replace(PUBLISHED[name], **({"visual_tokens": tokens, "input_size": size} | values))


@pytest.mark.parametrize("name", ["dino", "sam"])
@pytest.mark.parametrize("controls", [1, 3])
def test_tokens_follow_from_the_row(name: str, controls: int) -> None:
    kind = row(name)
    encoder, projector = build_parts(kind, SHAPES, 24, controls)
    assert encoder is not None
    with torch.no_grad():
        encoded = run_encoder(kind, encoder, torch.randn(2, 3, kind.input_size, kind.input_size))
        features = projector.features(encoded[0])
        condition = projector.condition(torch.randn(2, controls, 24))
    assert features.shape == (kind.visual_tokens, 24)
    assert condition.shape == (2, 24)


def test_a_sam_row_may_ask_for_fewer_tokens() -> None:
    kind = row("sam", visual_tokens=4)
    encoder, projector = build_parts(kind, SHAPES, 24, 1)
    assert encoder is not None
    assert projector.conv_feature.kernel_size == (8, 8)
    encoded = run_encoder(kind, encoder, torch.randn(1, 3, 64, 64))
    assert projector.features(encoded[0]).shape == (4, 24)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (row("dino", visual_tokens=9), r"does not fit its encoder.*'dino'.*input 56 px, patch 14"),
        (row("dino", input_size=None), r"does not fit its encoder.*input None px"),
        (row("sam", input_size=128), r"does not fit its encoder.*input 64 px"),
        (row("sam", visual_tokens=9), r"does not fit its encoder.*divides the map's 16"),
    ],
)
def test_rows_that_do_not_fit(kind: PerceptionKind, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        build_parts(kind, SHAPES, 24, 1)


@pytest.mark.parametrize("tokens", [None, 15])
def test_tokens_that_make_no_square(tokens: int | None) -> None:
    with pytest.raises(UserError, match=rf"square number of visual tokens.*got: {tokens}"):
        build_parts(row("dino", visual_tokens=tokens), SHAPES, 24, 1)


def test_an_unknown_encoder() -> None:
    with pytest.raises(UserError, match=r"no such vision encoder.*siglip.*base, dino, sam"):
        build_parts(row("dino", encoder="siglip"), SHAPES, 24, 1)
