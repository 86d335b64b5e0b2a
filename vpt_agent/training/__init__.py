"""Training: which parameters learn, and what is measured while they do."""

from vpt_agent.training.freeze import freeze, trainable_names
from vpt_agent.training.metrics import ClassAccuracy

__all__ = ["ClassAccuracy", "freeze", "trainable_names"]
