"""How sure a figure is: intervals for shares and means, and tests of paired differences.

All intervals are of 95 % unless told otherwise. Figures of two settings on the same items are
compared item by item: the scatter between items, which is most of it, then cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from vpt_agent.errors import UserError

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """``value`` lies between ``low`` and ``high`` at the confidence asked for; ``n`` items.

    Without items all three are NaN.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN: None instead."""
        return {k: None if v != v else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        if not self.n:
            return "-"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


NOTHING = Interval(math.nan, math.nan, math.nan, 0)


def share(hits: Sequence[bool], *, confidence: float = CONFIDENCE) -> Interval:
    """The share of ``hits`` that are true, with Wilson's score interval.

    Wilson (1927): stays inside 0..1 and holds near its ends, where the plain normal interval has
    no width. Exact for the empty list: :data:`NOTHING`.
    """
    n, successes = len(hits), sum(map(bool, hits))
    if n == 0:
        return NOTHING
    z = _quantile(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # By formula the ends are 0 and 1 for none and all; rounding must not miss them.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(p, low, high, n)


def mean(
    values: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """The mean of ``values`` with a percentile bootstrap interval; the same seed, the same."""
    data = _numbers(values, "mean")
    if not data.size:
        return NOTHING
    low, high = _bootstrap(data, seed, resamples, confidence)
    return Interval(float(data.mean()), low, high, int(data.size))


@dataclass(frozen=True)
class Difference:
    """A setting against another on the same items.

    ``interval`` is of the mean difference (first minus second). ``only_first`` and ``only_second``
    count items that just one of them got right; ``p`` is McNemar's exact two-sided probability of
    so uneven a split if the two were equal (None for values that are no shares).
    """

    interval: Interval
    only_first: int = 0
    only_second: int = 0
    p: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON."""
        return {
            **self.interval.to_dict(),
            "only_first": self.only_first,
            "only_second": self.only_second,
            "p": self.p,
        }


def difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Difference:
    """The paired difference ``first - second``; entry i of both belongs to the same item.

    For shares (all values 0 or 1) the interval is Agresti and Min's (2005), which keeps its width
    where the two hardly ever differ, and McNemar's exact test comes with it; otherwise it is a
    percentile bootstrap over items. Lists of different lengths are a :class:`UserError`.
    """
    a, b = _numbers(first, "difference"), _numbers(second, "difference")
    if a.size != b.size:
        raise UserError(
            "paired figures need the same items on both sides",
            where="difference",
            got=f"{a.size} and {b.size} values",
        )
    if not a.size:
        return Difference(NOTHING)
    value, n = float((a - b).mean()), int(a.size)
    if not bool(np.isin(np.concatenate((a, b)), (0.0, 1.0)).all()):
        low, high = _bootstrap(a - b, seed, resamples, confidence)
        return Difference(Interval(value, low, high, n))
    more, less = int((a > b).sum()), int((a < b).sum())
    low, high = _agresti_min(more, less, n, confidence)
    return Difference(Interval(value, low, high, n), more, less, mcnemar(more, less))


def _agresti_min(more: int, less: int, n: int, confidence: float) -> tuple[float, float]:
    """Interval of (more - less) / n: half an item is added to each of the four kinds of pairs, so
    that no pairs of a kind does not mean that there can be none."""
    apart, differing = more - less, more + less + 1
    middle = apart / (n + 2)
    half = _quantile(confidence) * math.sqrt(differing - apart * apart / (n + 2)) / (n + 2)
    return max(-1.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact test: two-sided binomial probability of such a split of the items on
    which two settings differ (1 if they differ on none)."""
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    # With logarithms: 2**n overflows a float at a thousand items.
    log_tail = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
        for i in range(k + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(v) for v in log_tail))


def _bootstrap(
    data: NDArray[np.float64], seed: int, resamples: int, confidence: float
) -> tuple[float, float]:
    """Percentile interval of the mean of ``data`` [n]."""
    if resamples < 1:
        raise UserError("a bootstrap needs at least one resample", got=resamples)
    _quantile(confidence)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 4_000_000 // data.size)  # draws at once: bounded memory
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        picks = rng.integers(0, data.size, (count, data.size))
        means[start : start + count] = data[picks].mean(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UserError("a confidence lies between 0 and 1", got=confidence)
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _numbers(values: Sequence[float], where: str) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not bool(np.isfinite(data).all()):
        raise UserError(
            "figures must be a list of finite numbers", where=where, got=repr(values)[:80]
        )
    return data
