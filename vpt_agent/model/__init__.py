"""The VPT model on transformers' Qwen2-VL classes. Importing this tells the Auto classes of it."""

from vpt_agent.model.configuration import VPTConfig, perception_manifest
from vpt_agent.model.modeling import VPTForConditionalGeneration, VPTOutput

__all__ = ["VPTConfig", "VPTForConditionalGeneration", "VPTOutput", "perception_manifest"]
