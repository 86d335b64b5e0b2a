"""ReinforceConfig: one YAML file says all of a policy-gradient stage.

Plain values only; nothing is opened or loaded here. ``docs/reinforce.md`` walks through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from vpt_agent.training.config import Source
from vpt_agent.training.configfile import Part, RunConfig, make_as, read_as

Group = Literal["none", "std"]
Mean = Literal["token", "sequence"]


class RewardPart(Part):
    """A reward and its weight. ``use`` is a name that the library knows (``exact_match``,
    ``visual_tokens``, ``looks``, ``new_tokens``, ``limit``) or ``package.module:function``."""

    use: str
    weight: float = 1.0


class UpdatePart(Part):
    """How rollouts become a step: AdamW on the clipped objective.

    ``advantage``: reward less the group's mean, and divided by the group's standard deviation
    (``std``) or not (``none``). ``mean`` over all choices of the step alike (``token``), or over
    those of each ``sequence`` and then over the sequences. ``clip`` is the ratio's reach on both
    sides; ``passes`` optimiser steps are made on the same rollouts. ``kl`` weighs the divergence
    from the start model: 0 only measures it, null does without the start model. ``rows``
    conversations are computed together. ``warmup`` steps raise the learning rate.
    """

    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    epsilon: float = Field(1e-8, gt=0)
    max_norm: float = Field(1.0, gt=0)
    warmup: int = Field(0, ge=0)
    advantage: Group = "none"
    mean: Mean = "token"
    clip: float = Field(0.2, gt=0, lt=1)
    passes: int = Field(1, ge=1)
    kl: float | None = Field(0.0, ge=0)
    rows: int = Field(8, ge=1)


class ReinforceConfig(RunConfig):
    """A policy-gradient stage.

    ``model``: a directory, a hub name, or ``shipped``. ``sources`` are files of rows whose
    questions are asked (or scenes: :class:`~vpt_agent.training.config.Source`). Each of ``steps``
    steps asks ``questions`` questions ``group`` times each at ``temperature``. ``tool_choice`` and
    the limits ``calls``, ``rounds`` and ``new_tokens`` as in ``PerceptionAgent.run``. ``trainable``
    or ``frozen`` (parts of parameter names) say what learns; without them everything but the vision
    towers. ``batch`` rollouts run together.
    """

    model: str = "shipped"
    sources: tuple[Source, ...] = ()
    steps: int = Field(ge=1)
    questions: int = Field(8, ge=1)
    group: int = Field(8, ge=2)
    temperature: float = Field(1.0, gt=0)
    rewards: tuple[RewardPart, ...] = (
        RewardPart(use="exact_match"),
        RewardPart(use="visual_tokens", weight=-0.001),
    )
    update: UpdatePart = UpdatePart()
    tool_choice: str = "auto"
    calls: int = Field(4, ge=0)
    rounds: int = Field(3, ge=0)
    new_tokens: int = Field(64, ge=1)
    trainable: tuple[str, ...] | None = None
    frozen: tuple[str, ...] | None = None
    batch: int = Field(32, ge=1)
    seed: int = Field(0, ge=0)
    save_every: int = Field(20, ge=1)
    keep: int = Field(2, ge=1)
    device: Literal["auto", "cpu"] = "auto"

    @model_validator(mode="after")
    def _agrees(self) -> ReinforceConfig:
        if self.trainable is not None and self.frozen is not None:
            raise ValueError("say either trainable or frozen, or none for all but the towers")
        if not self.rewards:
            raise ValueError("without a reward there is nothing to learn")
        return self


def read_reinforce_config(path: Path | str, changes: Sequence[str] = ()) -> ReinforceConfig:
    """Read a YAML file. ``changes`` are ``key=value``, values in YAML: ``update.clip=0.1``."""
    return read_as(ReinforceConfig, path, changes)


def make_reinforce_config(data: Mapping[str, Any], *, where: str = "config") -> ReinforceConfig:
    """A config of plain values; all that is wrong is said in one :class:`UserError`."""
    return make_as(ReinforceConfig, data, where=where)
