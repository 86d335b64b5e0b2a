"""The agent: a model, its tools and an engine behind four calls.

:meth:`PerceptionAgent.run` answers one question, :meth:`~PerceptionAgent.run_stream` shows it
happening, :meth:`~PerceptionAgent.run_batch` answers many together, and
:meth:`~PerceptionAgent.conversation` keeps a session for several questions on the same pictures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt_agent.agent.dispatch import Dispatcher
from vpt_agent.agent.plan import Abilities, plan_request
from vpt_agent.agent.recorder import Recorder
from vpt_agent.agent.run import Conversation, Run, Steps
from vpt_agent.engine.core import Engine, LanguageModel
from vpt_agent.engine.sampling import Sampling
from vpt_agent.errors import UserError
from vpt_agent.prompt.vpt import Tokenizer, VPTLayout
from vpt_agent.tool import PerceptionTool, ToolRegistry
from vpt_agent.trace import Event, RunFinished, Trace
from vpt_agent.types import Answer, Limits, TokenSource, Usage, View
from vpt_agent.vision.images import Source, load_views
from vpt_agent.vision.policy import ImagePolicy

if TYPE_CHECKING:
    from vpt_agent.model import VPTForConditionalGeneration

Images = Source | Sequence[Source] | None
TraceTarget = Trace | str | Path | None
Tools = Sequence[PerceptionTool | type[PerceptionTool]] | ToolRegistry | None


@dataclass(frozen=True)
class Question:
    """One entry of :meth:`PerceptionAgent.run_batch`; what is None is taken from the call."""

    text: str
    image: Images = None
    tool_choice: str | None = None
    seed: int | None = None
    limits: Limits | None = None
    trace: TraceTarget = None


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


class PerceptionAgent:
    """Answers questions about pictures; looks again by calling perception tools.

    Make one with :meth:`from_pretrained`, or from parts: ``model`` and ``tokenizer``, the
    ``policy`` by which pictures become patches, a ``registry`` of tools, and what the checkpoint
    says of itself (``abilities``).
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        policy: ImagePolicy,
        registry: ToolRegistry,
        abilities: Abilities,
        max_positions: int = 32768,
        max_cached_tokens: int | None = None,
        allow_urls: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.registry, self.abilities, self.allow_urls = registry, abilities, allow_urls
        self.engine = Engine(
            model, policy, max_positions=max_positions, max_cached_tokens=max_cached_tokens
        )
        self.layout = VPTLayout(tokenizer, model.table.table)
        self.dispatcher = Dispatcher(self.engine, registry, regions=abilities.regions)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        tools: Tools = None,
        *,
        encoders: Sequence[str] | None = None,
        max_cached_tokens: int | None = None,
        allow_urls: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> PerceptionAgent:
        """Load a checkpoint directory or hub name; None is the small model that ships.

        ``device`` auto takes a GPU if there is one. ``dtype`` auto is the checkpoint's on a GPU
        and float32 on the CPU. ``tools``: None takes every installed tool, a list adds its tools
        to those, a registry replaces them. ``progress`` hears one line per stage of loading.
        """
        from vpt_agent.agent.load import load_parts

        parts = load_parts(
            name, device=device, dtype=dtype, encoders=encoders, say=progress or (lambda _: None)
        )
        return cls(
            parts.model,
            parts.tokenizer,
            policy=parts.policy,
            registry=_registry(tools),
            abilities=parts.abilities,
            max_positions=parts.max_positions,
            max_cached_tokens=max_cached_tokens,
            allow_urls=allow_urls,
        )

    @classmethod
    def from_model(
        cls,
        model: VPTForConditionalGeneration,
        tokenizer: Tokenizer,
        tools: Tools = None,
        *,
        name: str = "model in memory",
        max_cached_tokens: int | None = None,
    ) -> PerceptionAgent:
        """An agent on a VPT model that is in memory already (while training, in tests)."""
        from vpt_agent.agent.load import parts_of

        parts = parts_of(model, tokenizer, name)
        return cls(
            parts.model,
            parts.tokenizer,
            policy=parts.policy,
            registry=_registry(tools),
            abilities=parts.abilities,
            max_positions=parts.max_positions,
            max_cached_tokens=max_cached_tokens,
        )

    @classmethod
    def from_script(
        cls,
        turns: Sequence[str],
        tools: Tools = None,
        *,
        encoders: Sequence[str] = ("clip", "dino", "sam"),
    ) -> PerceptionAgent:
        """An agent whose model says ``turns``, one after another: for tests and demos."""
        from vpt_agent.model.scripted import ScriptedModel

        model = ScriptedModel(turns, encoders=encoders)
        return cls(
            model,
            model.tokenizer,
            policy=ImagePolicy(),
            registry=_registry(tools),
            abilities=Abilities(name="scripted"),
        )

    def close(self) -> None:
        """Stop the tool threads. Sessions in use stay readable."""
        self.dispatcher.close()

    # --- asking ---------------------------------------------------------------------------

    def run(
        self,
        question: str,
        image: Images = None,
        *,
        tool_choice: str = "auto",
        limits: Limits | None = None,
        seed: int | None = None,
        trace: TraceTarget = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Answer:
        """Answer one question about one or several pictures.

        ``image``: path, bytes, PIL image or array, or a list of them. ``tool_choice``: ``auto``,
        ``none``, ``required`` or a tool's name. ``temperature`` 0 is greedy; otherwise ``seed``
        makes it reproducible. ``trace``: a new directory to write while running, or a
        :class:`Trace`. What cannot be used is a :class:`UserError`; a limit is an outcome.
        """
        return self.conversation(image, trace=trace).ask(
            question,
            tool_choice=tool_choice,
            limits=limits,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            keep=False,
        )

    def run_stream(
        self,
        question: str,
        image: Images = None,
        *,
        trace: TraceTarget = None,
        **options: Any,
    ) -> Iterator[StreamItem]:
        """As :meth:`run`, yielding trace events, tokens, and at the end :class:`AnswerReady`.

        Closing the iterator stops the run; what was done is in the trace.
        """
        return self.conversation(image, trace=trace).stream(question, keep=False, **options)

    def run_batch(
        self,
        questions: Sequence[Question | str | tuple[str, Images]],
        *,
        tool_choice: str = "auto",
        limits: Limits | None = None,
        seed: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[Answer]:
        """Answer many questions together: equal to single runs, in fewer forwards.

        One question's trouble is its own: its answer has status ``failed`` and says why in
        ``warnings``; the others go on.
        """
        runs: list[Steps] = []
        talks = []
        for entry in questions:
            q = _question(entry)
            sampling = Sampling(temperature, top_k, top_p, q.seed if q.seed is not None else seed)
            talk = self.conversation(None, trace=q.trace)
            talks.append(talk)
            asked = partial(
                talk.steps,
                q.text,
                q.tool_choice or tool_choice,
                q.limits or limits,
                sampling,
                q.image,
            )
            runs.append(_guarded(asked, talk.trace))
        try:
            return self.engine.drive(runs)
        finally:
            for talk in talks:
                talk.close()

    def conversation(self, image: Images = None, *, trace: TraceTarget = None) -> Talk:
        """Several questions on the same pictures: one session, one trace."""
        return Talk(self, image, trace)


class Talk:
    """A conversation: :meth:`ask` as often as you like; earlier turns stay in the cache."""

    def __init__(self, agent: PerceptionAgent, image: Images, trace: TraceTarget) -> None:
        self.agent = agent
        self._given = _load(image, agent.allow_urls, 1)
        self.trace = (
            trace if isinstance(trace, Trace) else Trace(trace, model=agent.abilities.to_dict())
        )
        self._state: Conversation | None = None
        self._on_token: Callable[[int, TokenSource], None] | None = None

    def close(self) -> None:
        """Give the session's cache row back."""
        if self._state is not None:
            self._state.session.close()
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
        sampling = Sampling(temperature, top_k, top_p, seed)
        try:
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
    ) -> Iterator[StreamItem]:
        """As :meth:`ask`, yielding what happens as it happens."""
        sampling = Sampling(temperature, top_k, top_p, seed)
        waiting: deque[StreamItem] = deque()
        answers: list[Answer] = []

        def kept(steps: Steps) -> Steps:
            answer = yield from steps
            answers.append(answer)
            return answer

        def on_token(token: int, source: TokenSource) -> None:
            waiting.append(TokenDelta(token, self.agent.layout.text([token]), source))

        detach = self.trace.subscribe(waiting.append)
        self._on_token = on_token
        try:
            steps = self.steps(question, tool_choice, limits, sampling, image)
            for _ in self.agent.engine.steps([kept(steps)]):
                while waiting:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
            yield AnswerReady(answers[0])
        finally:
            self._on_token = None
            detach()
            if not keep:
                self.close()

    def steps(
        self,
        question: str,
        tool_choice: str,
        limits: Limits | None,
        sampling: Sampling,
        image: Images = None,
    ) -> Steps:
        """The run as a generator for the engine's loop. Checks the request before anything runs."""
        agent = self.agent
        more = _load(image, agent.allow_urls, len(self._given.views) + 1)
        new = self._given.plus(more) if self._state is None else more
        request = plan_request(
            question,
            new.views,
            tool_choice=tool_choice,
            limits=limits or Limits(),
            sampling=sampling,
            table=agent.engine.table,
            registry=agent.registry,
            abilities=agent.abilities,
            layout=agent.layout,
            sources=new.bytes,
            notes=new.notes,
        )
        self._given = self._given.plus(more)
        if self._state is None:
            self._state = Conversation(agent.engine.session())
        run = f"run_{len(self.trace.runs) + 1}"
        recorder = Recorder(self.trace, run, lambda ids: agent.layout.raw_text(ids))
        return Run(
            request,
            self._state,
            agent.layout,
            agent.dispatcher,
            recorder,
            on_token=self._on_token,
        ).steps()


@dataclass(frozen=True)
class _Given:
    """Pictures of the user: views, the bytes of their files where there are files, notes."""

    views: tuple[View, ...] = ()
    bytes: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def plus(self, other: _Given) -> _Given:
        return _Given(
            (*self.views, *other.views),
            {**self.bytes, **other.bytes},
            (*self.notes, *other.notes),
        )


def _load(images: Images, allow_urls: bool, first: int) -> _Given:
    if images is None:
        return _Given()
    single = isinstance(images, str | Path | bytes) or not isinstance(images, Sequence)
    sources: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
    notes: list[str] = []
    views = load_views(sources, first=first, allow_urls=allow_urls, warnings=notes)
    files = {}
    for view, source in zip(views, sources, strict=True):
        if isinstance(source, bytes):
            files[view.id] = source
        elif isinstance(source, str | Path) and Path(source).is_file():
            files[view.id] = Path(source).read_bytes()
    return _Given(views, files, tuple(notes))


def _guarded(steps: Callable[[], Steps], trace: Trace) -> Steps:
    """In a batch an error is one question's answer, not everybody's exception."""
    try:
        return (yield from steps())
    except UserError as error:
        last = trace.events[-1] if trace.events else None
        warnings = last.warnings if isinstance(last, RunFinished) else ()
        return Answer("", (), (), (), Usage(), (*warnings, str(error)), trace, "failed")


def _question(entry: Question | str | tuple[str, Images]) -> Question:
    if isinstance(entry, Question):
        return entry
    if isinstance(entry, str):
        return Question(entry)
    if isinstance(entry, tuple) and len(entry) == 2:
        return Question(entry[0], entry[1])
    raise UserError(
        "a batch holds questions",
        got=type(entry).__name__,
        expected="Question, str, or (text, image)",
    )


def _registry(
    tools: Tools,
) -> ToolRegistry:
    if isinstance(tools, ToolRegistry):
        return tools
    registry = ToolRegistry.from_entry_points()
    registry.add_all(tools or ())
    return registry
