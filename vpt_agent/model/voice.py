"""The protocol of every kind of model: its side of one conversation, turn by turn.

The orchestrator (`vpt_agent.agent.run`) asks, lets the model reply, runs the calls of the reply and
tells their results, until a reply has no calls. It knows nothing else of the model, so perception
tokens, JSON written by a stock model, and the messages of a server are three voices of one kind.

The methods are parts of a run: generators that yield what they need of the engine's loop
(:mod:`vpt_agent.engine.parts`) and return what is said here.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from vpt_agent.tokens.grammar import ParseError
from vpt_agent.types import CallOrigin, ToolCall, ToolResult

if TYPE_CHECKING:
    from torch import Tensor

    from vpt_agent.engine.intervention import Condition, Intervention

T = TypeVar("T")
Steps = Generator[Any, Any, T]
"""A part of a run that returns ``T``."""

ReplyStop = Literal["end", "inline", "new_tokens", "deadline", "refused"]
"""Why a reply ended: the model ended its turn, wants an inline result, met a limit, or refused."""


@dataclass(frozen=True)
class Allowed:
    """What the coming reply may do: begin ``calls`` more calls, of any tool but those in
    ``without``; take ``new_tokens`` more tokens. ``opening``: it is the question's first reply, for
    which the tool choice holds. ``expired`` says when the run's time is over, ``left`` how many
    seconds it has (None: no end)."""

    calls: int
    new_tokens: int
    opening: bool = False
    without: frozenset[str] = frozenset()
    expired: Callable[[], bool] = lambda: False
    left: Callable[[], float | None] = lambda: None


@dataclass(frozen=True)
class SaidCall:
    """A call as the model said it; fields as in :class:`vpt_agent.types.ToolCall`. ``reference`` is
    the id that a server gave it."""

    name: str
    arguments: Mapping[str, Any]
    origin: CallOrigin
    kind: str | None = None
    tokens: tuple[int, ...] = ()
    control: Tensor | None = field(default=None, compare=False)
    repairs: tuple[str, ...] = ()
    reference: str | None = None


@dataclass(frozen=True)
class Reply:
    """One assistant turn, or its part up to an inline call. ``items`` are the calls, and what began
    as a call and is none, in order; ``tokens`` how many tokens the model chose."""

    items: Sequence[SaidCall | ParseError]
    stop: ReplyStop
    tokens: int = 0

    @property
    def broken(self) -> bool:
        """Whether something began as a call and is none."""
        return any(isinstance(item, ParseError) for item in self.items)


@dataclass(frozen=True)
class Cost:
    """What a result takes of the conversation: its visual tokens, and all its tokens."""

    visual_tokens: int
    tokens: int


Outcome = tuple[ToolCall, ToolResult]


class Voice(Protocol):
    """A model's side of one conversation, for one question."""

    @property
    def tools(self) -> Sequence[str]:
        """Names of the tools that it may call in this question."""

    @property
    def intervention(self) -> Intervention | None:
        """An experiment's change of this run."""

    @property
    def condition(self) -> Condition | None:
        """How features are conditioned with control states; None where nothing is."""

    def ask(self) -> Steps[None]:
        """Say the question with its pictures."""

    def reply(self, allowed: Allowed) -> Steps[Reply]:
        """Let the model say its next turn."""

    def results(self, outcome: Sequence[Outcome], errors: Sequence[ParseError]) -> Steps[bool]:
        """Tell what the calls of the last reply gave, as the next user turn; False if the
        conversation has no room for it."""

    def inline(self, outcome: Outcome) -> Steps[bool]:
        """The result of an inline call, right behind it; the turn goes on."""

    def room(self) -> int:
        """Tokens that the conversation can still take."""

    def longest(self) -> int:
        """Tokens that a conversation can have."""

    def cost(self, result: ToolResult) -> Cost:
        """What a result would take."""

    def tool_of(self, error: ParseError) -> str:
        """The tool whose call was begun, or an empty text."""

    def cut(self) -> None:
        """The turn was ended from outside: say so before whatever comes next."""

    def text(self) -> str:
        """What the model answered in its last turn."""
