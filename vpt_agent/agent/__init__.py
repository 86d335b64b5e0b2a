"""The agent: one question, its perception calls, and the answer."""

from vpt_agent.agent.agent import (
    AnswerReady,
    PerceptionAgent,
    Question,
    StreamItem,
    Talk,
    TokenDelta,
)

__all__ = ["AnswerReady", "PerceptionAgent", "Question", "StreamItem", "Talk", "TokenDelta"]
