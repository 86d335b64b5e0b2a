"""Stock image-text-to-text models of transformers, talked to by their chat template."""

from vpt_agent.model.chat.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
