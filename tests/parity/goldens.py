"""Reads the golden files that lie beside: what the published release computed.

``meta.json`` of each variant explains its keys. ``clip_untied`` has no inputs of its own: they
are the ones of ``clip_tied``. A golden directory is a checkpoint directory, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parent / "golden"
VARIANTS = ("clip_tied", "clip_untied", "dino_tied", "sam_tied")
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

MODES: dict[str, dict[str, Any]] = {
    "run2_mask0": {"num_inner_forward_run": 2, "para_mask_id": 0},
    "run2_mask1": {"num_inner_forward_run": 2, "para_mask_id": 1},
    "run2_mask2": {"num_inner_forward_run": 2, "para_mask_id": 2},
    "run1": {"num_inner_forward_run": 1, "para_mask_id": 0},
    "run2_mask0_mrope": {"num_inner_forward_run": 2, "para_mask_id": 0},
}
"""Config fields of each mode; ``run2_mask0_mrope`` also passes the position ids in."""


@dataclass(frozen=True)
class Golden:
    """One variant: its directory, inputs and expected values."""

    variant: str

    @property
    def path(self) -> Path:
        return ROOT / self.variant

    @cached_property
    def meta(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((self.path / "meta.json").read_text())
        return data

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        own = self.path / "inputs.safetensors"
        return load_file(own if own.exists() else ROOT / "clip_tied" / "inputs.safetensors")

    @cached_property
    def expected(self) -> dict[str, Tensor]:
        return load_file(self.path / "expected.safetensors")

    def inputs(self, case: str) -> dict[str, Tensor]:
        """The arguments of ``forward`` for ``case``, without position ids."""
        stored = {k.split("/")[1]: v for k, v in self.stored.items() if k.startswith(f"{case}/")}
        for name in ("detection_images", "seg_images"):
            if f"{name}_u8" in stored:
                stored[name] = _pixels(stored.pop(f"{name}_u8"))
        for name in ("pixel_values", "clip_pixel_values"):
            refs = self.meta["pixel_refs"].get(f"{case}/{name}")
            if refs:
                stored[name] = torch.cat([self.stored[ref] for ref in refs])
        for name in ("position_ids_mrope", "rope_deltas"):
            stored.pop(name, None)
        return stored

    def mrope(self, case: str) -> Tensor:
        """The release's M-RoPE positions [3, B, L] of ``case``."""
        return self.stored[f"{case}/position_ids_mrope"]

    def value(self, case: str, mode: str, key: str) -> Tensor | None:
        """An expected value, or None where none is stored."""
        return self.expected.get(f"{case}/{mode}/{key}")


def _pixels(images: Tensor) -> Tensor:
    """uint8 [N, 3, s, s] to the encoder's input, as ``meta.json`` says."""
    size = {56: 224, 64: 1024}[images.shape[-1]]
    scale = size // images.shape[-1]
    big = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    return (big.float() / 255 - _MEAN) / _STD


@cache
def golden(variant: str) -> Golden:
    """The golden files of one variant, read once."""
    return Golden(variant)


def train_modes() -> list[tuple[str, str, str]]:
    """Every (variant, case, mode) that has a whole-sequence forward."""
    return [
        (variant, case, mode)
        for variant in VARIANTS
        for case, about in golden(variant).meta["cases"].items()
        for mode in about.get("modes", {})
    ]
