"""What is known of each family of stock models: in what frame it writes boxes, and how it sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vpt_agent.model.bases import BASES, Base
from vpt_agent.tool.habits import Coordinates


@dataclass(frozen=True)
class Family:
    """``base`` says what its configs hold; ``min_pixels`` and ``max_pixels`` bound the area of a
    picture where the checkpoint has no file of its image processor."""

    base: Base
    coordinates: Coordinates
    min_pixels: int = 3136
    max_pixels: int = 12845056


FAMILIES: Mapping[str, Family] = {
    family.base.name: family
    for family in (
        Family(BASES["qwen2_vl"], "norm1000"),
        Family(BASES["qwen2_5_vl"], "shown"),
        Family(BASES["qwen3_vl"], "norm1000", min_pixels=65536, max_pixels=16777216),
    )
}
"""The families with adapters of their own, by ``model_type``. Boxes: Qwen2-VL and Qwen3-VL were
trained on 0 to 1000, Qwen2.5-VL on pixels of the resized picture, as their reports say."""
