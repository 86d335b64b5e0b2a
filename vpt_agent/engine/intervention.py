"""What an experiment may change in one run: for measuring whether its perception is used.

A session without one (the default) computes as ever, at no cost. The engine, the dispatcher and
the orchestrator ask the session's intervention at the four places where perception enters the
forward pass; :mod:`vpt_agent.evaluation` has the switches that experiments are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from vpt_agent.types import ToolCall, ToolResult, View

if TYPE_CHECKING:
    from vpt_agent.engine.parts import Visual

Condition = Callable[[str, Tensor, Tensor], Tensor]
"""The model's own conditioning: kind, features f [V, D], control states [k, D] to [V, D]."""


class Intervention(Protocol):
    """The four places. Each is given what the run would do and returns what it shall do instead.

    ``condition`` is called from tool threads, several at once perhaps: it must keep no state.
    ``name`` stands in the run's warnings, and so in its trace: a changed run says that it is one.
    """

    @property
    def name(self) -> str:
        """What is changed, in a few words."""

    def control_embedding(self, kind: str, state: Tensor) -> Tensor | None:
        """The control token's input embedding [D], by rule the control ``state`` [D] itself
        (paper section 3.3); None keeps the token's ordinary embedding."""

    def condition(self, kind: str, features: Tensor, control: Tensor, plain: Condition) -> Tensor:
        """The features of one call's picture [V, D], by rule ``plain(kind, features, control)``."""

    def result(self, call: ToolCall, result: ToolResult, views: Mapping[str, View]) -> ToolResult:
        """What a call gave, before it is counted and shown. ``views`` are those it could see."""

    def visual(self, part: Visual, empty: Callable[[int], Tensor]) -> Visual | None:
        """A result's visual tokens on their way into the cache; None leaves them out.

        ``empty(id)`` is the ordinary embedding [D] of a token.
        """
