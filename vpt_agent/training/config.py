"""TrainConfig: one YAML file says all of a training run; a misspelt key is an error that helps.

Plain values only; nothing is opened or loaded here. ``docs/train-your-own.md`` walks through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from vpt_agent.training.configfile import Part, RunConfig, make_as, read_as

Stage = Literal["alignment", "instruction", "lora"]


class ModelPart(Part):
    """Which model learns, and which of the published habits it keeps.

    ``path``: a directory, a hub name, or ``shipped`` (the small model in the package). A plain
    Qwen2-VL, Qwen2.5-VL or Qwen3-VL becomes a VPT model with ``encoders``; ``controls``, ``grid``
    and ``encoder_weights`` as in ``VPTForConditionalGeneration.from_pretrained``. ``sizes`` names
    known sizes, for ``--dry-run`` without files. ``positions``: M-RoPE, or 0..L-1 (``published``).
    ``gradients``: ``full`` lets input embeddings learn, ``published`` gives none to them.
    ``control``: see the decision page on causal control. ``passes``: no position is computed twice
    (``one``), or as the release does. ``remember``: so many GiB of the outputs of frozen towers are
    kept, for pictures that come again in later steps. ``images`` and ``trigger`` replace the
    checkpoint's.
    """

    path: str
    encoders: tuple[Literal["clip", "dino", "sam"], ...] | None = None
    controls: int | None = Field(None, ge=1)
    grid: Literal[4, 8, 16, 32] | None = None
    encoder_weights: dict[str, str] = Field(default_factory=dict)
    sizes: str | None = None
    positions: Literal["mrope", "published"] = "mrope"
    gradients: Literal["full", "published"] = "full"
    control: Literal["causal", "published"] = "causal"
    passes: Literal["one", "two"] = "one"
    remember: float = Field(0.0, ge=0)
    images: dict[str, Any] | None = None
    trigger: Literal["free", "phrase"] | None = None
    domain: str | None = None


class Scenes(Part):
    """Rows drawn by ``vpt-agent nano scenes`` when the run begins: only the command does that."""

    count: int = Field(ge=1)
    seed: int = Field(0, ge=0)
    split: Literal["train", "unseen"] = "train"


class Dataset(Part):
    """A table of Hugging Face `datasets`: of the hub, or (``name: json``) of local ``files``.

    ``subset`` is its configuration. Rows name their pictures by path, as in files.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    files: tuple[str, ...] | None = None


class Source(Part):
    """One file of published-JSON rows (a JSON array, or JSON lines), a ``dataset``, or ``scenes``.

    ``weight`` is its share in the mixture. ``images`` is the folder of relative picture paths.
    ``remap`` replaces the beginnings of picture paths, ``columns`` the names of keys. With
    ``stream`` rows are read as they come, through a shuffle buffer; nothing is stored, and a run
    that is taken up reads again what it has had. ``retarget`` makes the calls of encoders that the
    model does not have calls of its own (``true``, or the kind's name where it has several), and
    gives all calls as many control tokens as the model has.
    """

    path: Path | None = None
    dataset: Dataset | None = None
    scenes: Scenes | None = None
    weight: float = 1.0
    images: Path | None = None
    remap: dict[str, str] = Field(default_factory=dict)
    columns: dict[str, str] = Field(default_factory=dict)
    stream: bool = False
    retarget: bool | str = False

    @model_validator(mode="after")
    def _one_origin(self) -> Source:
        if sum(one is not None for one in (self.path, self.dataset, self.scenes)) != 1:
            raise ValueError("a source has a path, a dataset or scenes, and one of them only")
        return self


class DataPart(Part):
    """Where rows come from, and how they become batches.

    ``hold_out``: the first rows of each source are for evaluation (``max_evaluation`` in all),
    unless ``evaluation`` names sources of their own. ``truncation``: ``drop`` drops a row that
    would be cut inside a call or a run of visual tokens; ``published`` cuts as the release does.
    ``shuffle`` is the size of the shuffle buffer of streams in rows (other sources are shuffled as
    a whole), 1 for no shuffling. A batch has ``rows`` rows, or
    at most ``tokens`` tokens, padding included. Rows of like length share a batch; they are sorted
    within windows of ``window`` batches. ``workers`` processes prepare pictures; 0: none besides
    the main one. ``bad_rows``: stop at a row that cannot be used, or skip and count it.
    """

    sources: tuple[Source, ...] = Field(min_length=1)
    evaluation: tuple[Source, ...] = ()
    hold_out: int = Field(0, ge=0)
    max_evaluation: int = Field(1000, ge=1)
    max_length: int = Field(2048, ge=8)
    truncation: Literal["drop", "published"] = "drop"
    bad_rows: Literal["error", "skip"] = "error"
    shuffle: int = Field(16384, ge=1)
    rows: int = Field(4, ge=1)
    tokens: int | None = Field(None, ge=8)
    window: int = Field(8, ge=1)
    workers: int = Field(2, ge=0)
    prefetch: int = Field(2, ge=1)


