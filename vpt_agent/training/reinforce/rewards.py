"""What a run is worth: functions of the problem and the answer, added up by weight."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vpt_agent.errors import UserError
from vpt_agent.trace import PerceptionAppended
from vpt_agent.training.reinforce.config import RewardPart
from vpt_agent.training.reinforce.problems import Problem
from vpt_agent.types import Answer

Reward = Callable[[Problem, Answer], float]
"""A number for a run. The answer has the trace, the calls, the views and what all of it cost."""


def exact_match(problem: Problem, answer: Answer) -> float:
    """1 if the answer is the right one to the letter (surrounding space aside), else 0.

    A run that a limit ended is not right. The same rule as ``vpt_agent.evaluation``'s.
    """
    return float(answer.status == "answered" and answer.text.strip() == problem.answer.strip())


def visual_tokens(problem: Problem, answer: Answer) -> float:
    """Visual tokens that the run's calls added; the pictures of the question do not count."""
    added = [e for e in answer.trace.events if isinstance(e, PerceptionAppended)]
    return float(sum(event.visual_tokens for event in added))


def looks(problem: Problem, answer: Answer) -> float:
    """Calls that the run made."""
    return float(len(answer.calls))


def new_tokens(problem: Problem, answer: Answer) -> float:
    """Tokens decoded."""
    return float(answer.usage.new_tokens)


def limit(problem: Problem, answer: Answer) -> float:
    """1 if a limit ended the run, else 0."""
    return float(answer.status == "limit")


REWARDS: dict[str, Reward] = {
    f.__name__: f for f in (exact_match, visual_tokens, looks, new_tokens, limit)
}
"""The rewards that a config names without a module."""


@dataclass(frozen=True)
class Total:
    """The weighted sum of ``parts`` (reward, weight)."""

    parts: tuple[tuple[Reward, float], ...]

    def __call__(self, problem: Problem, answer: Answer) -> float:
        """The run's reward; one that is no finite number is a :class:`UserError`."""
        total = 0.0
        for reward, weight in self.parts:
            value = float(reward(problem, answer))
            if not math.isfinite(value):
                name = getattr(reward, "__name__", repr(reward))
                raise UserError("a reward is no number", where=name, got=value)
            total += weight * value
        return total


def total_of(parts: Sequence[RewardPart]) -> Total:
    """The rewards that a config names."""
    return Total(tuple((_named(part.use), part.weight) for part in parts))


def _named(name: str) -> Reward:
    if name in REWARDS:
        return REWARDS[name]
    module, mark, attribute = name.partition(":")
    if not mark:
        raise UserError(
            "no such reward",
            where="rewards",
            got=name,
            expected=f"{', '.join(REWARDS)}, or package.module:function",
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError("a reward cannot be imported", where=name, got=str(error)) from error
    if not callable(found):
        raise UserError("a reward is a function", where=name, got=type(found).__name__)
    reward: Reward = found
    return reward
