"""The VPT model on transformers' Qwen-VL classes. Importing this tells the Auto classes of it."""

from vpt_agent.model.configuration import VPTConfig, perception_manifest
from vpt_agent.model.fresh import config_on_base
from vpt_agent.model.modeling import VPTForConditionalGeneration, VPTOutput
from vpt_agent.model.own_kind import AddedKind, add_perception_kind, mark_trained
from vpt_agent.model.processing import VPTProcessor
from vpt_agent.model.processing import register as _register_processor

_register_processor()

__all__ = [
    "AddedKind",
    "VPTConfig",
    "VPTForConditionalGeneration",
    "VPTOutput",
    "VPTProcessor",
    "add_perception_kind",
    "config_on_base",
    "mark_trained",
    "perception_manifest",
]
