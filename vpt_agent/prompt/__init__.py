"""Conversations as token ids. Loads no torch."""

from vpt_agent.prompt.vpt import FeatureSlot, Ids, Outcome, PictureSlot, PromptPart, VPTLayout

__all__ = ["FeatureSlot", "Ids", "Outcome", "PictureSlot", "PromptPart", "VPTLayout"]
