"""LoRA by peft, put into the model in place, and merged into its weights on saving."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vpt_agent.errors import MissingExtraError, UserError
from vpt_agent.training.config import LoraPart

if TYPE_CHECKING:
    from vpt_agent.model import VPTForConditionalGeneration


def add_lora(model: VPTForConditionalGeneration, part: LoraPart) -> Any:
    """Put LoRA layers into ``model``; returns peft's tuner, for :func:`merge_lora`.

    Of the model only LoRA weights and the parameters whose names hold one of ``part.also`` learn.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise MissingExtraError("LoRA needs peft", fix='pip install "vpt-agent[train]"') from error
    names = [name for name, _ in model.named_modules()]
    if not any(re.fullmatch(part.targets, name) for name in names):
        raise UserError(
            "no module has a name that LoRA is for",
            where="lora.targets",
            got=part.targets,
            expected="a pattern for the whole name, such as model.layers.0.self_attn.q_proj",
        )
    parameters = [name for name, _ in model.named_parameters()]
    unknown = [one for one in part.also if not any(one in name for name in parameters)]
    if unknown:
        raise UserError(
            "no parameter has this in its name", where="lora.also", got=", ".join(unknown)
        )
    config = LoraConfig(
        r=part.rank,
        lora_alpha=part.alpha,
        lora_dropout=part.dropout,
        target_modules=part.targets,
        bias="none",
    )
    tuner = LoraModel(model, config, "default")
    for name, parameter in model.named_parameters():
        if any(one in name for one in part.also):
            parameter.requires_grad_(True)
    return tuner


def merge_lora(tuner: Any) -> VPTForConditionalGeneration:
    """The model with its LoRA layers merged into the weights: no trace of peft is left."""
    merged: VPTForConditionalGeneration = tuner.merge_and_unload()
    return merged
