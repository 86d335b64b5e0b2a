"""Contract X2: full pass = prefill + blocks = token by token, for every kind and split."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tests.unit.engine.conftest import KINDS, Kit
from vpt_agent.engine.parts import Part, Tokens, Unconditioned, Visual

SPLITS = ["whole", "parts", "tokens", "random"]


def pieces(parts: list[Part], how: str) -> list[list[Part]]:
    """The same conversation in several appends."""
    if how == "whole":
        return [parts]
    if how == "parts":
        return [[p] for p in parts]
    if how == "tokens":
        return [[q] for p in parts for q in single(p)]
    rng = random.Random(5)
    out: list[list[Part]] = [[]]
    for part in parts:
        for q in single(part):
            if rng.random() < 0.3 and out[-1]:
                out.append([])
            out[-1].append(q)
    return out


def single(part: Part) -> list[Part]:
    # Visual tokens stay together: a picture is one block with one grid.
    return [Tokens([i]) for i in part.ids] if isinstance(part, Tokens) else [part]


def logits(kit: Kit, parts: list[Part], how: str) -> Tensor:
    session = kit.fresh().session()
    return torch.cat([session.append(p, logits="all") for p in pieces(parts, how)])


def full_pass(kit: Kit, parts: list[Part], kind: str) -> Tensor:
    """One training forward over the whole sequence, stepwise control (`causal`)."""
    ids, grids, inputs = [], [], {}
    for part in parts:
        if isinstance(part, Tokens):
            ids += part.ids
            continue
        ids += [part.placeholder] * part.features.shape[0]
        if isinstance(part, Visual):
            grids.append(part.grid)
    engine = kit.engine
    from tests.unit.engine.conftest import crop, picture
    from vpt_agent.vision.encoders import dino_pixels, sam_pixels
    from vpt_agent.vision.patches import look

    views = [] if kind == "text" else [picture(1), *([crop(1)] if kind == "region" else [])]
    if views:
        patches = look(views, kit.policy)
        inputs |= {"pixel_values": patches.pixel_values, "image_grid_thw": patches.grid_thw}
    if kind == "clip":
        patches = look([picture(1)], kit.policy)
        inputs |= {
            "clip_pixel_values": patches.pixel_values,
            "clip_images_grid_thw": patches.grid_thw,
        }
    for name, make, field in (
        ("dino", dino_pixels, "detection_images"),
        ("sam", sam_pixels, "seg_images"),
    ):
        if kind == name:
            size = engine.table[kind].kind.input_size
            inputs[field] = make(picture(1), None, size=size)[None]
    tensor = torch.tensor([ids])
    positions = kit.model.rope_positions(tensor[0], grids)[:, None]
    with torch.no_grad():
        out = kit.model(
            input_ids=tensor,
            attention_mask=torch.ones_like(tensor),
            position_ids=positions,
            control="causal",
            **inputs,
        )
    return out.logits[0].float()


@pytest.mark.parametrize("how", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_equal_the_full_pass(kit: Kit, kind: str, how: str) -> None:
    parts = kit.conversation(kind)
    torch.testing.assert_close(
        logits(kit, parts, how), full_pass(kit, parts, kind), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fork_and_truncate_leave_the_same_state(one: Kit, kind: str) -> None:
    parts = one.conversation(kind)
    tail = [Tokens(one.ids(" again"))]
    straight = one.fresh().session()
    straight.append(parts)
    wanted = straight.append(tail, logits="all")
    session = one.fresh().session()
    session.append(parts)
    length = len(session)
    session.append([Tokens(one.ids(" something else"))])
    session.truncate(length)
    torch.testing.assert_close(session.append(tail, logits="all"), wanted, atol=1e-5, rtol=0)
    session.truncate(length)
    other = session.fork()
    torch.testing.assert_close(other.append(tail, logits="all"), wanted, atol=1e-5, rtol=0)


def test_nothing_is_computed_twice(one: Kit) -> None:
    engine = one.fresh()
    session = engine.session()
    parts = one.conversation("clip")
    for part in parts:
        session.append([part])
    assert engine.counters.tokens == len(session.ids)
    assert isinstance(parts[-2], Unconditioned)
