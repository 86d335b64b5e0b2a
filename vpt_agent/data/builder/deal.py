"""Dealing kinds to annotations so that stated shares hold exactly."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from vpt_agent.errors import UserError

Group = frozenset[str]
Flow = dict[Group, Counter[str]]


def counts_of(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """``total`` split by ``shares``: whole numbers by the largest remainders."""
    whole = sum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in order[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def deal(fits: Sequence[Group], shares: Mapping[str, float], total: int | None) -> list[str | None]:
    """A kind for each item, or None for those left over.

    ``fits`` says which kinds each item may become. ``total`` items get one, in ``shares``; without
    it, as many as the shares allow. More than there can be is a :class:`UserError`.
    """
    sizes = Counter(fits)
    low, high = 0, len(fits)
    if total is None:
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if _fill(sizes, counts_of(shares, middle)) else (low, middle - 1)
            )
    best = low if total is None else total
    flow = _fill(sizes, counts_of(shares, best)) if best else None
    if flow is None:
        able = {kind: sum(n for group, n in sizes.items() if kind in group) for kind in shares}
        raise UserError(
            "the annotations cannot fill these shares",
            got=", ".join(f"{kind}: {n} fit" for kind, n in able.items()),
            expected=", ".join(f"{k}: {n}" for k, n in counts_of(shares, max(best, 1)).items()),
            fix="ask for fewer rows, or change the shares (region rows need boxes)",
        )
    dealt: list[str | None] = []
    for group in fits:
        kind = next((k for k in shares if flow[group][k] > 0), None)
        if kind is not None:
            flow[group][kind] -= 1
        dealt.append(kind)
    return dealt


def _fill(sizes: Mapping[Group, int], counts: Mapping[str, int]) -> Flow | None:
    """How many items of each group become each kind, so that ``counts`` hold; None if they cannot.

    Augmenting paths between groups and kinds: there are few of both.
    """
    flow: Flow = defaultdict(Counter)
    free = dict(sizes)
    for kind, need in counts.items():
        while need:
            moved = _augment(kind, need, free, flow)
            if not moved:
                return None
            need -= moved
    return flow


def _augment(kind: str, need: int, free: dict[Group, int], flow: Flow) -> int:
    """Get up to ``need`` more items for ``kind``, by moving items of other kinds if it must be."""
    came: dict[str, tuple[str, Group]] = {}  # the kind that wants this one's item, and its group
    queue, seen = [kind], {kind}
    while queue:
        here = queue.pop(0)
        for group in (g for g in free if here in g):
            if free[group]:
                return _shift(kind, here, group, need, free, flow, came)
            for other in sorted(k for k, n in flow[group].items() if n and k not in seen):
                seen.add(other)
                came[other] = (here, group)
                queue.append(other)
    return 0


def _shift(
    kind: str,
    last: str,
    group: Group,
    need: int,
    free: dict[Group, int],
    flow: Flow,
    came: Mapping[str, tuple[str, Group]],
) -> int:
    steps, here = [], last
    while here != kind:
        wanting, through = came[here]
        steps.append((here, wanting, through))
        here = wanting
    moved = min(need, free[group], *(flow[through][loser] for loser, _, through in steps))
    free[group] -= moved
    flow[group][last] += moved
    for loser, wanting, through in steps:
        flow[through][loser] -= moved
        flow[through][wanting] += moved
    return moved
