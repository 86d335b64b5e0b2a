"""Readers of traces that need an agent."""

from vpt_agent.review.replay import Difference, Replay, replay

__all__ = ["Difference", "Replay", "replay"]
