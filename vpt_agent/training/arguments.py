"""transformers' TrainingArguments, from a config."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from vpt_agent.errors import UserError
from vpt_agent.training.config import TrainConfig


def arguments(config: TrainConfig, *, rows: int | None, evaluates: bool) -> TrainingArguments:
    """transformers' arguments; ``config.trainer`` has the last word on what is not decided here.

    ``rows`` is how many there are to train on: an epoch's length (None: unknown, and not needed
    where the config says steps). Old checkpoints are removed by :class:`VPTTrainer`, not by
    transformers: it would remove the last whole one before the next is whole.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    optim = config.optim
    steps = config.steps
    if steps is None:
        batch = config.data.rows * optim.accumulate * world
        steps = max(1, math.ceil((config.epochs or 1) * (rows or 1) / batch))
    values: dict[str, Any] = {
        "output_dir": str(config.out),
        "max_steps": steps,
        "per_device_train_batch_size": config.data.rows,
        "gradient_accumulation_steps": optim.accumulate,
        "learning_rate": optim.learning_rate,
        "weight_decay": optim.weight_decay,
        "adam_beta1": optim.betas[0],
        "adam_beta2": optim.betas[1],
        "adam_epsilon": optim.epsilon,
        "max_grad_norm": optim.clip,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": math.ceil(optim.warmup * steps),
        "bf16": config.precision == "bfloat16",
        "seed": config.seed,
        "use_cpu": config.device == "cpu",
        "logging_steps": config.log_every,
        "eval_strategy": "steps" if config.evaluate_every and evaluates else "no",
        "eval_steps": config.evaluate_every,
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or 500,
        "dataloader_num_workers": config.data.workers,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "ignore_data_skip": True,  # our batches know where they stood
        # A batch need not have every kind, and some published parameters are never used.
        "ddp_find_unused_parameters": True if world > 1 else None,
        "report_to": ["tensorboard"] if _has("tensorboard") else [],
        "disable_tqdm": True,
    }
    if config.gradient_checkpointing:
        name = _checkpointing()
        values |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    try:
        made = TrainingArguments(**(values | config.trainer))
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(
            "transformers refuses these arguments", where="trainer", got=str(error)
        ) from error
    _require_possible(made, world)
    return made


def _require_possible(made: TrainingArguments, world: int) -> None:
    """Refuse what would end later and less clearly: ``world`` processes, their GPUs and shards."""
    if made.n_gpu > 1:  # transformers would copy the model to each, and cut our batches to pieces
        raise UserError(
            "one process trains on one GPU",
            got=f"{made.n_gpu} GPUs",
            fix="start one process for each with torchrun, or set CUDA_VISIBLE_DEVICES=0",
        )
    sharding: Any = made.fsdp_config or {}
    if made.fsdp and sharding.get("activation_checkpointing"):
        # It runs a layer again with the keys and values that the first time has left.
        raise UserError(
            "FSDP's own checkpointing cannot run a layer that goes on from earlier keys",
            where="trainer.fsdp_config.activation_checkpointing",
            fix="leave it out, and set gradient_checkpointing: true",
        )
    if made.fsdp and world == 1:
        raise UserError(
            "one process has nobody to share weights with",
            where="trainer.fsdp",
            fix="start several with torchrun --nproc-per-node N, or train without fsdp",
        )


def _checkpointing() -> str:
    """What the installed transformers calls gradient checkpointing."""
    known = {field.name for field in fields(TrainingArguments)}
    new = "activation_checkpointing"
    return new if new in known else "gradient_checkpointing"


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
