"""Where the second version is shown to look: all of several places alike, and how many they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

from vpt_agent.nano import pool as first_pool
from vpt_agent.nano.second import pool as second_pool
from vpt_agent.nano.second.batches import ANCHOR, SecondBatches
from vpt_agent.nano.second.model import shown
from vpt_agent.nano.second.pool import DomainPool, draw_domain_shard
from vpt_agent.nano.second.text import SecondEncoder, second_tokenizer


def _looks(*weights: float) -> torch.Tensor:
    """Attention (1, 1, 4, 4) of which only the last token's matters."""
    looks = torch.zeros(1, 1, 4, 4)
    looks[0, 0, 3] = torch.tensor(weights)
    return looks


def _loss(looks: torch.Tensor, even: bool | None) -> float:
    spot = torch.tensor([[False, True, True, False]])
    asking = torch.tensor([[False, False, False, True]])
    flag = None if even is None else torch.tensor([even])
    loss, on = shown(looks, {"spot": spot, "asking": asking}, flag)
    assert on == pytest.approx(float(looks[0, 0, 3, 1:3].sum()))
    return float(loss)


def test_one_of_two_marks_is_enough_unless_both_are_to_be_looked_at() -> None:
    both, one = _looks(0, 0.5, 0.5, 0), _looks(0, 1, 0, 0)
    for even in (None, False):
        assert _loss(both, even) == pytest.approx(_loss(one, even)) == pytest.approx(0, abs=1e-3)
    assert _loss(both, True) == pytest.approx(0, abs=1e-3)
    assert _loss(one, True) == pytest.approx(0.5 * (math.log(0.5) + math.log(0.5 / 1e-4)), abs=0.01)


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A pool of each version."""
    monkeypatch.setattr(second_pool, "SHARD", 4)
    monkeypatch.setattr(first_pool, "SHARD", 2)
    pool, more = tmp_path / "pool", tmp_path / "more"
    for directory, draw in ((pool, draw_domain_shard), (more, first_pool.draw_shard)):
        directory.mkdir()
        draw(directory, 0)
    return pool, more


def _drawn(pool: Path, plan: str, more: Path | None = None, size: int = 32) -> SecondBatches:
    encoder = SecondEncoder(second_tokenizer())
    return SecondBatches("talk", pool, encoder, size, plan=plan.split(), more=more)


def test_what_is_counted_is_looked_at_with_the_first_token(pools: tuple[Path, Path]) -> None:
    batches, counted = _drawn(pools[0], "none dino"), 0
    pool = DomainPool(pools[0])
    for number in range(4):
        batch = batches.batch(pool, number)
        again = "_again" if "spot_again" in batch else ""
        for row, spot in enumerate(batch[f"spot{again}"]):
            text = batches.encoder.tokenizer.decode(batch["input_ids"][row])
            said = text.split("<|im_start|>assistant\n")[-1].split("<|im_end|>")[0]
            assert bool(spot[ANCHOR]) == said.isdigit()
            if not said.isdigit():
                continue
            counted += 1
            assert bool(batch[f"even{again}"][row])
            assert bool(batch[f"asking{again}"][row].any())
            # Two tags may have their middles in one token of the first look.
            most = int(spot.sum()) - 1
            assert most == int(said) if again else most <= int(said)
    assert counted > 3


def test_half_of_what_is_read_is_of_the_first_version(pools: tuple[Path, Path]) -> None:
    pool, more = pools
    batches = _drawn(pool, "region", more)
    batch = batches.batch(DomainPool(pool), 0)
    text = batches.encoder.tokenizer.batch_decode(batch["input_ids"])
    assert batches.more is not None
    answers = {t.answer for _, scene in batches.more.records for t in scene.tags}
    own = [any(f"\n{a}<|im_end|>" in row for a in answers) for row in text]
    assert 0 < sum(own) < len(own)
    assert bool(batch["asking"].any(1).all())
    alone = _drawn(pool, "none", more).batch(DomainPool(pool), 0)
    text = batches.encoder.tokenizer.batch_decode(alone["input_ids"])
    assert not any(f"\n{a}<|im_end|>" in row for a in answers for row in text)
