"""``reinforce(config)``: the policy-gradient stage, from a checkpoint to a checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpt_agent.agent import PerceptionAgent
from vpt_agent.config import shipped_model
from vpt_agent.data import Mixture, RowEncoder
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.training.collate import Collator
from vpt_agent.training.config import Source
from vpt_agent.training.folder import FINAL, drafted, open_run, prune, step_of
from vpt_agent.training.freeze import freeze
from vpt_agent.training.logs import MetricsFile
from vpt_agent.training.reinforce.config import ReinforceConfig
from vpt_agent.training.reinforce.learner import Learner
from vpt_agent.training.reinforce.plot import plot_reinforcement
from vpt_agent.training.reinforce.problems import Problem, at_step, problems_of
from vpt_agent.training.reinforce.rewards import Reward, total_of
from vpt_agent.training.reinforce.rollouts import figures, roll
from vpt_agent.training.reinforce.scoring import Scorer

STATE, OPTIMIZER = "reinforce.json", "optimizer.safetensors"
FREE = ("out", "steps", "batch", "save_every", "keep", "device")
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
    draw: Callable[[Source], Source] | None = None,
) -> Reinforced:
    """Run the stage as ``config`` says; the result lies in ``config.out / "final"``.

    ``problems`` stand in for the config's sources, ``reward`` for its rewards. ``resume`` goes on
    from the newest checkpoint, to the same weights as if the run had not been stopped, provided
    that the config and the questions are the same. A finished checkpoint, or a run begun and not
    resumed, is never overwritten: a :class:`UserError`. ``draw`` makes files of sources that are
    scenes.
    """
    latest = open_run(config, resume=resume, whole=_is_whole, free=FREE, say=say)
    worth = total_of(config.rewards) if reward is None else reward
    if draw is not None:
        config = config.model_copy(update={"sources": tuple(map(draw, config.sources))})
    say(f"loading {config.model}")
    stage = _Stage.load(config, latest)
    stream = problems_of(config, stage.model.table.table) if problems is None else problems
    metrics = MetricsFile(config.out)
    first = 0
    if latest is not None:
        first = step_of(latest)
        state = json.loads((latest / STATE).read_text(encoding="utf-8"))
        stream.load_state_dict(state.get("problems", {}))
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
            stage.save(config.out / f"checkpoint-{step}", step, problems=stream.state_dict())
            prune(config.out, _is_whole, keep=config.keep)
    final = config.out / FINAL
    stage.save(final, config.steps)
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

    def save(self, folder: Path, step: int, *, problems: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint: all files, then its name, so that half of one is none.

        With ``problems`` (what is known of the stream of them) it can be gone on with.
        """
        about: dict[str, Any] = {"step": step, "config": self.config.model_dump(mode="json")}
        with drafted(folder) as draft:
            self.model.save_pretrained(draft)
            self.processor.save_pretrained(draft)
            if problems is not None:
                about["problems"] = dict(problems)
                self.learner.save(draft / OPTIMIZER)
            (draft / STATE).write_text(json.dumps(about, indent=1), encoding="utf-8")


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / STATE).is_file()


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


def _line(told: Mapping[str, Any]) -> str:
    words = [f"step {told['step']}"]
    for name in ("reward", "accuracy", "looks", "visual_tokens", "skipped", "kl"):
        if name in told:
            words.append(f"{name} {told[name]:.3g}")
    return ", ".join(words)
