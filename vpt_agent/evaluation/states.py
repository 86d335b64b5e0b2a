"""Do control states differ by question? A specific instruction, or a generic trigger?

A control state is said to instruct the encoder. If so, states of questions of one type lie
together and apart from those of others, and swapping them across types costs more than within.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt_agent.errors import UserError
from vpt_agent.evaluation.store import State

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class StateFigures:
    """Figures of the control states of one kind.

    ``neighbour`` is the share of states whose nearest other state (Euclidean) is of a question of
    the same type, ``neighbour_chance`` the same with shuffled types. ``silhouette`` is the mean
    over states of how much nearer their own type is than the next one, -1 to 1 (Rousseeuw 1987),
    with its chance value. ``between`` is the share of all variance that lies between the types'
    means; ``purity`` the share of states that are of the commonest type of their k-means cluster
    (k = number of types). ``variance`` are the shares of the first principal components.
    ``points`` [n][2] are the first two, for a plot, with ``types`` [n].
    """

    kind: str
    n: int
    by_type: dict[str, int]
    neighbour: float
    neighbour_chance: float
    silhouette: float
    silhouette_chance: float
    between: float
    purity: float
    variance: list[float]
    points: list[list[float]]
    types: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe_states(states: Sequence[State], *, seed: int = 0, shuffles: int = 20) -> StateFigures:
    """Figures of ``states``, all of one kind; several control states count as one long vector.

    At least two types with two states each are needed, else a :class:`UserError`: types with
    fewer are left out.
    """
    kinds = sorted({s.kind for s in states})
    if len(kinds) != 1:
        raise UserError("these are control states of several kinds", got=kinds, expected="one")
    counts = {t: sum(s.type == t for s in states) for t in sorted({s.type for s in states})}
    used = [s for s in states if counts[s.type] > 1]
    by_type = {t: n for t, n in counts.items() if n > 1}
    if len(by_type) < 2:
        raise UserError(
            "control states of at least two types of questions are needed, two of each",
            where=kinds[0],
            got=counts,
        )
    x = np.stack([s.values.astype(np.float64).reshape(-1) for s in used])  # [n, k D]
    types = np.array([s.type for s in used])
    distances = _distances(x)
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(types) for _ in range(shuffles)]
    points, variance = principal_components(x)
    return StateFigures(
        kind=kinds[0],
        n=len(used),
        by_type=by_type,
        neighbour=_neighbour(distances, types),
        neighbour_chance=float(np.mean([_neighbour(distances, t) for t in shuffled])),
        silhouette=silhouette(distances, types),
        silhouette_chance=float(np.mean([silhouette(distances, t) for t in shuffled[:5]])),
        between=_between(x, types),
        purity=_purity(_clusters(x, len(by_type), rng), types),
        variance=[float(v) for v in variance[:8]],
        points=points[:, :2].round(4).tolist(),
        types=types.tolist(),
    )


def principal_components(x: Matrix) -> tuple[Matrix, Matrix]:
    """Coordinates [n, m] of the rows of ``x`` [n, d] along its principal components, and each
    component's share of the variance [m]; m is at least 2."""
    centred = x - x.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    total = float((s**2).sum())
    coordinates = u * s
    if coordinates.shape[1] < 2:
        coordinates = np.pad(coordinates, ((0, 0), (0, 2 - coordinates.shape[1])))
    return coordinates, (s**2 / total if total > 0 else np.zeros_like(s))


def silhouette(distances: Matrix, types: NDArray[Any]) -> float:
    """Mean silhouette of rows with these ``types`` [n], by their ``distances`` [n, n]."""
    names = sorted(set(types.tolist()))
    # Mean distance of each row to each type; to its own without itself (whose distance is 0).
    to_type = np.stack([distances[:, types == name].sum(1) for name in names], 1)  # [n, types]
    counts = np.array([(types == name).sum() for name in names], dtype=np.float64)
    own = np.array([names.index(t) for t in types.tolist()])
    rows = np.arange(len(types))
    inside = to_type[rows, own] / np.maximum(counts[own] - 1, 1)
    others = to_type / counts
    others[rows, own] = np.inf
    outside = others.min(1)
    larger = np.maximum(np.maximum(inside, outside), 1e-12)
    alone = counts[own] == 1  # by definition 0
    return float(np.where(alone, 0.0, (outside - inside) / larger).mean())


def _distances(x: Matrix) -> Matrix:
    squares = (x**2).sum(1)
    distances: Matrix = np.sqrt(np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0.0))
    np.fill_diagonal(distances, 0.0)
    return distances


def _neighbour(distances: Matrix, types: NDArray[Any]) -> float:
    apart = distances + np.diag(np.full(len(types), np.inf))
    return float((types[apart.argmin(1)] == types).mean())


def _between(x: Matrix, types: NDArray[Any]) -> float:
    total = float(((x - x.mean(0)) ** 2).sum())
    parts = [x[types == name] for name in sorted(set(types.tolist()))]
    between = sum(len(p) * float(((p.mean(0) - x.mean(0)) ** 2).sum()) for p in parts)
    return between / total if total > 0 else 0.0


def _clusters(x: Matrix, count: int, rng: np.random.Generator, tries: int = 8) -> NDArray[Any]:
    """k-means labels [n]: the best of some random starts."""
    best: tuple[float, NDArray[Any]] | None = None
    for _ in range(tries):
        centres = x[rng.choice(len(x), count, replace=False)]
        for _ in range(50):
            near = ((x**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * x @ centres.T).argmin(1)
            moved = np.stack(
                [x[near == c].mean(0) if (near == c).any() else centres[c] for c in range(count)]
            )
            if np.allclose(moved, centres):
                break
            centres = moved
        cost = float(((x - centres[near]) ** 2).sum())
        if best is None or cost < best[0]:
            best = (cost, near)
    assert best is not None
    return best[1]


def _purity(clusters: NDArray[Any], types: NDArray[Any]) -> float:
    right = 0
    for cluster in set(clusters.tolist()):
        _, counts = np.unique(types[clusters == cluster], return_counts=True)
        right += int(counts.max())
    return right / len(types)
