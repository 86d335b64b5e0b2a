"""Evaluation: what an answer is worth."""

from vpt_agent.evaluation.judge import Verdict, published_score, read_verdict

__all__ = ["Verdict", "published_score", "read_verdict"]
