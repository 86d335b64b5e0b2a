"""``train(config)``: from a config to a finished checkpoint that ``PerceptionAgent`` loads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments, set_seed

from vpt_agent.agent.agent import Tools
from vpt_agent.config import shipped_model
from vpt_agent.data import RowEncoder
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.masking import MaskRule
from vpt_agent.model.memory import FeatureMemory
from vpt_agent.prompt.vpt import VPTLayout
from vpt_agent.tokens.table import IM_END, IM_START, ResolvedTable
from vpt_agent.training.answers import ANSWERS, answer_rows, require_own_tools
from vpt_agent.training.arguments import arguments
from vpt_agent.training.collate import Collator
from vpt_agent.training.config import MaskPart, ModelPart, Source, TrainConfig
from vpt_agent.training.configfile import read_as, require_same
from vpt_agent.training.final import Figures, Lacking, evaluation_at, lacking, save_final
from vpt_agent.training.folder import CONFIG, FINAL, open_run, step_of
from vpt_agent.training.freeze import freeze
from vpt_agent.training.logs import mean_loss, plot_losses
from vpt_agent.training.lora import add_lora, merge_lora
from vpt_agent.training.sources import evaluation_rows, rules_of, training_rows
from vpt_agent.training.stream import Batches, Cursor, Fixed, Shape
from vpt_agent.training.trainer import STATE, VPTTrainer, is_whole

FREE = (
    "out",
    "log_every",
    "evaluate_every",
    "save_every",
    "keep",
    "answers",
    "device",
    "data.max_evaluation",
    "data.workers",  # compared with the checkpoint's own, as the number of processes is
    "data.prefetch",
    "model.remember",
)
"""Keys of a config that may change when a run is taken up: they do not touch what is learnt."""

_FINISHED: Mapping[str, Any] = {"encoders": None, "controls": None, "grid": None,
                                "encoder_weights": {}}  # fmt: skip
"""What the config says of building a model is in the finished one already."""

Say = Callable[[str], None]
Draw = Callable[[Source], Source]


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
    tools: Tools = None,
    draw: Draw | None = None,
) -> Trained:
    """Train as ``config`` says; the result lies in ``config.out / "final"``.

    ``resume`` goes on from the newest complete checkpoint of a run that was stopped, to the same
    losses as if it had not been; where the finished checkpoint is there and only its evaluation or
    its answers are not, they are made up. A finished checkpoint, or a run begun and not resumed, is
    never overwritten: both are a :class:`UserError`, as is all that is wrong with config or rows.
    ``say`` hears how far it is. ``tools`` are those of the model's own kinds, for the answers, as
    in ``PerceptionAgent``. ``draw`` makes files of sources that are scenes.
    """
    lacks = lacking(config) if resume else None
    if lacks is not None:
        begun = read_as(TrainConfig, config.out / CONFIG)
        require_same(begun, config, free=FREE)
        return _made_up(_with_files(config, draw), lacks, say=say, tools=tools)
    latest = open_run(config, resume=resume, whole=is_whole, free=FREE, say=say)
    config = _with_files(config, draw)
    set_seed(config.seed)
    say(f"loading {config.model.path}")
    model, processor = load(config)
    if config.answers:  # found out now, not when all is done
        require_own_tools(model, config.model.path, tools)
    tuner = choose_parameters(model, config)
    learning = [p.numel() for p in model.parameters() if p.requires_grad]
    say(f"{sum(learning):,} parameters in {len(learning)} tensors learn")
    trainer = make_trainer(config, model, processor, latest=latest, callbacks=callbacks, say=say)
    _require_right_sharding(trainer, config, lora=tuner is not None, say=say)
    _run_steps(trainer, latest)
    figures = _finish(trainer, tuner, processor, config, say)
    metrics = _evaluated(trainer, config)
    return Trained(
        config.out / FINAL,
        figures.steps,
        figures.loss,
        figures.padding,
        dict(figures.rows),
        metrics,
        _answered(trainer, config, processor, say=say, tools=tools),
    )


def _require_right_sharding(
    trainer: VPTTrainer, config: TrainConfig, *, lora: bool, say: Say
) -> None:
    """Refuse what sharded weights cannot do before the first step; say where none are."""
    if lora and trainer.sharded:
        raise UserError(
            "LoRA cannot be merged into sharded weights",
            where=config.out,
            fix="train LoRA without fsdp and deepspeed",
        )
    if trainer.args.fsdp and not trainer.sharded:
        say("trainer.fsdp has no effect here: accelerate shards across several accelerators only")


def _run_steps(trainer: VPTTrainer, latest: Path | None) -> None:
    """Train, from the checkpoint ``latest`` on if there is one."""
    if latest is None:
        trainer.train()
        return
    if trainer.is_world_process_zero():
        trainer.metrics.resume(step_of(latest))
    if step_of(latest) < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=str(latest))
    else:  # transformers would make one step more
        trainer.take_up(latest)


def _finish(
    trainer: VPTTrainer, tuner: Any, processor: VPTProcessor, config: TrainConfig, say: Say
) -> Figures:
    """Save the finished checkpoint. First of all: what follows may fail, and can be made up."""
    totals, state = trainer.totals(), trainer.full_state()
    say(f"padding: {totals.padding:.1%} of {totals.tokens['all']:,} tokens; "
        f"rows: {dict(totals.rows)}")  # fmt: skip
    loss = mean_loss(config.out)
    figures = Figures(
        trainer.state.global_step,
        math.nan if loss is None else loss,
        totals.padding,
        {name: n for name, n in totals.rows.items() if n},
    )
    if trainer.is_world_process_zero():
        trained = trainer.accelerator.unwrap_model(trainer.model)
        save_final(
            merge_lora(tuner) if tuner is not None else trained,
            processor,
            config,
            config.out / FINAL,
            figures=figures,
            taught=totals.kinds,
            state=state,
        )
    trainer.accelerator.wait_for_everyone()
    return figures


def _evaluated(trainer: VPTTrainer, config: TrainConfig) -> dict[str, float]:
    """The evaluation after the last step, which may have been made already; {} without rows."""
    metrics = evaluation_at(config.out, trainer.state.global_step)
    if metrics is None:
        metrics = {} if trainer.evaluation is None else trainer.evaluate()
    if trainer.is_world_process_zero():
        plot_losses(config.out)
    return metrics


def _answered(
    trainer: VPTTrainer, config: TrainConfig, processor: VPTProcessor, *, say: Say, tools: Tools
) -> tuple[dict[str, Any], ...]:
    if not config.answers or not trainer.is_world_process_zero():
        return ()
    rows = evaluation_rows(config.data, processor.table)[: config.answers]
    return answer_rows(config.out / FINAL, rows, config.out / ANSWERS, say=say, tools=tools)


def _made_up(config: TrainConfig, lacks: Lacking, *, say: Say, tools: Tools) -> Trained:
    """What a run lacks that was killed after its checkpoint was finished."""
    final, figures = config.out / FINAL, lacks.figures
    say("the checkpoint is finished: what follows it is made up")
    finished = ModelPart(**{**config.model.model_dump(), **_FINISHED, "path": str(final)})
    model, processor = load(config.model_copy(update={"model": finished}))
    trainer = make_trainer(config, model, processor, say=say)
    trainer.state.global_step = figures.steps
    metrics = _evaluated(trainer, config)
    answers = _answered(trainer, config, processor, say=say, tools=tools) if lacks.answers else ()
    return Trained(
        final, figures.steps, figures.loss, figures.padding, dict(figures.rows), metrics, answers
    )


def _with_files(config: TrainConfig, draw: Draw | None) -> TrainConfig:
    """The config with sources that are files: ``draw`` makes them of scenes."""
    if draw is None:
        return config
    data = config.data
    drawn = {n: tuple(draw(s) for s in getattr(data, n)) for n in ("sources", "evaluation")}
    return config.model_copy(update={"data": data.model_copy(update=drawn)})


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
    images = None if part.images is None else _of_tower(perception["images"]) | part.images
    changes = {"images": images, "trigger": part.trigger, "domain": part.domain}
    own.perception = perception | {k: v for k, v in changes.items() if v is not None}
    processor = VPTProcessor.from_pretrained(path, config=own)
    ids = processor.tokenizer.get_vocab()
    own.para_start_id, own.para_end_id = ids[IM_START], ids[IM_END]
    return model, processor


def _of_tower(images: Mapping[str, Any]) -> dict[str, Any]:
    """What the vision tower, not the recipe, decides of how pictures are prepared."""
    names = ("patch", "merge", "temporal", "mean", "std")
    return {name: images[name] for name in names if name in images}


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


# --- the trainer ----------------------------------------------------------------------------------


def make_trainer(
    config: TrainConfig,
    model: VPTForConditionalGeneration,
    processor: VPTProcessor,
    *,
    latest: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    say: Say = lambda _: None,
) -> VPTTrainer:
    """The trainer of ``config``, its rows checked, to go on behind the checkpoint ``latest``."""
    data = config.data
    rows, count = training_rows(data, seed=config.seed, table=processor.table)
    kept = evaluation_rows(data, processor.table)
    args = arguments(config, rows=count, evaluates=bool(kept))
    rank, world = args.process_index, args.world_size
    shape = Shape(data.rows, data.tokens, data.window * data.rows, config.seed)
    state = None if latest is None else _read_state(latest, args)
    cursors = {c[0]: Cursor(*c) for c in state["cursors"]} if state else {}
    evaluation: Fixed | None = None
    if kept:
        evaluation = Fixed(kept, make_collator(config, processor), shape, rank=rank, world=world)
        evaluation.require_usable()
    trainer = VPTTrainer(
        model=model,
        args=args,
        batches=Batches(
            rows,
            make_collator(config, processor),
            shape,
            rank=rank,
            world=world,
            cursors=cursors,
            given=state["given"] if state else 0,
        ),
        evaluation=evaluation,
        rule=mask_rule(config.mask),
        evaluation_rule=mask_rule(config.mask) if config.mask.in_evaluation else MaskRule(),
        passes=config.model.passes,
        classes=sorted({i for row in model.table.rows for i in row.token_ids}),
        prefetch=data.prefetch,
        keep=config.keep,
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
