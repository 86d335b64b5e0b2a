"""The finished checkpoint: what is written with it, and what a run that was killed still lacks."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.training.answers import ANSWERS
from vpt_agent.training.config import TrainConfig
from vpt_agent.training.folder import FINAL, drafted
from vpt_agent.training.logs import METRICS, read_metrics

ABOUT = "training.json"
"""In the finished checkpoint: the config it was trained by, and :class:`Figures`."""


@dataclass(frozen=True)
class Figures:
    """What is known when the last step is done; ``rows`` says what became of the rows."""

    steps: int
    loss: float
    padding: float
    rows: Mapping[str, int]


def save_final(
    model: VPTForConditionalGeneration,
    processor: VPTProcessor,
    config: TrainConfig,
    folder: Path,
    *,
    figures: Figures,
    taught: Collection[str],
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write the finished checkpoint: all files, then its name, so that half of one is none.

    ``taught`` are the perception kinds that the training rows had: they are not untrained any more,
    others stay what they were. ``state`` are the weights where the model's own are sharded.
    """
    own = model.config
    perception = dict(own.perception or {})
    if config.stage != "alignment":  # an aligned projector has not met a call yet
        untrained = perception.get("untrained", ())
        perception["untrained"] = [kind for kind in untrained if kind not in taught]
    own.perception = perception
    own.num_inner_forward_run = 2
    own.use_cache = True
    own.training = {
        "para_mask_id": config.mask.paragraphs,
        "para_mask_ratio": config.mask.ratio,
        "stage": config.stage,
    }
    about = {
        "transformers": transformers.__version__,
        "config": config.model_dump(mode="json"),
        "steps": figures.steps,
        "loss": figures.loss,
        "padding": figures.padding,
        "rows": dict(figures.rows),
    }
    with drafted(folder) as draft:
        model.save_pretrained(draft, **({} if state is None else {"state_dict": state}))
        processor.save_pretrained(draft)
        (draft / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def evaluation_at(out: Path, step: int) -> dict[str, float] | None:
    """The figures of the evaluation after ``step``, from the metrics in ``out``."""
    for row in reversed(read_metrics(out / METRICS)):
        if row["step"] == step and "eval_loss" in row:
            return {name: value for name, value in row.items() if name != "step"}
    return None


@dataclass(frozen=True)
class Lacking:
    """What a killed run did not come to, after its checkpoint was finished."""

    figures: Figures
    evaluation: bool
    answers: bool


def lacking(config: TrainConfig) -> Lacking | None:
    """What the finished run in ``config.out`` lacks; None where nothing does, or it is not done."""
    about = config.out / FINAL / ABOUT
    if not about.is_file():
        return None
    said = json.loads(about.read_text(encoding="utf-8"))
    if "steps" not in said:  # written before these figures were
        return None
    figures = Figures(said["steps"], said["loss"], said["padding"], said["rows"])
    evaluates = bool(config.data.hold_out or config.data.evaluation)
    found = Lacking(
        figures,
        evaluates and evaluation_at(config.out, figures.steps) is None,
        bool(config.answers) and not (config.out / ANSWERS).exists(),
    )
    return found if found.evaluation or found.answers else None
