"""Rows to batches: the golden data cases, what is dropped, and how little is padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.goldens import ROOT
from tests.parity.test_data_cases import GOOD, encoder_of, name_of, row_of
from tests.unit.training import world
from vpt_agent.data import read_row
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.model.testing import tiny_model
from vpt_agent.training import Collator, plan_batches
from vpt_agent.training.run import make_collator


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for number in range(6):
        world.picture(folder, number)
    return folder


def collator_for(model: VPTForConditionalGeneration, processor: Any, **data: Any) -> Collator:
    return make_collator(world.config(Path("unused"), data=data), processor)


@pytest.mark.parametrize("case", GOOD, ids=name_of)
def test_published_cases(case: dict[str, Any]) -> None:
    encoder = encoder_of(case, "published")
    collator = Collator(encoder, positions="published")
    item = collator.item(read_row(row_of(case), rules="published"), ROOT / "images")
    want = case["supervised"]
    if item is None:  # a run of visual tokens, or all that carries loss, was cut away
        assert "truncated" in case["name"]
        assert collator.counts["dropped: picture"] + collator.counts["dropped: no label"] == 1
        return
    made = collator.batch([item])
    n = len(want["input_ids"])
    assert made["input_ids"].shape[1] == -(-n // 8) * 8
    assert made["input_ids"][0, :n].tolist() == want["input_ids"]
    assert made["labels"][0, :n].tolist() == want["labels"]
    assert made["labels"][0, n:].eq(-100).all()
    assert made["attention_mask"][0].sum() == n


def test_a_batch_is_what_forward_takes(rows: Path) -> None:
    model, processor = tiny_model()
    collator = collator_for(model, processor)
    data = [
        world.direct_row("p0.png"),
        world.region_row("p1.png"),
        *(world.action_row(f"p{i}.png", kind) for i, kind in enumerate(world.KINDS)),
        world.action_row("p3.png", "clip", calls=2),
    ]
    items = [collator.item(read_row(row), rows) for row in data]
    assert all(items)
    together = collator.batch([item for item in items if item])
    assert together["rows"] == ["row"] * 6
    assert together["position_ids"].shape == (3, *together["input_ids"].shape)
    assert together["image_grid_thw"].shape == (7, 3)  # a crop is a picture of the base tower's
    assert {k: len(v) for k, v in together["picture_keys"].items()} == {
        "image": 7, "clip": 3, "dino": 1, "sam": 1}  # fmt: skip
    arguments = {k: v for k, v in together.items() if k != "rows"}
    with torch.no_grad():
        got = model(**arguments)
        # Positions of the collator are those that the model would have made.
        made = model(**(arguments | {"position_ids": None}))
        alone = [model(**{k: v for k, v in collator.batch([i]).items() if k != "rows"})
                 for i in items if i]  # fmt: skip
    assert float(got.loss) == pytest.approx(float(made.loss), abs=1e-5)
    for row, single in enumerate(alone):
        n = len(items[row] or ())
        torch.testing.assert_close(got.logits[row, :n], single.logits[0, :n], atol=1e-3, rtol=1e-3)


def test_pictures_are_resized_once(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vpt_agent.training.collate as module

    model, processor = tiny_model()
    collator = collator_for(model, processor)
    seen: list[str] = []
    original = module.look
    monkeypatch.setattr(
        module, "look", lambda views, policy: (seen.append(views[0].id), original(views, policy))[1]
    )
    item = collator.item(read_row(world.action_row("p0.png", "clip", calls=2)), rows)
    assert item is not None
    collator.batch([item])
    assert seen == ["image_1"]


def test_what_is_dropped_is_counted(rows: Path) -> None:
    model, processor = tiny_model()
    whole = collator_for(model, processor).item(read_row(world.region_row("p0.png")), rows)
    assert whole is not None
    collator = collator_for(model, processor, max_length=len(whole) - 20)  # not the answer
    long = world.direct_row("p0.png", "word " * 100)
    assert collator.item(read_row(long), rows) is not None  # an answer may lose its tail
    assert collator.item(read_row(world.region_row("p0.png")), rows) is None
    assert collator.counts == {"rows": 2, "shortened": 1, "dropped: call": 1}
    regions = collator_for(*tiny_model(()))
    clip = read_row(world.action_row("p0.png", "clip"))
    with pytest.raises(UserError, match=r"tokens that cannot stand there.*calls of region"):
        regions.item(clip, rows)
    with pytest.raises(UserError, match=r"none\.png"):
        collator.item(read_row(world.direct_row("none.png")), rows)
    skipping = collator_for(model, processor, bad_rows="skip")
    assert skipping.item(read_row(world.direct_row("none.png")), rows) is None
    assert skipping.counts["skipped"] == 1


def test_the_tokenizer_must_have_a_padding_token(rows: Path) -> None:
    model, processor = tiny_model()
    encoder = collator_for(model, processor).encoder

    class Without:
        def __getattr__(self, name: str) -> Any:
            return getattr(encoder.layout.tokenizer, name)

        def convert_tokens_to_ids(self, token: str) -> int | None:
            return None

    encoder.layout.tokenizer = Without()
    with pytest.raises(UserError, match=r"lacks the padding token"):
        Collator(encoder)


def test_like_lengths_share_a_batch() -> None:
    lengths = [9, 90, 10, 91, 11, 89]
    assert plan_batches(lengths, rows=3) == [[0, 2, 4], [5, 1, 3]]
    for group in plan_batches(lengths, rows=9, tokens=192):
        longest = max(-(-lengths[i] // 8) * 8 for i in group)
        assert len(group) == 1 or longest * len(group) <= 192
    assert plan_batches([500], rows=1, tokens=64) == [[0]]


def test_padding_stays_under_a_tenth() -> None:
    """Lengths as in the published mixture: pictures of 64 to 324 tokens, one or two of them."""
    chance = np.random.default_rng(0)
    lengths = [
        int(chance.integers(64, 325) + chance.integers(20, 90) + second * chance.integers(64, 325))
        for second in chance.integers(0, 2, 640)
    ]
    for tokens in (None, 4096):
        total = padded = 0
        for start in range(0, len(lengths), 32):
            window = lengths[start : start + 32]
            for group in plan_batches(window, rows=4, tokens=tokens):
                longest = max(-(-window[i] // 8) * 8 for i in group)
                total += sum(window[i] for i in group)
                padded += longest * len(group)
        assert 1 - total / padded < (0.10 if tokens is None else 0.20)
