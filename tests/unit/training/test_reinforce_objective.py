"""Advantages, weights and the clipped objective, against figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from vpt_agent.training.reinforce import advantages, objective
from vpt_agent.training.reinforce.objective import weights_of


def test_advantages_keep_a_small_price_small_unless_divided() -> None:
    wrong_and_right, price = [0.0, 1.0, 1.0, 0.0], [1.0, 0.9, 1.0, 0.9]
    assert advantages(wrong_and_right, group="none") == pytest.approx([-0.5, 0.5, 0.5, -0.5])
    assert advantages(price, group="none") == pytest.approx([0.05, -0.05, 0.05, -0.05])
    found = [advantages(r, group="std") for r in (wrong_and_right, price)]
    size = math.sqrt(3) / 2  # 0.5 by the standard deviation with n - 1, sqrt(1/3)
    assert found[0] == pytest.approx([-size, size, size, -size])
    assert found[1] == pytest.approx([size, -size, size, -size])


@pytest.mark.parametrize("rewards", [[1.0] * 4, [0.0, 0.0], [0.3, 0.3 + 1e-9]])
def test_a_group_without_spread_has_no_advantages(rewards: list[float]) -> None:
    assert advantages(rewards, group="none") is None
    assert advantages(rewards, group="std") is None


def test_weights_sum_to_one_and_count_tokens_or_sequences_alike() -> None:
    assert weights_of([1, 3, 0], mean="token") == pytest.approx([0.25] * 4)
    assert weights_of([1, 3, 0], mean="sequence") == pytest.approx([1 / 2, *[1 / 6] * 3])


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    scores = torch.tensor([-0.5, -2.0, -1.0], requires_grad=True)
    advantage, weights = torch.tensor([0.5, -0.25, 1.0]), torch.tensor([0.2, 0.3, 0.5])
    made = objective(scores, scores.detach().clone(), advantage, weights, clip=0.2)
    made.loss.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, -advantage * weights)
    assert (made.ratio, made.clipped, made.kl) == (0.0, 0, 0.0)


def test_ratios_beyond_the_clip_stop_pushing_but_not_pulling_back() -> None:
    old = torch.zeros(4)
    scores = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5])).requires_grad_()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    made = objective(scores, old, advantage, torch.full((4,), 0.25), clip=0.2)
    made.loss.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, torch.tensor([0.0, 0.375, -0.125, 0.0]))
    assert made.clipped == 2
    assert made.ratio == pytest.approx(2.0)
    # min(1.5, 1.2), min(-1.5, -1.2), min(0.5, 0.8), min(-0.5, -0.8): their mean, negated
    assert float(made.loss.detach()) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)


def test_divergence_is_positive_zero_at_home_and_pulls_back() -> None:
    start = torch.tensor([-1.0, -1.0, -1.0])
    scores = torch.tensor([-1.0, -0.5, -2.0], requires_grad=True)
    nothing, weights = torch.zeros(3), torch.ones(3)
    made = objective(scores, scores.detach(), nothing, weights, clip=0.2, start=start, kl=0.1)
    made.loss.backward()  # type: ignore[no-untyped-call]
    expected = sum(math.exp(d) - d - 1 for d in (0.0, -0.5, 1.0))
    assert made.kl == pytest.approx(expected)
    assert float(made.loss.detach()) == pytest.approx(0.1 * expected)
    assert scores.grad is not None
    assert scores.grad[0] == pytest.approx(0.0, abs=1e-7)
    assert scores.grad[1] > 0 > scores.grad[2]
    unweighted = objective(scores, scores.detach(), nothing, weights, clip=0.2, start=start)
    assert unweighted.kl == pytest.approx(expected), "weight 0 measures it only"
    assert float(unweighted.loss.detach()) == 0
