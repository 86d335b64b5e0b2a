"""Choosing tokens: greedy, sampled, constrained."""

from __future__ import annotations

import pytest
import torch

from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.errors import UserError

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0])


def test_greedy_takes_the_largest_and_says_its_probability() -> None:
    choice = Sampler(Sampling()).choose(LOGITS)
    assert choice.token == choice.free == 1
    assert choice.logprob == pytest.approx(float(LOGITS.log_softmax(0)[1]))
    assert choice.removed == 0


def test_a_constraint_keeps_what_is_allowed_and_records_what_it_removed() -> None:
    choice = Sampler(Sampling()).choose(LOGITS, allowed=[0, 2], banned=[0])
    probabilities = LOGITS.softmax(0)
    assert choice.token == 2
    assert choice.free == 1
    assert choice.logprob == pytest.approx(0.0, abs=1e-6)
    assert choice.removed == pytest.approx(float(1 - probabilities[2]), abs=1e-6)


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    draws = [Sampler(Sampling(1.0, seed=i)).choose(LOGITS).token for i in range(2000)]
    share = torch.bincount(torch.tensor(draws), minlength=4) / len(draws)
    torch.testing.assert_close(share, LOGITS.softmax(0), atol=0.04, rtol=0)
    again = [Sampler(Sampling(1.0, seed=i)).choose(LOGITS).token for i in range(50)]
    assert again == draws[:50]


@pytest.mark.parametrize(
    ("sampling", "possible"),
    [
        (Sampling(1.0, top_k=2, seed=0), {1, 2}),
        (Sampling(1.0, top_p=0.5, seed=0), {1}),
        (Sampling(1.0, top_p=0.8, seed=0), {1, 2}),
    ],
)
def test_top_k_and_top_p_cut_the_tail(sampling: Sampling, possible: set[int]) -> None:
    sampler = Sampler(sampling)
    assert {sampler.choose(LOGITS).token for _ in range(300)} == possible


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": float("inf")}, "temperature must be 0"),
        ({"temperature": "1"}, "temperature must be 0"),
        ({"top_k": 2.5}, "top_k must be 0"),
        ({"top_k": True}, "top_k must be 0"),
        ({"top_p": float("nan")}, r"top_p must be in \(0, 1\]"),
        ({"seed": "x"}, "the seed must be a whole number"),
        ({"seed": 1.5}, "the seed must be a whole number"),
        ({"seed": 2**70}, "the seed must be a whole number"),
    ],
)
def test_what_is_no_setting_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6, 1e30])
def test_any_temperature_gives_a_token(temperature: float) -> None:
    token = Sampler(Sampling(temperature, seed=-3)).choose(LOGITS).token
    assert token == 1 or temperature > 1


def test_a_top_k_beyond_all_bounds_is_off() -> None:
    for seed in range(5):
        off = Sampler(Sampling(1.0, seed=seed)).choose(LOGITS)
        assert Sampler(Sampling(1.0, top_k=10**30, seed=seed)).choose(LOGITS).token == off.token


def test_logits_that_are_no_numbers_are_an_error() -> None:
    for sampling in (Sampling(), Sampling(1.0, seed=0)):
        with pytest.raises(UserError, match="its logits are NaN"):
            Sampler(sampling).choose(torch.tensor([1.0, float("nan"), 0.0]))
