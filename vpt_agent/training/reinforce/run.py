"""``reinforce(config)``: the policy-gradient stage, from a checkpoint to a checkpoint."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpt_agent.agent import PerceptionAgent
from vpt_agent.config import shipped_model
from vpt_agent.data import Mixture, RowEncoder
from vpt_agent.errors import UserError
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.training.collate import Collator
from vpt_agent.training.freeze import freeze
from vpt_agent.training.logs import MetricsFile
from vpt_agent.training.reinforce.config import ReinforceConfig
from vpt_agent.training.reinforce.learner import Learner
from vpt_agent.training.reinforce.plot import plot_reinforcement
from vpt_agent.training.reinforce.problems import Problem, at_step, problems_of
from vpt_agent.training.reinforce.rewards import Reward, total_of
from vpt_agent.training.reinforce.rollouts import figures, roll
from vpt_agent.training.reinforce.scoring import Scorer

FINAL, STATE, OPTIMIZER = "final", "reinforce.json", "optimizer.safetensors"
_FREE = ("out", "steps", "batch", "save_every", "keep", "device")
"""What may change between a run and its resume."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reinforced:
    """The finished checkpoint, and the figures of the last step."""

    checkpoint: Path
    steps: int
    metrics: dict[str, Any]


def reinforce(
    config: ReinforceConfig,
    *,
    resume: bool = False,
    problems: Mixture[Problem] | None = None,
    reward: Reward | None = None,
    say: Say = lambda _: None,
) -> Reinforced:
    """Run the stage as ``config`` says; the result lies in ``config.out / "final"``.

    ``problems`` stand in for the config's sources, ``reward`` for its rewards. ``resume`` goes on
    from the newest checkpoint, to the same weights as if the run had not been stopped. A finished
    checkpoint, or a run begun and not resumed, is never overwritten: a :class:`UserError`.
    """
    latest = _prepare(config, resume=resume)
    stream = problems_of(config) if problems is None else problems
    worth = total_of(config.rewards) if reward is None else reward
    say(f"loading {config.model}")
    stage = _Stage.load(config, latest)
    metrics = MetricsFile(config.out)
    first = 0
    if latest is not None:
        first = int(latest.name.split("-")[1])
        metrics.resume(first)
    told: dict[str, Any] = {}
    for step in range(first + 1, config.steps + 1):
        told = {
            "step": step,
            **stage.step(at_step(stream, step - 1, config.questions), worth, step),
        }
        metrics.write(told)
        say(_line(told))
        if step % config.save_every == 0 and step < config.steps:
            stage.save(config.out / f"checkpoint-{step}", step)
            _prune(config)
    final = config.out / FINAL
    stage.save(final, config.steps, resumable=False)
    plot_reinforcement(config.out)
    return Reinforced(final, config.steps, told)


