"""Train the early stages of the second version; the last one is ``vpt-agent train``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vpt_agent.errors import CheckpointError
from vpt_agent.nano.second.batches import Batch, SecondBatches, Stage
from vpt_agent.nano.second.model import Second, build_second
from vpt_agent.nano.second.text import SecondEncoder, second_tokenizer
from vpt_agent.nano.train import _Progress

SEED: Final = 11
WEIGHTS: Final = "second.safetensors"


@dataclass(frozen=True)
class StageConfig:
    """Steps until the cosine schedule ends, peak learning rate, warm-up steps of a stage."""

    steps: int
    rate: float
    warmup: int = 100


STAGES: Final[dict[Stage, StageConfig]] = {
    "see": StageConfig(8000, 1e-3),
    "talk": StageConfig(5600, 7e-4, 200),
}


ONLY: Final[dict[str, tuple[str, ...]]] = {
    "clip": ("clip", "clip", "chars"),
    "dino": ("dino",),
    "sam": ("sam",),
}


class _SecondTrainer(Trainer):  # type: ignore[misc]
    """Trainer whose model computes its own loss from a whole batch."""

    found: dict[str, list[float]]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer's own warns of the tied embedding, which is saved once, and fails at that for a
        # module that is not its own.
        source = Path(resume_from_checkpoint) / "model.safetensors"
        core: Any = self.model if model is None else model
        core.load_weights(load_file(source), where=source)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The batch's loss; shares of right predictions go to the next log line."""
        loss, metrics = model(inputs)
        own = {f"{inputs['name']}_loss": float(loss.detach())}
        for name, value in {**metrics, **own}.items():
            if value == value:
                self.found.setdefault(name, []).append(value)
        return (loss, {}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the collected metrics to a log line."""
        if "loss" in logs:
            for name, values in self.found.items():
                logs[name] = sum(values) / len(values)
            self.found = {}
        super().log(logs, *args, **kwargs)


def load_second(
    out: Path, stage: Stage, first: Path | None = None, begin: Path | None = None
) -> Second:
    """The model that a stage begins with: fresh, or what the stage before it has learnt.

    ``first`` is a checkpoint of the first version, from which the first stage goes on. Where the
    stage ``see`` ran for each encoder by itself, every encoder comes from its own run.
    """
    torch.manual_seed(SEED)
    model = Second(build_second(second_tokenizer()))
    if begin is not None:
        if not begin.is_file():
            raise CheckpointError("there are no such weights to begin with", where=begin)
        model.load_weights(load_file(begin), where=begin)
        return model
    if stage == "see":
        if first is not None:
            take_first(model, first)
        return model
    sources = [out / "see" / WEIGHTS]
    if not sources[0].is_file():
        sources = [out / f"see-{kind}" / WEIGHTS for kind in ("clip", *_OWN)]
    for source in sources:
        if not source.is_file():
            raise CheckpointError(
                "the stage before this one has left nothing",
                where=source,
                fix="run the stage see into the same folder first",
            )
    state = load_file(sources[0])
    for kind, source in zip(_OWN, sources[1:], strict=False):
        own = load_file(source)
        state |= {k: v for k, v in own.items() if k.startswith(_OWN[kind])}
    model.load_weights(state, where=out)
    return model


# What a run of the stage see for one encoder learns.
_OWN: Final = {
    "dino": ("vpt.detection_model.", "marks.dino."),
    "sam": ("vpt.seg_model.", "marks.sam."),
}


def take_first(model: Second, source: Path) -> None:
    """Go on from the first version: its tower and language model, its words' embeddings.

    A token that it did not have begins beside the mean of those that it would have been cut into.
    """
    from transformers import Qwen2TokenizerFast

    if not (source / "model.safetensors").is_file():
        raise CheckpointError("there is no such checkpoint", where=source)
    state = load_file(source / "model.safetensors")
    own = {
        f"vpt.{k}": v.float()
        for k, v in state.items()
        if k.startswith(("visual.", "model.")) and k != _EMBEDDINGS
    }
    _, unexpected = model.load_state_dict(own, strict=False)
    if unexpected or not own:
        raise CheckpointError(
            "this is no checkpoint of the first version", where=source, got=unexpected[:10]
        )
    old, new = Qwen2TokenizerFast.from_pretrained(source), second_tokenizer()
    before, known = state[_EMBEDDINGS].float(), old.get_vocab()
    table = model.vpt.model.embed_tokens.weight.data
    spread = (before - before.mean(0)).norm(dim=1).mean()
    for token, number in new.get_vocab().items():
        if token in known:
            table[number] = before[known[token]]
            continue
        text = new.convert_tokens_to_string([token])
        pieces = old(text, add_special_tokens=False).input_ids
        # Means alone are so alike that no attention told the words for marks from each other.
        apart = functional.normalize(torch.randn(before.shape[1]), dim=0)
        table[number] = before[pieces].mean(0) + spread * apart


_EMBEDDINGS: Final = "model.embed_tokens.weight"


def _arguments(directory: Path, config: StageConfig, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=1,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        learning_rate=config.rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(config.warmup, steps // 10),
        weight_decay=0.05,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=40,
        save_steps=400,
        save_total_limit=1,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False},
        ignore_data_skip=True,
        report_to=[],
        disable_tqdm=True,
        seed=SEED,
    )


def train_second(
    stage: Stage,
    out: Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    resume: bool = False,
    threads: int = 2,
    size: int = 16,
    plan: Sequence[str] | None = None,
    first: Path | None = None,
    only: str | None = None,
    rate: float | None = None,
    begin: Path | None = None,
    more: Path | None = None,
) -> Path:
    """Train a stage into ``out/STAGE`` from the scenes in ``out/pool``; gives the weights' file.

    ``minutes`` stops early with a checkpoint that ``resume`` continues; ``steps`` replaces the
    schedule's length, ``rate`` its peak; ``plan`` replaces the kinds of batches in turn. ``only``
    runs the stage see for one encoder, into ``out/see-KIND``: they share nothing, so they can run
    side by side. ``begin`` is a weights file of the second version to begin with instead. ``more``
    is a pool of the first version's: half of the scenes that are to be read come from there.
    """
    config = STAGES[stage]
    config = replace(config, rate=rate or config.rate)
    directory = out / (f"{stage}-{only}" if only else stage)
    plan = plan or (ONLY[only] if only else None)
    directory.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    last = get_last_checkpoint(str(directory)) if resume else None
    model = load_second(out, stage, first, begin)
    done = int(last.rsplit("-", 1)[1]) if last else 0
    arguments = _arguments(directory, config, steps or config.steps)
    encoder = SecondEncoder(second_tokenizer())
    data = SecondBatches(stage, out / "pool", encoder, size, done, plan, more)

    def export() -> None:
        # Tied weights once: what is saved is what is loaded into a fresh model.
        state = {k: v.clone() for k, v in model.state_dict().items()}
        save_file(state, directory / WEIGHTS)

    trainer = _SecondTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=lambda items: items[0],
        callbacks=[_Progress(directory, minutes, size, export)],
    )
    trainer.found = {}
    trainer.train(resume_from_checkpoint=last)
    export()
    return directory / WEIGHTS


def export_checkpoint(out: Path, stage: Stage, target: Path) -> Path:
    """Write a stage's model as a checkpoint that the library loads, for the last stage."""
    model = Second(build_second(second_tokenizer()))
    source = out / stage / WEIGHTS
    model.load_weights(load_file(source), where=source)
    model.vpt.save_pretrained(target)
    second_tokenizer().save_pretrained(target)
    return target
