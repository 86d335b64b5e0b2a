"""Accuracy over all labels, and by class: does the model choose the perception tokens it should?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy.typing as npt

from vpt_agent.errors import UserError

IGNORED = -100


class ClassAccuracy:
    """Next-token accuracy, overall and for each id of ``class_set`` (as published).

    Counts add up over batches. The accuracy of an id is its recall: the share right of the
    positions whose label it is. Labels of -100 do not count.
    """

    def __init__(self, class_set: Iterable[int] = ()) -> None:
        self.class_set = tuple(dict.fromkeys(class_set))
        self._seen = dict.fromkeys(self.class_set, 0)
        self._right = dict.fromkeys(self.class_set, 0)
        self._total = self._total_right = 0

    def update(self, predicted: npt.NDArray[Any], labels: npt.NDArray[Any]) -> None:
        """Add a batch: the most likely ids ``predicted`` [B, L] and the ``labels`` [B, L].

        Not shifted: ``predicted[:, i]`` is what follows position i.
        """
        if predicted.shape != labels.shape or labels.ndim != 2:
            raise UserError(
                "predictions and labels differ in shape",
                where="ClassAccuracy.update",
                got=f"{predicted.shape} and {labels.shape}",
                expected="[B, L] and [B, L]",
            )
        target = labels[:, 1:]
        right = predicted[:, :-1] == target
        self._total += int((target != IGNORED).sum())
        self._total_right += int(right[target != IGNORED].sum())
        for i in self.class_set:
            here = target == i
            self._seen[i] += int(here.sum())
            self._right[i] += int(right[here].sum())

    def counts(self) -> list[int]:
        """All sums, for adding up over processes: see :meth:`of_counts`."""
        by_class = [n for i in self.class_set for n in (self._seen[i], self._right[i])]
        return [self._total, self._total_right, *by_class]

    @classmethod
    def of_counts(cls, class_set: Iterable[int], counts: Sequence[int]) -> ClassAccuracy:
        """From :meth:`counts` (or their sums) of the same ``class_set``."""
        made = cls(class_set)
        made._total, made._total_right = counts[:2]
        for place, i in enumerate(made.class_set):
            made._seen[i], made._right[i] = counts[2 + 2 * place : 4 + 2 * place]
        return made

    def result(self) -> dict[str, float]:
        """``accuracy``, and ``accuracy_<id>`` for each id that was a label."""
        if not self._total:
            raise UserError(
                "there is no label to compare with",
                where="ClassAccuracy.result",
                fix="evaluate on rows whose assistant turns are not cut off",
            )
        shares = {f"accuracy_{i}": self._right[i] / n for i, n in self._seen.items() if n}
        return {"accuracy": self._total_right / self._total, **shares}
