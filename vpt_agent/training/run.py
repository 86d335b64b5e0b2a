"""``train(config)``: from a config to a finished checkpoint that ``PerceptionAgent`` loads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainingArguments, set_seed

from vpt_agent.config import shipped_model
from vpt_agent.data import RowEncoder
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.masking import MaskRule
from vpt_agent.model.memory import FeatureMemory
from vpt_agent.prompt.vpt import VPTLayout
from vpt_agent.tokens.table import IM_END, IM_START, ResolvedTable
from vpt_agent.training.answers import answer_rows
from vpt_agent.training.collate import Collator
from vpt_agent.training.config import MaskPart, TrainConfig
from vpt_agent.training.freeze import freeze
from vpt_agent.training.logs import METRICS, mean_loss, plot_losses
from vpt_agent.training.lora import add_lora, merge_lora
from vpt_agent.training.sources import evaluation_rows, rules_of, training_rows
from vpt_agent.training.stream import Batches, Cursor, Fixed, Shape
from vpt_agent.training.trainer import STATE, VPTTrainer

FINAL = "final"
"""The finished checkpoint's folder in ``out``."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """What a run gave: the finished checkpoint, and figures.

    ``padding`` is the share of padding in the tokens trained on, ``rows`` what became of the rows,
    ``metrics`` the last evaluation's.
    """

    checkpoint: Path
    steps: int
    loss: float
    padding: float
    rows: dict[str, int]
    metrics: dict[str, float]
    answers: tuple[dict[str, Any], ...] = ()


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    say: Say = lambda _: None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Trained:
    """Train as ``config`` says; the result lies in ``config.out / "final"``.

    ``resume`` goes on from the newest complete checkpoint of a run that was stopped, to the same
    losses as if it had not been. A finished checkpoint, or a run begun and not resumed, is never
    overwritten: both are a :class:`UserError`, as is all that is wrong with config or rows. ``say``
    hears how far it is.
    """
    latest = _prepare_folder(config, resume=resume)
    set_seed(config.seed)
    say(f"loading {config.model.path}")
    model, processor = load(config)
    tuner = choose_parameters(model, config)
    learning = [p.numel() for p in model.parameters() if p.requires_grad]
    say(f"{sum(learning):,} parameters in {len(learning)} tensors learn")
    trainer = _trainer(config, model, processor, latest, callbacks, say)
    if latest is not None:
        trainer.metrics.resume(int(latest.name.split("-")[1]))
    result = trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
    at, metrics = trainer.evaluated
    if trainer.evaluation is not None and at != trainer.state.global_step:
        metrics = trainer.evaluate()
    padding = trainer.padding
    say(f"padding: {padding:.1%} of {trainer.tokens['all']:,} tokens; rows: {dict(trainer.rows)}")
    final = config.out / FINAL
    if trainer.is_world_process_zero():
        trained = trainer.accelerator.unwrap_model(trainer.model)
        save_final(merge_lora(tuner) if tuner is not None else trained, processor, config, final)
        plot_losses(config.out)
    trainer.accelerator.wait_for_everyone()
    answers: tuple[dict[str, Any], ...] = ()
    if config.answers and trainer.is_world_process_zero():
        rows = evaluation_rows(config.data)[: config.answers]
        answers = answer_rows(final, rows, config.out / "answers.json", say=say)
    return Trained(
        final,
        trainer.state.global_step,
        # Not the trainer's own: after a resume it divides a part of the losses by all steps.
        mean_loss(config.out) or float(result.training_loss),
        padding,
        {name: n for name, n in trainer.rows.items() if n},
        metrics,
        answers,
    )


def _prepare_folder(config: TrainConfig, *, resume: bool) -> Path | None:
    """Check and make ``out``; the checkpoint to go on from, if any."""
    if (config.out / FINAL).exists():
        raise UserError(
            "a finished checkpoint is never overwritten",
            where=config.out / FINAL,
            fix="choose another out (--set out=DIR), or move the folder away",
        )
    name = STATE.format(rank=int(os.environ.get("RANK", "0")))
    found = sorted(
        (
            p.parent
            for p in config.out.glob(f"checkpoint-*/{name}")
            # A copy that somebody made by hand is not a checkpoint of this run.
            if p.parent.name.removeprefix("checkpoint-").isdigit()
        ),
        key=lambda p: int(p.name.removeprefix("checkpoint-")),
    )
    if resume:
        if not found:
            raise UserError(
                "there is nothing to resume: no complete checkpoint",
                where=config.out,
                fix="start without --resume",
            )
        return found[-1]
    if config.out.exists() and any(config.out.glob("checkpoint-*")):
        raise UserError(
            "this folder holds a run that was begun",
            where=config.out,
            fix="go on with --resume, or choose another out",
        )
    config.out.mkdir(parents=True, exist_ok=True)
    # Of a run that was stopped before its first checkpoint.
    (config.out / METRICS).unlink(missing_ok=True)
    (config.out / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return None


# --- the model ------------------------------------------------------------------------------------


def load(config: TrainConfig) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """The model in float32, ``config``'s switches in its own config, and its processor."""
    part = config.model
    path = str(shipped_model()) if part.path == "shipped" else part.path
    options: dict[str, Any] = {
        name: value
        for name in ("encoders", "controls", "grid", "encoder_weights")
        if (value := getattr(part, name))
    }
    model = VPTForConditionalGeneration.from_pretrained(path, dtype="float32", **options)
    own = model.config
    own.positions, own.gradients, own.control = part.positions, part.gradients, part.control
    own.num_inner_forward_run = 1 if config.stage == "alignment" else 2
    perception = dict(own.perception or {})
    if not perception:
        raise UserError("this model has no perception kinds", where=path, fix="set model.encoders")
    changes = {"images": part.images, "trigger": part.trigger, "domain": part.domain}
    own.perception = perception | {k: v for k, v in changes.items() if v is not None}
    processor = VPTProcessor.from_pretrained(path, config=own)
    ids = processor.tokenizer.get_vocab()
    own.para_start_id, own.para_end_id = ids[IM_START], ids[IM_END]
    return model, processor


