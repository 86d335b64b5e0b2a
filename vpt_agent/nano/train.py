"""Train one stage with transformers' Trainer; every run can be resumed from its checkpoint."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vpt_agent.nano.batches import Stage, StageBatches
from vpt_agent.nano.conversation import Encoder
from vpt_agent.nano.model import DenseHeads, DenseTower, answer_loss, build_model
from vpt_agent.nano.tokenizer import build_tokenizer

SEED: Final = 7


@dataclass(frozen=True)
class StageConfig:
    """Batch size, samples until the cosine schedule ends, and peak learning rate of a stage."""

    batch: int
    samples: int
    rate: float
    warmup: int = 100


# The baselines see as many scene questions as the model that looks.
STAGES: Final[dict[Stage, StageConfig]] = {
    "tower": StageConfig(96, 96_000, 1e-3),
    "read": StageConfig(64, 110_000, 1e-3),
    "scenes": StageConfig(16, 64_000, 7e-4),
    "baseline-global": StageConfig(32, 64_000, 7e-4),
    "baseline-large": StageConfig(32, 64_000, 7e-4),
}


class _StageTrainer(Trainer):
    """Trainer whose loss comes from this package's batched forward pass."""

    metrics: dict[str, list[float]]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The stage's loss; the shares of right predictions go to the next log line."""
        core: Any = model
        if isinstance(core, DenseTower):
            loss, found = core(inputs)
        else:
            loss, found = answer_loss(core, inputs)
        for name, value in found.items():
            if value == value:
                self.metrics.setdefault(name, []).append(value)
        return (loss, {}) if return_outputs else loss

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `_continued` has loaded the weights."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the collected metrics to a log line."""
        if "loss" in logs:
            for name, values in self.metrics.items():
                logs[name] = sum(values) / len(values)
            self.metrics = {}
        super().log(logs, *args, **kwargs)


class _Progress(TrainerCallback):
    """JSON lines on stderr and in a file, a stop after some minutes, plain exports."""

    def __init__(self, out: Path, minutes: float | None, batch: int, export: Any) -> None:
        self.out, self.minutes, self.batch, self.export = out, minutes, batch, export
        self.begun = time.monotonic()
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember where this run began."""
        self.begun, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when the time is up; a checkpoint is written first."""
        if self.minutes is not None and time.monotonic() - self.begun > self.minutes * 60:
            control.should_save = True
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep a usable model beside the checkpoint."""
        self.export()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One JSON line per log."""
        logs = kwargs.get("logs") or {}
        seconds = time.monotonic() - self.begun
        line = {
            "step": state.global_step,
            "samples": state.global_step * self.batch,
            "seconds": round(seconds, 1),
            "samples_per_s": round((state.global_step - self.first) * self.batch / seconds, 1),
            **{k: round(v, 5) for k, v in logs.items() if isinstance(v, float)},
        }
        text = json.dumps(line)
        print(text, file=sys.stderr, flush=True)
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(text + "\n")


def load_model(directory: Path) -> Any:
    """A saved nano model (Qwen2VLForConditionalGeneration) in float32."""
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa"
    )


def _start(stage: Stage, out: Path) -> Any:
    """The stage's model before its first step: each stage begins with the previous one's."""
    tokenizer = build_tokenizer()
    torch.manual_seed(SEED)
    if stage == "tower":
        return DenseTower(build_model(tokenizer).model.visual)
    if stage == "read":
        model = build_model(tokenizer)
        state = load_file(out / "tower" / "tower.safetensors")
        visual = {k.removeprefix("visual."): v for k, v in state.items() if "visual." in k}
        model.model.visual.load_state_dict(visual)
        return _with_head(model, state, "dense.")
    model = load_model(out / "read")
    if stage == "scenes":
        return _with_head(model, load_file(out / "read" / "dense.safetensors"), "")
    return model


def _with_head(model: Any, state: dict[str, Tensor], prefix: str) -> Any:
    """Add the dense heads whose weights have this prefix in `state`."""
    model.dense = DenseHeads()
    head = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    model.dense.load_state_dict(head)
    return model


def _continued(stage: Stage, checkpoint: Path) -> Any:
    """The model of a checkpoint.

    Not left to Trainer: it writes Qwen2-VL weights under the published names and then looks for
    the module's own, so that it would go on from fresh weights with no more than a warning.
    """
    if stage == "tower":
        tower = DenseTower(build_model(build_tokenizer()).model.visual)
        tower.load_state_dict(load_file(checkpoint / "model.safetensors"))
        return tower
    model = load_model(checkpoint)
    if stage in ("read", "scenes"):
        return _with_head(model, load_file(checkpoint / "model.safetensors"), "dense.")
    return model


def _export(model: nn.Module, directory: Path) -> None:
    core: Any = model
    if isinstance(core, DenseTower):
        save_file(core.state_dict(), directory / "tower.safetensors")
    else:
        # In bfloat16, as shipped; a copy, since training goes on in float32.
        state = {
            k: v.to(torch.bfloat16)
            for k, v in core.state_dict().items()
            if not k.startswith("dense.")
        }
        core.save_pretrained(directory, state_dict=state)
        if hasattr(core, "dense"):
            save_file(core.dense.state_dict(), directory / "dense.safetensors")
        build_tokenizer().save_pretrained(directory)


def train_stage(
    stage: Stage,
    out: Path,
    minutes: float | None = None,
    resume: bool = False,
    samples: int | None = None,
    threads: int = 2,
) -> None:
    """Train a stage into `out/STAGE`, from drawn scenes in `out/pool`.

    `minutes` stops early with a checkpoint that `resume` continues; `samples` replaces the
    length of the schedule. On a shared machine two stages with one of the `threads` each are
    faster than one after the other with two, since threads wait for each other.
    """
    config = STAGES[stage]
    directory = out / stage
    directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    last = get_last_checkpoint(str(directory)) if resume else None
    model = _continued(stage, Path(last)) if last else _start(stage, out)
    done = int(last.rsplit("-", 1)[1]) if last else 0
    steps = (samples or config.samples) // config.batch
    arguments = TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        bf16=True,
        max_steps=steps,
        per_device_train_batch_size=1,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        learning_rate=config.rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=25,
        save_steps=200,
        save_total_limit=1,
        remove_unused_columns=False,
        # Otherwise accelerate cuts every tensor of a batch to the length of the first.
        accelerator_config={"dispatch_batches": False},
        ignore_data_skip=True,
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
    )
    data = StageBatches(stage, out / "pool", Encoder(build_tokenizer()), config.batch, done)
    trainer = _StageTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=lambda items: items[0],
        callbacks=[_Progress(directory, minutes, config.batch, lambda: _export(model, directory))],
    )
    trainer.metrics = {}
    trainer.train(resume_from_checkpoint=last)
    _export(model, directory)
