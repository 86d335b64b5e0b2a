"""Rollouts: the agent answers every question of a step several times, and is judged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vpt_agent.agent import PerceptionAgent, Question
from vpt_agent.errors import UserError
from vpt_agent.training.reinforce.config import ReinforceConfig
from vpt_agent.training.reinforce.episode import Episode, episode_of, unlike_training
from vpt_agent.training.reinforce.problems import Problem
from vpt_agent.training.reinforce.rewards import Reward, exact_match, looks, visual_tokens
from vpt_agent.types import Answer, Limits


@dataclass(frozen=True)
class Rollout:
    """One answer to ``problem`` and what it is worth.

    ``episode`` is None where the learner cannot see what the run saw (``why`` says what is in the
    way): its reward counts in the group's mean, its tokens are not learnt from.
    """

    problem: Problem
    answer: Answer
    reward: float
    episode: Episode | None
    why: str = ""


def roll(
    agent: PerceptionAgent,
    problems: Sequence[Problem],
    config: ReinforceConfig,
    reward: Reward,
    *,
    step: int,
) -> list[list[Rollout]]:
    """Ask each problem ``config.group`` times; a group of rollouts for each, in order.

    The seeds follow from the config's seed, ``step`` and the place: the same weights give the same
    rollouts. A question that cannot be asked is a :class:`UserError`.
    """
    limits = Limits(calls=config.calls, rounds=config.rounds, new_tokens=config.new_tokens)
    asked = [
        Question(p.question, list(p.images) or None, seed=_seed(config.seed, step, i, g))
        for i, p in enumerate(problems)
        for g in range(config.group)
    ]
    rollouts: list[Rollout] = []
    for first in range(0, len(asked), config.batch):
        answers = agent.run_batch(
            asked[first : first + config.batch],
            tool_choice=config.tool_choice,
            limits=limits,
            temperature=config.temperature,
        )
        for number, answer in enumerate(answers, start=first):
            problem = problems[number // config.group]
            rollouts.append(_judged(agent, problem, answer, reward))
    return [rollouts[i : i + config.group] for i in range(0, len(rollouts), config.group)]


def _judged(agent: PerceptionAgent, problem: Problem, answer: Answer, reward: Reward) -> Rollout:
    if answer.status == "failed":
        raise UserError(
            "a question of the reinforcement stage cannot be asked",
            where=problem.question,
            got="; ".join(answer.warnings),
        )
    table = agent.engine.table
    episode = episode_of(answer.trace, table, image_pad=agent.layout.image_pad)
    why = unlike_training(episode, table) or ("" if episode.choices else "no choice was its own")
    return Rollout(problem, answer, reward(problem, answer), None if why else episode, why)


def _seed(seed: int, *place: int) -> int:
    """A seed of 63 bits for one rollout."""
    digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def figures(groups: Iterable[Sequence[Rollout]]) -> dict[str, object]:
    """Means over the rollouts: reward, accuracy, looks and visual tokens of calls per question,
    share that a limit ended or that cannot be learnt from; ``types`` the first four by type."""
    rollouts = [rollout for group in groups for rollout in group]
    by_type: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_type.setdefault(rollout.problem.type, []).append(rollout)
    return {
        **_means(rollouts),
        "limited": sum(r.answer.status == "limit" for r in rollouts) / len(rollouts),
        "dropped": sum(r.episode is None for r in rollouts) / len(rollouts),
        "types": {name: _means(found) for name, found in sorted(by_type.items())},
    }


def _means(rollouts: Sequence[Rollout]) -> dict[str, float]:
    n = len(rollouts)
    return {
        "rollouts": n,
        "reward": sum(r.reward for r in rollouts) / n,
        "accuracy": sum(exact_match(r.problem, r.answer) for r in rollouts) / n,
        "looks": sum(looks(r.problem, r.answer) for r in rollouts) / n,
        "visual_tokens": sum(visual_tokens(r.problem, r.answer) for r in rollouts) / n,
    }
