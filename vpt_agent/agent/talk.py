"""A conversation: several questions on the same pictures, in one session and one trace."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vpt_agent.agent.dialect import Asked, Dialect, Heard
from vpt_agent.agent.pictures import Given, Images
from vpt_agent.agent.recorder import Recorder
from vpt_agent.agent.run import Run, Steps
from vpt_agent.agent.state import Conversation
from vpt_agent.engine.intervention import Intervention
from vpt_agent.engine.sampling import Sampling
from vpt_agent.errors import UserError
from vpt_agent.trace import Event, Trace
from vpt_agent.types import Answer, Limits, TokenSource

if TYPE_CHECKING:
    from vpt_agent.agent.agent import PerceptionAgent

TraceTarget = Trace | str | Path | None


NO_TOKEN = -1
"""The id of a piece of text whose model is on another machine: it has none here."""

_NOBODY = Heard()


@dataclass(frozen=True)
class TokenDelta:
    """A token as it is chosen: what :meth:`PerceptionAgent.run_stream` shows between events."""

    token: int
    text: str
    source: TokenSource


@dataclass(frozen=True)
class AnswerReady:
    """The last thing a stream yields."""

    answer: Answer


StreamItem = Event | TokenDelta | AnswerReady


class Talk:
    """A conversation: :meth:`ask` as often as you like; earlier turns stay in the cache.

    A question that fails, or whose stream is closed, is taken back: the conversation stands where
    it was before it, and its pictures come with the next question if they were given to
    :meth:`PerceptionAgent.conversation`. One question at a time; after :meth:`close` none.
    """

    def __init__(self, agent: PerceptionAgent, image: Images, trace: TraceTarget) -> None:
        self.agent = agent
        self._waiting = agent.pictures.load(image)  # no answered question has shown them
        self.trace = (
            trace if isinstance(trace, Trace) else Trace(trace, model=agent.abilities.to_dict())
        )
        self._state: Conversation | None = None
        self._closed = False

    def close(self) -> None:
        """Give the session's cache row back."""
        self._closed = True
        if self._state is not None:
            self._state.close()
            self._state = None

    def ask(
        self,
        question: str,
        image: Images = None,
        *,
        tool_choice: str = "auto",
        limits: Limits | None = None,
        seed: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        keep: bool = True,
    ) -> Answer:
        """Ask the next question; ``image`` adds pictures. ``keep`` False ends the session."""
        try:
            sampling = Sampling(temperature, top_k, top_p, seed)
            steps = self.steps(question, tool_choice, limits, sampling, image)
            return self.agent.engine.drive([steps])[0]
        finally:
            if not keep:
                self.close()

    def stream(
        self,
        question: str,
        image: Images = None,
        *,
        tool_choice: str = "auto",
        limits: Limits | None = None,
        seed: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        keep: bool = True,
    ) -> Generator[StreamItem, None, None]:
        """As :meth:`ask`, yielding what happens as it happens."""
        waiting: deque[StreamItem] = deque()
        answers: list[Answer] = []
        pieces = _TextPieces(self.agent.dialect)

        def kept(steps: Steps) -> Steps:
            answer = yield from steps
            answers.append(answer)
            return answer

        def on_token(token: int, source: TokenSource) -> None:
            waiting.append(TokenDelta(token, pieces.add(token), source))

        def on_text(text: str) -> None:
            waiting.append(TokenDelta(NO_TOKEN, text, "sampled"))

        heard = Heard(on_token, on_text)
        detach = self.trace.subscribe(waiting.append)
        try:
            sampling = Sampling(temperature, top_k, top_p, seed)
            steps = kept(self.steps(question, tool_choice, limits, sampling, image, heard))
            # Closed here, so that a stopped run still finds its session and its listeners.
            with closing(self.agent.engine.steps([steps])) as loop:
                for _ in loop:
                    while waiting:
                        yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
            yield AnswerReady(answers[0])
        finally:
            detach()
            if not keep:
                self.close()

    def steps(
        self,
        question: str,
        tool_choice: str,
        limits: Limits | None,
        sampling: Sampling,
        image: Images | Given = None,
        heard: Heard = _NOBODY,
        intervention: Intervention | None = None,
    ) -> Steps:
        """The run as a generator for the engine's loop. Checks the request before anything runs.

        ``intervention`` is an experiment's change; it stays for this question only.
        """
        agent = self.agent
        if self._closed:
            raise UserError(
                "this conversation is closed", where="Talk", fix="start a new one: conversation()"
            )
        new = self._numbered(self._waiting.plus(agent.pictures.load(image)))
        request = agent.dialect.plan(
            Asked(
                question,
                new.views,
                tool_choice,
                limits or Limits(),
                sampling,
                {v.id: f for v, f in zip(new.views, new.files, strict=True) if f is not None},
                new.notes,
            )
        )
        if self._state is None:
            self._state = agent.dialect.conversation()
        if self._state.session is not None:
            self._state.session.intervention = intervention
        elif intervention is not None:
            raise UserError(
                "an experiment changes a forward pass, and a server's cannot be changed",
                where=intervention.name,
                fix="use a model of this machine",
            )
        run = f"run_{len(self.trace.runs) + 1}"
        recorder = Recorder(self.trace, run, agent.dialect.raw_text)
        voice = agent.dialect.voice(request, self._state, recorder, heard)
        steps = Run(request, self._state, voice, agent.dispatcher, recorder).steps()
        return self._answered(steps)

    def _answered(self, steps: Steps) -> Steps:
        answer = yield from steps
        self._waiting = Given()
        return answer

    def _numbered(self, given: Given) -> Given:
        """``given`` with ids that name no other picture of this conversation or its trace."""
        taken = self.trace.views
        number = len(self._state.originals) if self._state is not None else 0
        views, notes = [], []
        for view, note in zip(given.views, given.notes_of, strict=True):
            number += 1
            while (known := taken.get(f"image_{number}")) and known.sha256 != view.sha256:
                number += 1
            name = f"image_{number}"
            views.append(view if view.id == name else replace(view, id=name, root=name))
            notes.append(tuple(n.replace(f"{view.id}:", f"{name}:", 1) for n in note))
        return Given(tuple(views), given.files, tuple(notes))


class _TextPieces:
    """Text of tokens one by one; a character of several tokens comes with its last one."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that is complete with ``token``."""
        self._held.append(token)
        text = self._dialect.text(self._held)
        # Four bytes are the longest character: what is longer is broken, not unfinished.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._held) < 4:
            return ""
        self._held = []
        return text
