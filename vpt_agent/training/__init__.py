"""Training: rows to batches, the loop on transformers' Trainer, which parameters learn, figures."""

from vpt_agent.training.collate import Collator, Item, plan_batches
from vpt_agent.training.config import TrainConfig, make_config, read_config
from vpt_agent.training.freeze import freeze, trainable_names
from vpt_agent.training.metrics import ClassAccuracy
from vpt_agent.training.run import Trained, train

__all__ = [
    "ClassAccuracy",
    "Collator",
    "Item",
    "TrainConfig",
    "Trained",
    "freeze",
    "make_config",
    "plan_batches",
    "read_config",
    "train",
    "trainable_names",
]
