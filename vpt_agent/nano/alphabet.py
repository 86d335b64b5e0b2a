"""Symbols, colours, shapes and the font and background splits of the nano scenes."""

from __future__ import annotations

from typing import Final, Literal

Split = Literal["train", "unseen"]

# I, O, 0 and 1 are left out: in several fonts they cannot be told apart by anybody.
SYMBOLS: Final = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
MIN_LENGTH: Final = 3
MAX_LENGTH: Final = 6

# Longest side, in pixels, of the model's view of a whole scene.
GLOBAL_LONGEST: Final = 224
# Capital height of every string in pixels of that view: below 5.
MIN_CAP: Final = 3.8
MAX_CAP: Final = 4.8

# Tag colours as (hue in degrees, saturation range, value range).
COLOURS: Final[dict[str, tuple[float, tuple[float, float], tuple[float, float]]]] = {
    "red": (0.0, (0.80, 1.0), (0.70, 0.90)),
    "orange": (28.0, (0.85, 1.0), (0.92, 1.0)),
    "yellow": (55.0, (0.70, 0.95), (0.92, 1.0)),
    "green": (130.0, (0.65, 0.95), (0.40, 0.70)),
    "cyan": (182.0, (0.60, 0.90), (0.80, 0.98)),
    "blue": (225.0, (0.75, 1.0), (0.60, 0.95)),
    "purple": (280.0, (0.60, 0.90), (0.40, 0.65)),
    "pink": (325.0, (0.35, 0.60), (0.92, 1.0)),
    "white": (0.0, (0.0, 0.03), (0.95, 1.0)),
    "black": (0.0, (0.0, 0.05), (0.02, 0.12)),
}
SHAPES: Final = ("rectangular", "round", "oval", "hexagonal", "arrow-shaped")

# File stems in fonts/. The second list is never drawn in a training picture.
TRAIN_FONTS: Final = tuple(f"train{i:02d}" for i in range(22))
UNSEEN_FONTS: Final = tuple(f"unseen{i:02d}" for i in range(6))

TRAIN_BACKGROUNDS: Final = ("gradient", "noise", "stripes", "blobs", "shelves", "bricks")
UNSEEN_BACKGROUNDS: Final = ("checker", "rings", "scratches")


def fonts_of(split: Split) -> tuple[str, ...]:
    """Names of the fonts that a split may draw with."""
    return TRAIN_FONTS if split == "train" else UNSEEN_FONTS


def backgrounds_of(split: Split) -> tuple[str, ...]:
    """Names of the background kinds that a split may draw."""
    return TRAIN_BACKGROUNDS if split == "train" else UNSEEN_BACKGROUNDS
