"""Frozen towers see a picture once: within a batch always, across batches as long as it is kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vpt_agent.errors import UserError


class FeatureMemory:
    """Tower outputs by picture, the least used forgotten first; at most ``size`` bytes.

    Only for towers that do not learn, and for one set of weights and sizes: a key (path, crop)
    says nothing about them.
    """

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[tuple[str, str], Tensor] = OrderedDict()

    def get(self, key: tuple[str, str]) -> Tensor | None:
        """What is kept of a picture (tower, picture), or None."""
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return found

    def put(self, key: tuple[str, str], value: Tensor) -> None:
        """Keep a picture's output, and forget others if there is no room."""
        if key in self._kept:
            return
        kept = value.detach().clone()
        self._kept[key] = kept
        self.used += kept.nbytes
        while self.used > self.size:
            _, old = self._kept.popitem(last=False)
            self.used -= old.nbytes


def encode_once(
    encode: Callable[[list[int]], Sequence[Tensor]],
    keys: Sequence[str],
    seen: dict[tuple[str, str], Tensor],
    memory: FeatureMemory | None,
    *,
    tower: str,
) -> list[Tensor]:
    """Outputs of ``tower`` for the pictures ``keys``; ``encode`` gets the numbers of the new ones.

    ``seen`` collects the outputs of this forward, so a picture that comes twice is encoded once;
    gradients, where there are any, add up in it.
    """
    names = [(tower, key) for key in keys]
    fresh: dict[tuple[str, str], int] = {}
    for number, name in enumerate(names):
        if name in seen or name in fresh:
            continue
        known = None if memory is None else memory.get(name)
        if known is None:
            fresh[name] = number
        else:
            seen[name] = known
    if fresh:
        made = encode(list(fresh.values()))
        for name, output in zip(fresh, made, strict=True):
            seen[name] = output
            if memory is not None:
                memory.put(name, output)
    return [seen[name] for name in names]


def pictures_of(
    numbers: Sequence[int], pixel_values: Tensor, grids: Tensor
) -> tuple[Tensor, Tensor]:
    """The patches and grids of some pictures of a batch."""
    if len(numbers) == len(grids):
        return pixel_values, grids
    pieces = torch.split(pixel_values, grids.prod(-1).tolist())
    return torch.cat([pieces[i] for i in numbers]), grids[list(numbers)]


def check_keys(keys: Sequence[str], count: int, *, kind: str) -> None:
    """One key for each picture, or a :class:`UserError`."""
    if len(keys) != count:
        raise UserError(
            "pictures and their keys differ in number",
            where=f"picture_keys[{kind!r}]",
            got=f"{len(keys)} keys, {count} pictures",
        )
