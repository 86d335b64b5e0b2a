"""What a run is asked, what its conversation keeps, and how far it has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vpt_agent.engine.sampling import Sampling
from vpt_agent.engine.session import Session
from vpt_agent.errors import InternalError
from vpt_agent.model.remote.messages import Entry
from vpt_agent.trace import Trace
from vpt_agent.types import Limits, ToolCall, ToolResult, View


@dataclass(frozen=True)
class Request:
    """One question, checked: what a run is made of.

    ``kinds`` are the perception kinds the model may call, ``first`` those of which the first turn
    must call one (empty: free); names of tools, where calls are JSON. ``question`` has its trigger
    phrase already.
    """

    question: str
    views: tuple[View, ...]
    kinds: tuple[str, ...]
    first: tuple[str, ...]
    tool_choice: str
    limits: Limits
    sampling: Sampling
    tools: Mapping[str, str]
    model: Mapping[str, Any]
    sources: Mapping[str, bytes] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass
class Conversation:
    """What stays between the questions of one conversation.

    ``tail`` are ids that were chosen and not computed yet. ``unclosed`` says that the assistant's
    last turn has no end of turn: it comes with what is appended next. ``originals`` are the user's
    pictures, ``views`` all that can be named. ``told`` are names of the tools that the model was
    told of as JSON, ``messages`` what was said to a model on another machine (no session then).
    """

    session: Session | None = None
    views: dict[str, View] = field(default_factory=dict)
    originals: tuple[View, ...] = ()
    tail: list[int] = field(default_factory=list)
    unclosed: bool = False
    runs: tuple[str, ...] = ()
    calls: int = 0
    busy: bool = False
    told: frozenset[str] = frozenset()
    messages: list[Entry] = field(default_factory=list)

    def require_session(self) -> Session:
        """The session of a model on this machine."""
        if self.session is None:
            raise InternalError("this conversation has no session", where="Conversation")
        return self.session

    def close(self) -> None:
        """Give the session's cache row back."""
        if self.session is not None:
            self.session.close()

    def name(self, view: View, trace: Trace) -> View:
        """Make ``view`` known. If its name means another picture already, in this conversation or
        in its trace, it gets a name of its own."""
        name, number = view.id, 1
        while True:
            known = self.views.get(name) or trace.views.get(name)
            if known is None or known.sha256 == view.sha256:
                break
            number += 1
            name = f"{view.id}~{number}"
        if name != view.id:
            view = replace(view, id=name, root=name if view.root == view.id else view.root)
        self.views[name] = view
        return view

    def save(self) -> Callable[[], None]:
        """Gives the function that takes back everything that happens from now on."""
        session, views, tail = self.session, dict(self.views), list(self.tail)
        mark = None if session is None else session.mark()
        originals, unclosed, runs = self.originals, self.unclosed, self.runs
        told, messages = self.told, list(self.messages)

        def restore() -> None:
            if session is not None and mark is not None and not session.closed:
                session.rewind(mark)
            self.views, self.tail, self.originals = views, tail, originals
            self.unclosed, self.runs = unclosed, runs
            self.told, self.messages = told, messages

        return restore


@dataclass
class Progress:
    """What one run has done so far."""

    calls: list[ToolCall] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    tokens: int = 0
    rounds: int = 0
    failures: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # failures by tool
    pixels: int = 0  # that calls added, as visual_tokens
    visual_tokens: int = 0
    said: set[str] = field(default_factory=set)  # limits already told
    made: dict[str, ToolResult] = field(default_factory=dict)  # results of calls that worked
