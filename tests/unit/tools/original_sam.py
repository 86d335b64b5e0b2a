"""A tiny model of the original segment-anything, whose package needs torchvision to be imported.

Its model classes do not: they are imported past the package's ``__init__``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch

NAME = "segment_anything"


def modeling() -> ModuleType:
    """``segment_anything.modeling``; skips the test where the package is not installed."""
    spec = importlib.util.find_spec(NAME)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("segment-anything is not installed (extra sam)")
    held = {k: m for k, m in sys.modules.items() if k == NAME or k.startswith(f"{NAME}.")}
    for key in held:
        del sys.modules[key]
    bare = ModuleType(NAME)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[NAME] = bare
    try:
        return importlib.import_module(f"{NAME}.modeling")
    finally:
        for key in [k for k in sys.modules if k == NAME or k.startswith(f"{NAME}.")]:
            del sys.modules[key]
        sys.modules.update(held)


def tiny_sam(*, seed: int = 0, side: int = 64, patch: int = 8) -> Any:
    """An original ``Sam`` with random weights: ``side`` pixels, width 16, one window layer."""
    parts = modeling()
    torch.manual_seed(seed)
    grid = side // patch
    model = parts.Sam(
        image_encoder=parts.ImageEncoderViT(
            img_size=side, patch_size=patch, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2,
            out_chans=16, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), use_rel_pos=True,
            window_size=3, global_attn_indexes=(1,),
        ),
        prompt_encoder=parts.PromptEncoder(
            embed_dim=16, image_embedding_size=(grid, grid), input_image_size=(side, side),
            mask_in_chans=8,
        ),
        mask_decoder=parts.MaskDecoder(
            transformer_dim=16,
            transformer=parts.TwoWayTransformer(
                depth=2, embedding_dim=16, mlp_dim=24, num_heads=8
            ),
            iou_head_hidden_dim=12,
        ),
    )  # fmt: skip
    for name, tensor in model.named_parameters():
        if "pos" in name or "norm" in name:  # zeros and ones would hide what is mixed up
            torch.nn.init.normal_(tensor, 0.2, 0.3)
    return model.eval()
