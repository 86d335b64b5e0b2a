"""Lists of what learns are read as they are meant, or refused."""

from __future__ import annotations

import pytest
from torch import nn

from vpt_agent.errors import UserError
from vpt_agent.training import freeze, trainable_names

NAMES = ["visual.a", "model.layers.0.w", "clip_projector.w"]


def test_one_list_is_given() -> None:
    with pytest.raises(
        UserError, match=r"either what is frozen or what is trainable; got: neither"
    ):
        trainable_names(NAMES)
    with pytest.raises(UserError, match=r"got: both"):
        trainable_names(NAMES, frozen=["visual"], trainable=["model"])


@pytest.mark.parametrize("parts", [[], [""], ["visual", ""]])
def test_an_empty_list_says_nothing(parts: list[str]) -> None:
    with pytest.raises(UserError, match=r"holds parts of their names; where: trainable"):
        trainable_names(NAMES, trainable=parts)


def test_a_part_of_no_name_is_misspelt() -> None:
    with pytest.raises(UserError, match=r"where: frozen; got: visul; expected: parts of: clip_pr"):
        trainable_names(NAMES, frozen=["visul", "model"])


def test_parts_are_looked_for_anywhere() -> None:
    assert trainable_names(NAMES, trainable=["layers", "clip"]) == set(NAMES[1:])
    assert trainable_names(NAMES, frozen=["a"]) == {"clip_projector.w"}
    assert trainable_names(NAMES, frozen=["all"]) == frozenset()


def test_freezing_acts_on_the_model() -> None:
    model = nn.ModuleDict({"visual": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert freeze(model, frozen=["visual"]) == {"head.weight", "head.bias"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.weight",
        "head.bias",
    }
