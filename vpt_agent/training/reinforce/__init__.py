"""Reinforcement: the agent's own runs, judged, move the model (GRPO-style groups).

problems ── agent, G times ──> traces ── episode_of ──> choices, probabilities, constraint
reward of each run, less its group's mean ──> objective on one forward over the conversation
"""

from vpt_agent.training.reinforce.config import (
    ReinforceConfig,
    make_reinforce_config,
    read_reinforce_config,
)
from vpt_agent.training.reinforce.episode import Choice, Episode, episode_of
from vpt_agent.training.reinforce.objective import advantages, objective
from vpt_agent.training.reinforce.problems import Problem, endless, problem_of
from vpt_agent.training.reinforce.rewards import REWARDS, Reward
from vpt_agent.training.reinforce.rollouts import Rollout, roll
from vpt_agent.training.reinforce.run import Reinforced, reinforce
from vpt_agent.training.reinforce.scoring import Scorer

__all__ = [
    "REWARDS",
    "Choice",
    "Episode",
    "Problem",
    "ReinforceConfig",
    "Reinforced",
    "Reward",
    "Rollout",
    "Scorer",
    "advantages",
    "endless",
    "episode_of",
    "make_reinforce_config",
    "objective",
    "problem_of",
    "read_reinforce_config",
    "reinforce",
    "roll",
]
