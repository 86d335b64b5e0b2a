"""What is known of each family of stock models: how it sees, and in what frame it writes boxes.

One row per ``model_type`` of transformers. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vpt_agent.tool.habits import Coordinates

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@dataclass(frozen=True)
class Family:
    """``images`` are the numbers of its image processor, where the checkpoint's file is missing."""

    model_type: str
    coordinates: Coordinates
    images: Mapping[str, Any] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2_vl", "norm1000", {"patch": 14}),
        Family("qwen2_5_vl", "shown", {"patch": 14}),
        Family("qwen3_vl", "norm1000", {"patch": 16, "min_pixels": 65536} | HALF),
    )
}
"""The families with adapters of their own. Boxes: Qwen2-VL and Qwen3-VL were trained on 0 to 1000,
Qwen2.5-VL on pixels of the resized picture (as their own documentation says)."""