class _Stage:
    """The model that learns, its agent and its learner."""

    def __init__(
        self,
        config: ReinforceConfig,
        model: VPTForConditionalGeneration,
        processor: VPTProcessor,
        start: VPTForConditionalGeneration | None,
    ) -> None:
        self.config, self.model, self.processor = config, model, processor
        model.config.gradients = "full"  # as published, input embeddings would not learn
        freeze(model, **_lists(config, model))
        self.agent = PerceptionAgent.from_model(model, processor.tokenizer, name=config.model)
        layout, policy = self.agent.layout, self.agent.engine.policy
        longest = self.agent.engine.max_positions
        collator = Collator(RowEncoder(layout, policy, max_length=longest), positions="mrope")
        self.learner = Learner(model, Scorer(collator, model.device), config.update, start=start)

    @classmethod
    def load(cls, config: ReinforceConfig, latest: Path | None) -> _Stage:
        """From the config's model, or from a checkpoint of this stage."""
        origin = str(shipped_model()) if config.model == "shipped" else config.model
        place = torch.device("cpu")
        if config.device == "auto" and torch.cuda.is_available():
            place = torch.device("cuda")

        def model_of(path: str) -> VPTForConditionalGeneration:
            model = VPTForConditionalGeneration.from_pretrained(path, dtype="float32", device=place)
            model.eval()
            return model

        path = origin if latest is None else str(latest)
        model = model_of(path)
        start = None if config.update.kl is None else model_of(origin)
        processor = VPTProcessor.from_pretrained(path, config=model.config)
        stage = cls(config, model, processor, start)
        if latest is not None:
            stage.learner.load(latest / OPTIMIZER)
        return stage

    def step(self, problems: list[Problem], reward: Reward, number: int) -> dict[str, Any]:
        """Roll out, learn, tell."""
        began = time.perf_counter()
        groups = roll(self.agent, problems, self.config, reward, step=number)
        rolled = time.perf_counter()
        learnt = self.learner.step(groups, number=number)
        self.agent.engine.features.clear()  # of the old weights
        ended = time.perf_counter()
        return {
            **figures(groups),
            **learnt,
            "rollout_seconds": rolled - began,
            "learn_seconds": ended - rolled,
        }

    def save(self, folder: Path, step: int, *, resumable: bool = True) -> None:
        """Write a checkpoint: all files, then its name, so that half of one is none."""
        draft = folder.with_name(f"{folder.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        self.model.save_pretrained(draft)
        self.processor.save_pretrained(draft)
        if resumable:
            self.learner.save(draft / OPTIMIZER)
        about = {"step": step, "config": self.config.model_dump(mode="json")}
        (draft / STATE).write_text(json.dumps(about, indent=1), encoding="utf-8")
        draft.rename(folder)


def _lists(
    config: ReinforceConfig, model: VPTForConditionalGeneration
) -> dict[str, list[str] | None]:
    if config.trainable is not None:
        return {"trainable": list(config.trainable), "frozen": None}
    if config.frozen is not None:
        return {"trainable": None, "frozen": list(config.frozen)}
    rows = [row.kind for row in model.table.rows if row.kind.projector is not None]
    towers = [f"{kind.config_prefix}_model" for kind in rows if kind.encoder != "base"]
    return {"trainable": None, "frozen": ["visual", *towers]}


# --- the folder -----------------------------------------------------------------------------------


def _checkpoints(config: ReinforceConfig) -> list[Path]:
    found = [p.parent for p in config.out.glob(f"checkpoint-*/{STATE}")]
    whole = [p for p in found if p.name.split("-")[1].isdigit()]  # and no draft
    return sorted(whole, key=lambda p: int(p.name.split("-")[1]))


def _prune(config: ReinforceConfig) -> None:
    for old in _checkpoints(config)[: -config.keep]:
        shutil.rmtree(old)


def _prepare(config: ReinforceConfig, *, resume: bool) -> Path | None:
    """Check and make ``out``; the checkpoint to go on from, if any."""
    if (config.out / FINAL).exists():
        raise UserError(
            "a finished checkpoint is never overwritten",
            where=config.out / FINAL,
            fix="choose another out (--set out=DIR), or move the folder away",
        )
    found = _checkpoints(config)
    if resume:
        if not found:
            raise UserError(
                "there is nothing to resume: no complete checkpoint",
                where=config.out,
                fix="start without --resume",
            )
        _same(json.loads((found[-1] / STATE).read_text(encoding="utf-8"))["config"], config)
        return found[-1]
    if found:
        raise UserError(
            "this folder holds a run that was begun",
            where=config.out,
            fix="go on with --resume, or choose another out",
        )
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "metrics.jsonl").unlink(missing_ok=True)  # of a run without a checkpoint
    (config.out / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return None


def _same(was: Mapping[str, Any], config: ReinforceConfig) -> None:
    now = config.model_dump(mode="json")
    changed = [key for key in now if key not in _FREE and now[key] != was.get(key)]
    if changed:
        raise UserError(
            "a run goes on with the config it began with",
            where=config.out,
            got=", ".join(f"{key}: {now[key]}" for key in changed),
            expected=", ".join(f"{key}: {was.get(key)}" for key in changed),
        )


def _line(told: Mapping[str, Any]) -> str:
    words = [f"step {told['step']}"]
    for name in ("reward", "accuracy", "looks", "visual_tokens", "skipped", "kl"):
        if name in told:
            words.append(f"{name} {told[name]:.3g}")
    return ", ".join(words)
