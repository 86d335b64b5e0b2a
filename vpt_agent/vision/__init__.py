"""Pictures: loading, coordinate frames, and the inputs of the vision towers.

``images`` reads them, ``frames`` converts coordinates, ``policy`` decides sizes; these load no
torch. ``patches`` and ``encoders`` make the towers' inputs through :mod:`vpt_agent.kernels`, and
are imported when one of their names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from vpt_agent.vision.frames import clamp, crop_view, in_view, to_original, to_view
from vpt_agent.vision.images import load_image, load_views
from vpt_agent.vision.policy import (
    DEFAULT_POLICY,
    PUBLISHED_POLICY,
    ImagePolicy,
    ResizePlan,
)

if TYPE_CHECKING:
    from vpt_agent.vision.encoders import dino_pixels, sam_pixels
    from vpt_agent.vision.patches import Patches, look, pixels_of

_LAZY = {
    "Patches": "patches",
    "dino_pixels": "encoders",
    "look": "patches",
    "pixels_of": "patches",
    "sam_pixels": "encoders",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


__all__ = [
    "DEFAULT_POLICY",
    "PUBLISHED_POLICY",
    "ImagePolicy",
    "Patches",
    "ResizePlan",
    "clamp",
    "crop_view",
    "dino_pixels",
    "in_view",
    "load_image",
    "load_views",
    "look",
    "pixels_of",
    "sam_pixels",
    "to_original",
    "to_view",
]
