"""SAM behind one question: which pixels belong to what is pointed at?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vpt_agent.errors import CheckpointError, MissingExtraError
from vpt_agent.types import View

if TYPE_CHECKING:
    import torch

Mask = npt.NDArray[np.bool_]


class Prompt(NamedTuple):
    """What is pointed at, in pixels of a view: points (x, y), which of them belong to it, a box."""

    points: Sequence[tuple[float, float]]
    inside: Sequence[bool]
    box: Sequence[float] | None


class Found(NamedTuple):
    """The mask [H, W] of the view, and how good the model thinks it is, 0 to 1."""

    mask: Mask
    quality: float


class Sam(Protocol):
    """A loaded model."""

    def find(self, view: View, prompt: Prompt) -> Found:
        """The best of the model's masks."""
        ...


class TransformersSam:
    """A folder that transformers wrote, or a name on the hub."""

    def __init__(self, name: str | Path, device: str) -> None:
        import torch
        from transformers import SamModel

        try:
            model: Any = SamModel.from_pretrained(str(name), dtype=torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                "this SAM model cannot be loaded",
                where=name,
                got=str(error).splitlines()[0] if str(error) else type(error).__name__,
                expected="a folder that SamModel.save_pretrained wrote, or an original .pth file",
            ) from error
        self.model = model.to(device).eval()
        self.size = int(model.config.vision_config.image_size)

    def find(self, view: View, prompt: Prompt) -> Found:
        """The best mask; pictures and points are scaled as SAM's processor does it."""
        import torch

        from vpt_agent.vision.encoders import sam_pixels

        width, height = view.size
        scale = self.size / max(view.size)
        inner = max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
        stretch = inner[0] / width, inner[1] / height
        device = next(self.model.parameters()).device
        values: dict[str, Any] = {"pixel_values": sam_pixels(view, size=self.size)[None].to(device)}
        if prompt.points:
            points = [[x * stretch[0], y * stretch[1]] for x, y in prompt.points]
            labels = [int(inside) for inside in prompt.inside]
            values["input_points"] = torch.tensor([[points]], device=device)  # [1, 1, N, 2]
            values["input_labels"] = torch.tensor([[labels]], device=device)
        if prompt.box is not None:
            box = [v * stretch[i % 2] for i, v in enumerate(prompt.box)]
            values["input_boxes"] = torch.tensor([[box]], device=device)  # [1, 1, 4]
        with torch.inference_mode():
            out = self.model(**values, multimask_output=True)
        best = int(out.iou_scores[0, 0].argmax())
        logits = out.pred_masks[0, :, best : best + 1].float()  # [1, 1, h, w]
        mask = _full_size(logits, self.size, inner, view.size)
        return Found(mask, float(out.iou_scores[0, 0, best]))


def _full_size(
    logits: torch.Tensor, size: int, inner: tuple[int, int], whole: tuple[int, int]
) -> Mask:
    """Low-resolution logits [1, 1, h, w] of the padded square to a mask [H, W] of the picture."""
    from torch.nn import functional

    big = functional.interpolate(logits, (size, size), mode="bilinear", align_corners=False)
    cut = big[..., : inner[1], : inner[0]]
    fitted = functional.interpolate(cut, whole[::-1], mode="bilinear", align_corners=False)
    mask: Mask = (fitted[0, 0] > 0).cpu().numpy()
    return mask


class OriginalSam:
    """An original ``.pth`` checkpoint through segment-anything; nothing in the file is run."""

    def __init__(self, path: Path, device: str) -> None:
        from vpt_agent.vision.sam_checkpoint import read_sam, sam_sizes

        error = missing_original()
        if error is not None:
            raise error
        try:
            from segment_anything import SamPredictor
        except (ImportError, RuntimeError, OSError) as error:
            raise MissingExtraError(
                "segment-anything cannot be imported: it needs a working torchvision",
                got=f"{type(error).__name__}: {error}",
                fix="install the torchvision that belongs to this torch, or convert the checkpoint "
                "once with vpt_agent.model.sam_checkpoint.convert_sam(FILE, FOLDER) and name the "
                "folder: that needs neither",
            ) from error
        state = read_sam(path)
        model = _built(sam_sizes(state, path))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(
                "the tensors of this SAM checkpoint do not fit each other",
                where=path,
                got=str(error).splitlines()[0],
            ) from error
        self.predictor = SamPredictor(model.to(device).eval())

    def find(self, view: View, prompt: Prompt) -> Found:
        """The best mask, by segment-anything's own predictor."""
        self.predictor.set_image(np.array(view.image))
        masks, qualities, _ = self.predictor.predict(
            point_coords=np.array(prompt.points, dtype=np.float32) if prompt.points else None,
            point_labels=np.array(prompt.inside, dtype=np.int64) if prompt.points else None,
            box=None if prompt.box is None else np.array(prompt.box, dtype=np.float32),
            multimask_output=True,
        )
        best = int(np.argmax(qualities))
        return Found(np.asarray(masks[best], dtype=bool), float(qualities[best]))


def missing_original() -> MissingExtraError | None:
    """What original checkpoints need and is not installed."""
    if find_spec("segment_anything") is not None:
        return None
    return MissingExtraError(
        "original SAM checkpoints (.pth) need the extra sam",
        got="segment-anything is not installed",
        fix="pip install 'vpt-agent[sam]' and a torchvision that belongs to this torch; or convert "
        "the checkpoint once with vpt_agent.model.sam_checkpoint.convert_sam(FILE, FOLDER) and "
        "name the folder: that needs neither",
    )


def _built(sizes: Any) -> Any:
    """segment-anything's model of these sizes; its registry builds the three released ones only."""
    import torch
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        TwoWayTransformer,
    )
    from segment_anything.modeling import Sam as Original

    vision, decoder = sizes.vision, sizes.decoder
    side, size = vision["image_size"] // vision["patch_size"], vision["image_size"]
    return Original(
        image_encoder=ImageEncoderViT(
            img_size=size,
            patch_size=vision["patch_size"],
            embed_dim=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            mlp_ratio=vision["mlp_dim"] / vision["hidden_size"],
            out_chans=vision["output_channels"],
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=vision["window_size"],
            global_attn_indexes=tuple(vision["global_attn_indexes"]),
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=vision["output_channels"],
            image_embedding_size=(side, side),
            input_image_size=(size, size),
            mask_in_chans=sizes.prompt["mask_input_channels"],
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=decoder["hidden_size"],
            transformer=TwoWayTransformer(
                depth=decoder["num_hidden_layers"],
                embedding_dim=decoder["hidden_size"],
                mlp_dim=decoder["mlp_dim"],
                num_heads=decoder["num_attention_heads"],
            ),
            num_multimask_outputs=decoder["num_multimask_outputs"],
            iou_head_depth=decoder["iou_head_depth"],
            iou_head_hidden_dim=decoder["iou_head_hidden_dim"],
        ),
    )