class MaskPart(Part):
    """Mask modelling: what of the prompt the scored pass does not see (paper section 3.4).

    ``paragraphs`` 0: off, 1: the first question, 2: the question and the re-encoded picture.
    ``how``: ``embeddings`` become zero, as published; or ``attention``, as the paper writes it:
    what follows the control token sees nothing of the question's turn but through that token.
    One draw decides for a ``batch`` (published) or for each ``row``. ``in_evaluation``: act there,
    too, as published.
    """

    paragraphs: Literal[0, 1, 2] = 0
    ratio: float = Field(0.5, ge=0, le=1)
    how: Literal["embeddings", "attention"] = "embeddings"
    draw: Literal["batch", "row"] = "batch"
    in_evaluation: bool = False

    @model_validator(mode="after")
    def _can_be(self) -> MaskPart:
        if self.how == "attention" and self.paragraphs == 2:
            raise ValueError("attention masks hide the question only: paragraphs 0 or 1")
        return self


class LoraPart(Part):
    """LoRA on the language model's linear layers; ``also`` names parts that learn in full."""

    rank: int = Field(512, ge=1)
    alpha: int = Field(1024, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str = r"model\.layers\..*\.(q|k|v|o|gate|up|down)_proj"
    also: tuple[str, ...] = ()


class OptimPart(Part):
    """AdamW and its schedule. ``warmup`` is a share of the steps."""

    learning_rate: float = Field(2e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0)
    clip: float = Field(1.0, gt=0)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(0.03, ge=0, le=1)
    accumulate: int = Field(1, ge=1)


DECIDED: Mapping[str, str] = {
    "output_dir": "out",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "data.rows or data.tokens",
    "per_device_eval_batch_size": "data.rows or data.tokens",
    "auto_find_batch_size": "data.rows or data.tokens",
    "group_by_length": "data.window",
    "length_column_name": "data.window",
    "train_sampling_strategy": "data.shuffle",
    "gradient_accumulation_steps": "optim.accumulate",
    "learning_rate": "optim.learning_rate",
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.epsilon",
    "max_grad_norm": "optim.clip",
    "warmup_steps": "optim.warmup",
    "warmup_ratio": "optim.warmup",
    "bf16": "precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "device",
    "logging_steps": "log_every",
    "eval_strategy": "evaluate_every",
    "eval_steps": "evaluate_every",
    "save_strategy": "save_every",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "save_only_model": "save_every",
    "dataloader_num_workers": "data.workers",
    "dataloader_prefetch_factor": "data.prefetch",
    "dataloader_drop_last": "",
    "dataloader_persistent_workers": "",
    "accelerator_config": "",
    "ignore_data_skip": "",
    "remove_unused_columns": "",
    "label_names": "",
    "label_smoothing_factor": "",
    "resume_from_checkpoint": "--resume",
    "do_train": "",
    "do_eval": "data.hold_out",
    "do_predict": "answers",
}
"""Keys of TrainingArguments that ``trainer`` may not have: here they would do nothing, or undo what
the config says. Their values name the key to use."""


class TrainConfig(RunConfig):
    """A training run.

    ``stage``: ``alignment`` (projectors only, no control states), ``instruction`` (everything but
    the vision towers) or ``lora``; ``trainable`` or ``frozen`` (parts of parameter names) say
    otherwise. ``steps`` of the optimiser, or ``epochs`` over the rows. ``precision`` is what is
    computed in; weights are kept in float32. ``answers``: so many evaluation rows are answered by
    the finished checkpoint. ``trainer`` goes to transformers' TrainingArguments as it is
    (``fsdp``, ``deepspeed``, ...), but for what is decided here (:data:`DECIDED`).
    """

    stage: Stage
    model: ModelPart
    data: DataPart
    mask: MaskPart = MaskPart()
    optim: OptimPart = OptimPart()
    lora: LoraPart | None = None
    trainable: tuple[str, ...] | None = None
    frozen: tuple[str, ...] | None = None
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    seed: int = 42
    log_every: int = Field(10, ge=1)
    evaluate_every: int | None = Field(None, ge=1)
    save_every: int | None = Field(None, ge=1)
    keep: int | None = Field(2, ge=1)
    answers: int = Field(0, ge=0)
    device: Literal["auto", "cpu"] = "auto"
    trainer: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agrees(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("say either steps or epochs")
        if self.epochs is not None and self.data.tokens is not None:
            raise ValueError("with batches by tokens say steps: an epoch has no fixed number")
        if self.epochs is not None and any(source.stream for source in self.data.sources):
            raise ValueError("with streams say steps: their rows are not counted beforehand")
        if self.trainable is not None and self.frozen is not None:
            raise ValueError("say either trainable or frozen, or none for the stage's own")
        if (self.stage == "lora") != (self.lora is not None):
            raise ValueError("the stage lora and the part lora go together")
        clash = [f"{k} (use {v})" if v else k for k, v in DECIDED.items() if k in self.trainer]
        if clash:
            raise ValueError(f"trainer: decided by the config itself: {', '.join(clash)}")
        return self


def read_config(path: Path | str, changes: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file. ``changes`` are ``key=value``, values in YAML: ``data.rows=2``."""
    return read_as(TrainConfig, path, changes)


def make_config(data: Mapping[str, Any], *, where: str = "config") -> TrainConfig:
    """A config of plain values; all that is wrong is said in one :class:`UserError`."""
    return make_as(TrainConfig, data, where=where)