def stage_lists(config: TrainConfig, table: ResolvedTable) -> dict[str, list[str] | None]:
    """``frozen`` or ``trainable`` of the config, or those of its stage."""
    if config.trainable is not None or config.frozen is not None:
        return {
            "trainable": None if config.trainable is None else list(config.trainable),
            "frozen": None if config.frozen is None else list(config.frozen),
        }
    kinds = [row.kind for row in table.rows if row.kind.projector is not None]
    if config.stage == "alignment":
        names = [str(kind.projector) for kind in kinds]
        if not names:
            raise UserError("alignment needs a kind with a projector", fix="set model.encoders")
        return {"trainable": names, "frozen": None}
    towers = [f"{kind.config_prefix}_model" for kind in kinds if kind.encoder != "base"]
    return {"trainable": None, "frozen": ["visual", *towers]}


def choose_parameters(model: VPTForConditionalGeneration, config: TrainConfig) -> Any:
    """Let the stage's parameters learn; returns peft's tuner in the LoRA stage, else None."""
    if config.lora is not None:
        return add_lora(model, config.lora)
    freeze(model, **stage_lists(config, model.table))
    return None


def save_final(
    model: VPTForConditionalGeneration, processor: VPTProcessor, config: TrainConfig, folder: Path
) -> None:
    """Write the finished checkpoint: all files, then its name, so that half of one is none."""
    own = model.config
    perception = dict(own.perception or {})
    if config.stage != "alignment":  # an aligned projector has not met a call yet
        perception["untrained"] = []
    own.perception = perception
    own.num_inner_forward_run = 2
    own.use_cache = True
    own.training = {
        "para_mask_id": config.mask.paragraphs,
        "para_mask_ratio": config.mask.ratio,
        "stage": config.stage,
    }
    draft = folder.with_name(f"{folder.name}.draft")
    model.save_pretrained(draft)
    processor.save_pretrained(draft)
    about = {"transformers": transformers.__version__, "config": config.model_dump(mode="json")}
    (draft / "training.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    draft.rename(folder)


# --- the trainer ----------------------------------------------------------------------------------


def _trainer(
    config: TrainConfig,
    model: VPTForConditionalGeneration,
    processor: VPTProcessor,
    latest: Path | None,
    callbacks: Sequence[TrainerCallback],
    say: Say,
) -> VPTTrainer:
    collator = make_collator(config, processor)
    rows, count = training_rows(config.data, seed=config.seed)
    kept = evaluation_rows(config.data)
    args = arguments(config, rows=count, evaluates=bool(kept))
    rank, world = args.process_index, args.world_size
    data = config.data
    shape = Shape(data.rows, data.tokens, data.window * data.rows, config.seed)
    state = None if latest is None else _read_state(latest, args)
    cursors = {c[0]: Cursor(*c) for c in state["cursors"]} if state else {}
    trainer = VPTTrainer(
        model=model,
        args=args,
        batches=Batches(
            rows,
            collator,
            shape,
            rank=rank,
            world=world,
            cursors=cursors,
            given=state["given"] if state else 0,
        ),
        evaluation=Fixed(kept, collator, shape, rank=rank, world=world) if kept else None,
        rule=mask_rule(config.mask),
        evaluation_rule=mask_rule(config.mask) if config.mask.in_evaluation else MaskRule(),
        passes=config.model.passes,
        classes=sorted({i for row in model.table.rows for i in row.token_ids}),
        prefetch=data.prefetch,
        say=say,
        memory=_memory(config, model),
        processing_class=processor,
        callbacks=list(callbacks),
    )
    if state:
        trainer.restore(state)
    return trainer


def _memory(config: TrainConfig, model: VPTForConditionalGeneration) -> FeatureMemory | None:
    if not config.model.remember:
        return None
    towers = [model.visual, *(model.encoder(r.name) for r in model.table.rows if r.control)]
    if any(p.requires_grad for tower in towers if tower is not None for p in tower.parameters()):
        raise UserError(
            "only frozen towers can be remembered",
            where="model.remember",
            got="a vision tower learns",
            fix="freeze the towers, or set model.remember to 0",
        )
    return FeatureMemory(int(config.model.remember * 2**30))


def make_collator(config: TrainConfig, processor: VPTProcessor) -> Collator:
    """Rows to batches as ``config`` says, for the processor's model."""
    encoder = RowEncoder(
        VPTLayout(processor.tokenizer, processor.table),
        processor.policy,
        max_length=config.data.max_length,
        rules=rules_of(config.data),
    )
    return Collator(encoder, positions=config.model.positions, bad_rows=config.data.bad_rows)


def mask_rule(part: MaskPart) -> MaskRule:
    """The config's masks as the model takes them."""
    return MaskRule(part.paragraphs, part.ratio, part.how, part.draw)


def _read_state(latest: Path, args: TrainingArguments) -> dict[str, Any]:
    name = STATE.format(rank=args.process_index)
    state: dict[str, Any] = json.loads((latest / name).read_text(encoding="utf-8"))
    had = (state["world"], state["workers"])
    has = (args.world_size, args.dataloader_num_workers)
    if had != has:
        raise UserError(
            "a run goes on with as many processes and workers as it began with",
            where=latest,
            got=f"{has[0]} processes, data.workers {has[1]}",
            expected=f"{had[0]} processes, data.workers {had[1]}",
        )
    return state


def arguments(config: TrainConfig, *, rows: int, evaluates: bool) -> TrainingArguments:
    """transformers' arguments; ``config.trainer`` has the last word on what is not decided here."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    optim = config.optim
    steps = config.steps
    if steps is None:
        batch = config.data.rows * optim.accumulate * world
        steps = max(1, math.ceil((config.epochs or 1) * rows / batch))
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
        "save_total_limit": config.keep,
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
        values["gradient_checkpointing"] = True
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    decided = {"output_dir", "max_steps", "ignore_data_skip", "remove_unused_columns"}
    clash = sorted(decided & set(config.trainer))
    if clash:
        raise UserError("these are decided by the config itself", where="trainer", got=clash)
    try:
        return TrainingArguments(**(values | config.trainer))
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(
            "transformers refuses these arguments", where="trainer", got=str(error)
        ) from error


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None
