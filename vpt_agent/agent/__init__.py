"""The agent: one question, its perception calls, and the answer."""

from vpt_agent.agent.agent import PerceptionAgent, Question
from vpt_agent.agent.talk import AnswerReady, StreamItem, Talk, TokenDelta

__all__ = ["AnswerReady", "PerceptionAgent", "Question", "StreamItem", "Talk", "TokenDelta"]
