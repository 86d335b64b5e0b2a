"""The perception table of the shipped model's second version, and the shapes of its encoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from vpt_agent.nano.domain.sight import AGAIN
from vpt_agent.nano.views import GLOBAL_LONGEST, GRID
from vpt_agent.tokens.table import CLIP, DINO, REGION, SAM, PerceptionTable

VISUAL_TOKENS: Final = 256
"""Of dino and sam: 16 a side, whatever the picture's shape. clip has up to 324, by the shape."""

TABLE: Final = PerceptionTable(
    (
        replace(REGION, grid=GRID, answer_prefix=""),
        replace(CLIP, input_size=AGAIN["clip"]),
        replace(DINO, visual_tokens=VISUAL_TOKENS, input_size=AGAIN["dino"]),
        replace(SAM, visual_tokens=VISUAL_TOKENS, input_size=AGAIN["sam"]),
    )
)
"""Every re-encoding row declares an input larger than the first look's 224 pixels."""

ENCODERS: Final[dict[str, dict[str, Any]]] = {
    "detection": {
        # Narrower, a patch of 28 x 28 pixels does not fit into a token with its marks.
        "hidden_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "mlp_ratio": 3,
        "patch_size": AGAIN["dino"] // 16,
        "image_size": AGAIN["dino"],
        "layerscale_value": 1.0,
        "initializer_range": 0.06,
    },
    "seg": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "mlp_dim": 192,
        "patch_size": 8,
        "image_size": AGAIN["sam"],
        "output_channels": 64,
        "window_size": 8,
        # None: over all 4096 patches one layer would cost more than the whole base tower.
        "global_attn_indexes": [],
        "use_rel_pos": False,
        "initializer_range": 0.06,
    },
}
"""DINOv2 with patches as large as the base tower's visual tokens; SAM with small ones."""


def equal_size() -> tuple[PerceptionTable, dict[str, dict[str, Any]]]:
    """Table and encoder shapes of the variant to report beside it: no second look is larger.

    clip looks at what the first look saw; dino and sam get about the first look's 224 pixels, with
    patches so much smaller that the visual tokens are as many as before.
    """
    sizes = {"dino": GLOBAL_LONGEST, "sam": GLOBAL_LONGEST}
    kinds = [replace(k, input_size=sizes.get(k.name)) for k in TABLE.kinds]
    shapes = {name: dict(shape) for name, shape in ENCODERS.items()}
    shapes["detection"] |= {"patch_size": GLOBAL_LONGEST // 16, "image_size": GLOBAL_LONGEST}
    shapes["seg"] |= {"patch_size": 7, "image_size": GLOBAL_LONGEST}
    return PerceptionTable(tuple(kinds)), shapes
