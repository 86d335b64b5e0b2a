"""Pictures: loading, coordinate frames, and the inputs of the vision towers.

``images`` reads them, ``frames`` converts coordinates, ``policy`` decides sizes, ``patches`` and
``encoders`` make the towers' inputs through :mod:`vpt_agent.kernels`.
"""

from vpt_agent.vision.encoders import dino_pixels, sam_pixels
from vpt_agent.vision.frames import clamp, crop_view, in_view, to_original, to_view
from vpt_agent.vision.images import load_image, load_views
from vpt_agent.vision.patches import Patches, look, pixels_of
from vpt_agent.vision.policy import (
    DEFAULT_POLICY,
    PUBLISHED_POLICY,
    ImagePolicy,
    ResizePlan,
)

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
