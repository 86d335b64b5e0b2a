"""Original SAM checkpoints (`.pth`) as models of transformers: the encoder alone, or the whole."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import SamConfig, SamModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from vpt_agent.errors import CheckpointError
from vpt_agent.vision.sam_checkpoint import (
    ENCODER,
    converted,
    converted_encoder,
    read_sam,
    sam_sizes,
)


def original_encoder(path: Path) -> nn.Module:
    """The vision encoder of an original checkpoint as transformers' ``SamVisionEncoder``, float32.

    Input [N, 3, S, S], output ``last_hidden_state`` [N, W, S / patch, S / patch]. Every tensor
    must fit: else a :class:`CheckpointError` names those that do not.
    """
    state = read_sam(path)
    model: nn.Module = SamVisionEncoder(SamVisionConfig(**sam_sizes(state, path).vision))
    _fill(model, converted_encoder(state), path)
    return model.eval()


def original_sam(path: Path) -> SamModel:
    """The whole of an original checkpoint as transformers' ``SamModel``, float32."""
    state = read_sam(path)
    sizes = sam_sizes(state, path)
    config = SamConfig(
        vision_config=sizes.vision,
        prompt_encoder_config=sizes.prompt,
        mask_decoder_config=sizes.decoder,
    )
    model = SamModel(config)
    _fill(model, converted(state), path)
    return model.eval()


def convert_sam(path: str | Path, folder: str | Path) -> Path:
    """Write an original checkpoint as a folder that transformers' ``SamModel`` loads."""
    target = Path(folder)
    original_sam(Path(path)).save_pretrained(target)
    return target


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise CheckpointError(
            "the tensors of this SAM checkpoint do not fit each other",
            where=path,
            got="; ".join(line.strip() for line in lines[1:4])[:400] or lines[0],
            expected=f"a model of segment-anything ({ENCODER}* and the rest)",
        ) from error
