from __future__ import annotations

import numpy as np
import pytest

from vpt_agent.errors import UserError
from vpt_agent.training import ClassAccuracy


def test_counts_add_up_over_batches() -> None:
    accuracy = ClassAccuracy([7, 8, 9])
    accuracy.update(np.array([[7, 7, 0]]), np.array([[7, 7, 8]]))  # 7 right, 8 not
    accuracy.update(np.array([[8, 1, 1, 1]]), np.array([[-100, 8, -100, 5]]))  # 8 right, 5 not
    assert accuracy.result() == {"accuracy": 0.5, "accuracy_7": 1.0, "accuracy_8": 0.5}


def test_shapes_must_agree() -> None:
    with pytest.raises(UserError, match=r"differ in shape.*\(1, 3\) and \(1, 2\)"):
        ClassAccuracy().update(np.zeros((1, 3)), np.zeros((1, 2)))


def test_no_labels_no_figure() -> None:
    accuracy = ClassAccuracy()
    accuracy.update(np.array([[1, 2]]), np.array([[5, -100]]))  # the first has nothing before it
    with pytest.raises(UserError, match=r"no label to compare with"):
        accuracy.result()
