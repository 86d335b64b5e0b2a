"""Intervals and paired tests against values from the literature and from counting."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpt_agent.errors import UserError
from vpt_agent.evaluation import difference, mcnemar, mean, share


def test_wilson_gives_the_textbook_values() -> None:
    # Newcombe (1998), table I: 81 of 263, and 0 of 20, at 95 %.
    found = share([True] * 81 + [False] * 182)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    none = share([False] * 20)
    assert none.low == 0.0
    assert round(none.high, 4) == 0.1611
    assert share([True] * 20).high == 1.0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_a_share_lies_in_its_interval(hits: list[bool]) -> None:
    found = share(hits)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.n == len(hits)
    wider = share(hits, confidence=0.99)
    assert wider.low <= found.low
    assert wider.high >= found.high


def test_nothing_measured_is_said() -> None:
    assert math.isnan(share([]).value)
    assert share([]).to_dict() == {"value": None, "low": None, "high": None, "n": 0}
    assert str(mean([])) == "-"
    assert difference([], []).interval.n == 0


def test_mcnemar_counts_the_coin_throws() -> None:
    for a, b in product(range(6), range(6)):
        n, k = a + b, min(a, b)
        counted = sum(math.comb(n, i) for i in range(k + 1)) * 2 / 2**n
        assert mcnemar(a, b) == pytest.approx(min(1.0, counted))
    assert 0 < mcnemar(900, 1100) < 1e-4  # 2 ** 2000 is no float


def test_pairs_are_sharper_than_two_shares() -> None:
    first = [1.0] * 60 + [0.0] * 40
    second = [1.0] * 50 + [0.0] * 50  # wrong on ten items that the first got right, never better
    found = difference(first, second, seed=3)
    assert found.interval.value == pytest.approx(0.1)
    assert 0.03 < found.interval.low < 0.1 < found.interval.high < 0.18
    assert (found.only_first, found.only_second) == (10, 0)
    assert found.p == pytest.approx(2 / 2**10)
    # As two independent shares the same figures overlap widely.
    assert share([x == 1 for x in first]).low < share([x == 1 for x in second]).high
    assert difference(first, second, seed=3) == found


def test_agresti_and_min_at_the_ends_and_in_the_middle() -> None:
    # 1600 pairs, 150 for the first only and 86 for the second only (Agresti's approval ratings).
    first = [1.0] * 150 + [0.0] * 86 + [1.0] * 794 + [0.0] * 570
    second = [0.0] * 150 + [1.0] * 86 + [1.0] * 794 + [0.0] * 570
    found = difference(first, second).interval
    assert found.value == pytest.approx(0.04)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0212, 0.0587)
    never = difference([1.0] * 5, [1.0] * 5).interval  # five equal pairs prove little
    assert never.low == pytest.approx(-never.high)
    assert never.high > 0.2
    always = difference([1.0] * 5, [0.0] * 5).interval
    assert always.low < 0.5
    assert always.high == always.value == 1


def test_a_bootstrap_covers_the_mean_and_keeps_its_seed() -> None:
    values = [i / 10 for i in range(11)]
    found = mean(values, seed=1)
    assert found.value == pytest.approx(0.5)
    assert 0.3 < found.low < 0.5 < found.high < 0.7
    assert mean(values, seed=1) == found != mean(values, seed=2)
    pairs = difference(values, [0.4] * 11, seed=1)
    assert pairs.p is None  # no shares: McNemar says nothing
    assert pairs.interval.low == pytest.approx(found.low - 0.4)


def test_wrong_use_is_told() -> None:
    with pytest.raises(UserError, match="same items on both sides"):
        difference([1.0], [1.0, 0.0])
    with pytest.raises(UserError, match="finite numbers"):
        mean([math.nan])
    with pytest.raises(UserError, match="confidence lies between"):
        share([True], confidence=95)
    with pytest.raises(UserError, match="at least one resample"):
        mean([1.0], resamples=0)
