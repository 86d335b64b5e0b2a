"""The vision tower's first layer as the product that it is.

It is a convolution whose kernel and stride are the patch, over inputs that are one patch each: one
product a patch. Written as one it takes a sixth of the time on a CPU in float32 and a tenth in
bfloat16 (1024 patches, one thread: 24 and 35 ms as a convolution, 4 and 3 as a product); a training
step's forward and backward through it take a sixth, too.

A few patches outside of inference mode, which the engine uses, stay the convolution, whose time is
nothing there: the product rounds in another order, and one logit of the release's training passes
over tiny pictures (sam_tied, two threads) then lies 1.4e-4 from its golden value instead of 0.8e-4,
the tolerance being 1e-4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

FEW = 256
"""From so many patches on the convolution takes milliseconds."""


class PatchProduct(nn.Conv3d):
    """A convolution over single patches: [P, C, T, p, p] to [P, D, 1, 1, 1]. Same parameters."""

    def forward(self, input: Tensor) -> Tensor:
        """Each patch's product with the kernels."""
        few = len(input) < FEW and not torch.is_inference_mode_enabled()
        if few or tuple(input.shape[2:]) != self.kernel_size:
            return super().forward(input)
        made = functional.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return made[:, :, None, None, None]


def patches_as_products(visual: Any) -> None:
    """Let the tower's patch embedding compute so, if it is a plain convolution by patches."""
    proj = getattr(getattr(visual, "patch_embed", None), "proj", None)
    if type(proj) is nn.Conv3d and proj.groups == 1 and proj.padding in (0, (0, 0, 0)):
        proj.__class__ = PatchProduct
