"""How an agent talks with its kind of model: what it may be asked, and whose voice answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from vpt_agent.engine.sampling import Sampling
from vpt_agent.types import Limits, TokenSource, View

if TYPE_CHECKING:
    from vpt_agent.agent.recorder import Recorder
    from vpt_agent.agent.state import Conversation, Request
    from vpt_agent.model.voice import Voice


@dataclass(frozen=True)
class Asked:
    """A question as the user put it. ``notes`` are what was said when its pictures were read,
    ``sources`` the bytes of their files by view."""

    question: str
    views: tuple[View, ...]
    tool_choice: str
    limits: Limits
    sampling: Sampling
    sources: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Heard:
    """Who hears what is said as it is said: tokens by id, or pieces of text where a model on
    another machine has no ids."""

    token: Callable[[int, TokenSource], None] | None = None
    text: Callable[[str], None] | None = None


class Dialect(Protocol):
    """One for each agent."""

    def plan(self, asked: Asked) -> Request:
        """The request, checked against what the model and its tools can do. Raises
        :class:`vpt_agent.errors.UserError`."""

    def conversation(self) -> Conversation:
        """The state of a new conversation."""

    def voice(
        self, request: Request, talk: Conversation, recorder: Recorder, heard: Heard
    ) -> Voice:
        """The model's side of ``talk``, for one question."""

    def text(self, ids: Sequence[int]) -> str:
        """What ids say, special tokens left out."""

    def raw_text(self, ids: Sequence[int]) -> str:
        """What ids spell, special tokens included."""
