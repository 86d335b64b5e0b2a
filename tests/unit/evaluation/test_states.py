"""Do the figures tell instructions from generic triggers?"""

from __future__ import annotations

import numpy as np
import pytest

from vpt_agent.errors import UserError
from vpt_agent.evaluation import State, describe_states
from vpt_agent.evaluation.states import principal_components, silhouette


def states(apart: float, *, per_type: int = 30, kind: str = "clip") -> list[State]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 16)) * apart
    return [
        State(f"i{t}{n}", "clip", kind, f"t{t}", (centres[t] + rng.normal(size=16))[None])
        for t in range(3)
        for n in range(per_type)
    ]


def test_instructions_lie_by_type() -> None:
    found = describe_states(states(6.0))
    assert found.neighbour == 1
    assert found.neighbour_chance == pytest.approx(1 / 3, abs=0.12)
    assert found.silhouette > 0.6
    assert found.purity == 1
    assert found.between > 0.8
    assert found.by_type == {"t0": 30, "t1": 30, "t2": 30}
    assert len(found.points) == len(found.types) == found.n == 90
    assert sum(found.variance) <= 1 + 1e-9


def test_a_generic_trigger_lies_anywhere() -> None:
    found = describe_states(states(0.0))
    assert found.neighbour == pytest.approx(found.neighbour_chance, abs=0.15)
    assert found.silhouette < 0.05
    assert found.between < 0.1
    assert found.to_dict() == describe_states(states(0.0)).to_dict()  # same seed, same figures


def test_a_silhouette_by_hand() -> None:
    points = np.array([0.0, 1.0, 10.0])
    distances = np.abs(points[:, None] - points)
    types = np.array(["a", "a", "b"])
    # (10 - 1) / 10, (9 - 1) / 9, and 0 for the one that is alone.
    assert silhouette(distances, types) == pytest.approx((0.9 + 8 / 9 + 0) / 3)


def test_principal_components_keep_distances() -> None:
    x = np.random.default_rng(1).normal(size=(12, 5))
    points, variance = principal_components(x)
    before = np.linalg.norm(x[:, None] - x, axis=-1)
    np.testing.assert_allclose(np.linalg.norm(points[:, None] - points, axis=-1), before)
    assert variance.sum() == pytest.approx(1)
    assert list(variance) == sorted(variance, reverse=True)


def test_too_little_to_compare_is_told() -> None:
    with pytest.raises(UserError, match="at least two types"):
        describe_states(states(1.0)[:10])
    with pytest.raises(UserError, match="of several kinds"):
        describe_states([*states(1.0), *states(1.0, kind="sam")])
