"""The agent: a model, its tools and an engine behind four calls.

:meth:`PerceptionAgent.run` answers one question, :meth:`~PerceptionAgent.run_stream` shows it
happening, :meth:`~PerceptionAgent.run_batch` answers many together, and
:meth:`~PerceptionAgent.conversation` keeps a session for several questions on the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt_agent.agent.dialect import Dialect
from vpt_agent.agent.dispatch import Dispatcher
from vpt_agent.agent.load import StockOptions, check_engine, load_parts, stock_dialect
from vpt_agent.agent.pictures import Ahead, Given, Images, Pictures
from vpt_agent.agent.plan import Abilities, require_tools
from vpt_agent.agent.run import Steps
from vpt_agent.agent.talk import StreamItem, Talk, TraceTarget
from vpt_agent.agent.token_surface import TokenDialect
from vpt_agent.engine.ahead import Decoding
from vpt_agent.engine.core import Engine, LanguageModel
from vpt_agent.engine.intervention import Intervention
from vpt_agent.engine.options import EngineOptions
from vpt_agent.engine.sampling import Sampling
from vpt_agent.errors import MissingExtraError, ServerError, UserError
from vpt_agent.prompt.vpt import Tokenizer, VPTLayout
from vpt_agent.tokens.table import PerceptionTable, ResolvedTable
from vpt_agent.tool import PerceptionTool, ToolRegistry
from vpt_agent.trace import RunFinished, Trace
from vpt_agent.types import Answer, Limits, Usage
from vpt_agent.vision.policy import ImagePolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vpt_agent.agent.load import Parts
    from vpt_agent.model import VPTForConditionalGeneration
    from vpt_agent.model.remote import RemoteOptions

Tools = Sequence[PerceptionTool | type[PerceptionTool]] | ToolRegistry | None


@dataclass(frozen=True)
class Question:
    """One entry of :meth:`PerceptionAgent.run_batch`; what is None is taken from the call.

    ``intervention`` is an experiment's change of this run (see :mod:`vpt_agent.evaluation`).
    """

    text: str
    image: Images = None
    tool_choice: str | None = None
    seed: int | None = None
    limits: Limits | None = None
    trace: TraceTarget = None
    intervention: Intervention | None = None


class PerceptionAgent:
    """Answers questions about pictures; looks again by calling perception tools.

    Make one with :meth:`from_pretrained`, or from parts: ``model`` and ``tokenizer``, the
    ``policy`` by which pictures become patches, a ``registry`` of tools, and what the checkpoint
    says of itself (``abilities``). ``dialect`` makes how the agent talks with a model without
    perception tokens, from its engine and dispatcher.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None,
        *,
        policy: ImagePolicy,
        registry: ToolRegistry,
        abilities: Abilities,
        max_positions: int = 32768,
        max_cached_tokens: int | None = None,
        decoding: Decoding = "auto",
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
        allow_urls: bool = False,
        dialect: Callable[[Engine, Dispatcher], Dialect] | None = None,
    ) -> None:
        check_engine(decoding, options, max_cached_tokens)
        self.model, self.tokenizer = model, tokenizer
        self.registry, self.abilities, self.allow_urls = registry, abilities, allow_urls
        self.engine = Engine(
            model,
            policy,
            max_positions=max_positions,
            max_cached_tokens=max_cached_tokens,
            decoding=decoding,
            max_runs=options.max_runs,
            measures=options.measures,
            block=options.block,
            feature_cache=options.feature_cache,
        )
        self.dispatcher = Dispatcher(self.engine, registry, regions=abilities.regions)
        self.pictures = Pictures(self.engine.features.prepare, allow_urls=allow_urls)
        self._layout, self._dialect = None, None
        if dialect is not None:
            self._dialect = dialect(self.engine, self.dispatcher)
        elif tokenizer is not None:
            self._layout = VPTLayout(tokenizer, model.table.table)

    @property
    def layout(self) -> VPTLayout:
        """How conversations with perception tokens are laid out."""
        if self._layout is None:
            raise UserError(
                "this agent's model has no perception tokens", where=self.abilities.name
            )
        return self._layout

    @property
    def dialect(self) -> Dialect:
        """How the agent talks with its kind of model."""
        if self._dialect is not None:
            return self._dialect
        return TokenDialect(self.layout, self.engine, self.dispatcher, self.abilities)

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
        coordinates: str | None = None,
        max_pixels: int | None = None,
        chat_template: str | None = None,
        constrained: bool = True,
        compiled: bool = False,
        decoding: Decoding = "auto",
        weights: str = "own",
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
    ) -> PerceptionAgent:
        """Load a checkpoint directory or hub name; None is the small model that ships.

        ``device`` auto takes a GPU if there is one. ``dtype`` auto is the checkpoint's on a GPU
        and float32 on the CPU. ``tools``: None takes every installed tool that lacks nothing (an
        extra, a checkpoint), a list adds its tools to those, a registry replaces them; a kind of a
        model's own needs its tool (a :class:`UserError` names it) or a registry that leaves it out.
        ``progress`` hears one line per stage of loading.

        A stock Qwen2-VL, Qwen2.5-VL or Qwen3-VL (or another model of pictures and text whose
        language model is a plain decoder: that is checked) calls its tools as JSON, by its own chat
        template (``chat_template`` replaces it), ``constrained`` by their schemas while it decodes
        (extra ``json``). It writes boxes in its family's frame or in ``coordinates`` (``norm1000``,
        ``shown``, ``view``); ``max_pixels`` bounds the area at which it sees a picture.

        ``compiled``: this process decodes on one CPU thread by routines in C that are compiled now
        (:mod:`vpt_agent.model.compiled`; a second, and a C compiler). ``decoding`` says who chooses
        tokens: the ``device``, several before the host looks, or the ``host``; ``auto`` is the
        device on CUDA (docs/gpu-decode.md). ``weights``: ``int8`` or ``float8`` gives the language
        model's layers weights of eight bits (extra ``int8``). ``max_cached_tokens`` bounds the
        cache; ``options`` say how answers go on together (docs/many-answers.md).
        """
        from vpt_agent.model.compiled import use

        check_engine(decoding, options, max_cached_tokens)
        if compiled:
            use()
        parts = load_parts(
            name,
            device=device,
            dtype=dtype,
            encoders=encoders,
            weights=weights,
            say=progress or (lambda _: None),
            options=StockOptions(coordinates, max_pixels, chat_template, constrained),
        )
        return cls._of(
            parts, tools, max_cached_tokens=max_cached_tokens, decoding=decoding, options=options,
            allow_urls=allow_urls,
            dialect=None if parts.stock is None else stock_dialect(parts, constrained=constrained),
        )  # fmt: skip

    @classmethod
    def _of(cls, parts: Parts, tools: Tools, **settings: Any) -> PerceptionAgent:
        """An agent on a model with perception tokens, or on a stock one by its dialect."""
        return cls(
            parts.model,
            parts.tokenizer,
            policy=parts.policy,
            registry=_registry(tools, parts.model.table, parts.abilities),
            abilities=parts.abilities,
            max_positions=parts.max_positions,
            **settings,
        )

    @classmethod
    def from_stock(
        cls,
        model: PreTrainedModel,
        tokenizer: Any,
        tools: Tools = None,
        *,
        name: str = "stock model in memory",
        policy: ImagePolicy | None = None,
        coordinates: str | None = None,
        chat_template: str | None = None,
        constrained: bool = True,
        max_cached_tokens: int | None = None,
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
    ) -> PerceptionAgent:
        """An agent on a stock model that is in memory already; see :meth:`from_pretrained`.

        ``tokenizer`` is its processor instead, for a model that is no Qwen-VL.
        """
        from vpt_agent.agent.load import stock_as_parts, stock_dialect
        from vpt_agent.model.chat.load import plain_parts, stock_parts
        from vpt_agent.tool.habits import check_coordinates

        frame = None if coordinates is None else check_coordinates(coordinates)
        if hasattr(tokenizer, "tokenizer"):  # a processor
            stock = plain_parts(model, tokenizer, coordinates=frame, chat_template=chat_template)
        else:
            stock = stock_parts(
                model, tokenizer, policy=policy, coordinates=frame, chat_template=chat_template
            )
        parts = stock_as_parts(stock, name)
        return cls(
            parts.model,
            parts.tokenizer,
            policy=parts.policy,
            registry=_registry(tools),
            abilities=parts.abilities,
            max_positions=parts.max_positions,
            max_cached_tokens=max_cached_tokens,
            options=options,
            dialect=stock_dialect(parts, constrained=constrained),
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
        decoding: Decoding = "auto",
        options: EngineOptions = EngineOptions(),  # noqa: B008 - frozen
    ) -> PerceptionAgent:
        """An agent on a VPT model that is in memory already (while training, in tests)."""
        from vpt_agent.agent.load import parts_of

        return cls._of(
            parts_of(model, tokenizer, name), tools,
            max_cached_tokens=max_cached_tokens, decoding=decoding, options=options,
        )  # fmt: skip

    @classmethod
    def from_server(
        cls,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        tools: Tools = None,
        *,
        options: RemoteOptions | None = None,
        client: Any = None,
        allow_urls: bool = False,
    ) -> PerceptionAgent:
        """An agent whose ``model`` is behind an OpenAI-compatible server (extra ``openai``).

        ``base_url`` is the server's address (None: the official one), ``api_key`` its key (None:
        the environment's ``OPENAI_API_KEY``; a server of one's own mostly wants none). ``options``
        say how it is talked to. ``client`` is an official client of one's own instead.
        """
        from vpt_agent.agent.remote import RemoteDialect
        from vpt_agent.model.remote.client import Remote
        from vpt_agent.model.remote.elsewhere import Elsewhere

        remote = Remote(model, base_url=base_url, api_key=api_key, options=options, client=client)
        abilities = Abilities(name=f"{model} at {base_url or 'its server'}")
        return cls(
            Elsewhere(),
            None,
            policy=ImagePolicy(kind="fit", longest=remote.options.longest, upscale=False),
            registry=_registry(tools),
            abilities=abilities,
            allow_urls=allow_urls,
            dialect=lambda _, dispatcher: RemoteDialect(remote, dispatcher, abilities),
        )

    @classmethod
    def from_script(
        cls,
        turns: Sequence[str],
        tools: Tools = None,
        *,
        encoders: Sequence[str] = ("clip", "dino", "sam"),
        table: PerceptionTable | None = None,
        written: bool = False,
    ) -> PerceptionAgent:
        """An agent whose model says ``turns``, one after another: for tests and demos. It knows the
        published kinds of ``encoders``, or those of ``table``. If its calls are ``written``, it
        calls every tool as JSON in ``<tool_call>`` tags, with boxes as the tool wants them."""
        from vpt_agent.model.scripted import ScriptedModel

        if written:
            return cls._from_written_script(turns, tools)
        model = ScriptedModel(turns, encoders=encoders, table=table)
        abilities = Abilities(name="scripted")
        return cls(
            model,
            model.tokenizer,
            policy=ImagePolicy(),
            registry=_registry(tools, model.table, abilities),
            abilities=abilities,
        )

    @classmethod
    def _from_written_script(cls, turns: Sequence[str], tools: Tools) -> PerceptionAgent:
        from vpt_agent.agent.written_surface import WrittenDialect
        from vpt_agent.model.chat.scripted import scripted_layout
        from vpt_agent.model.scripted import ScriptedModel
        from vpt_agent.tool.habits import Habit

        model = ScriptedModel(turns, table=PerceptionTable(()))
        layout, abilities = scripted_layout(model.tokenizer), Abilities(name="scripted")
        habit = Habit("view", whole=False)
        return cls(
            model,
            model.tokenizer,
            policy=ImagePolicy(),
            registry=_registry(tools),
            abilities=abilities,
            dialect=lambda engine, dispatcher: WrittenDialect(
                layout, engine, dispatcher, abilities, habit, None
            ),
        )

    def close(self) -> None:
        """Stop the threads of tools, pictures and encoders. Sessions in use stay readable."""
        self.dispatcher.close()
        self.pictures.close()
        with self.engine.lock:
            self.engine.features.early.close()

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
        :class:`Trace`. What cannot be used is a :class:`UserError`; a limit is an outcome
        (``context``, the model's longest sequence, is one too).
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
    ) -> Generator[StreamItem, None, None]:
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
        asked = []
        sampling = Sampling(temperature, top_k, top_p, seed)
        for entry in questions:
            q = _question(entry)
            given = {"tool_choice": tool_choice, "limits": limits, "seed": seed}
            own = {k: getattr(q, k) for k in given if getattr(q, k) is not None}
            asked.append(replace(q, **(given | own)))
        # Runs in one trace are numbered as they begin: those do not begin as pictures come.
        apart = not any(isinstance(q.trace, Trace) for q in asked)
        ahead = None
        if apart:
            ahead = self.pictures.ahead([q.image for q in asked], most=self.engine.loop.most)
        try:
            return self.engine.drive(
                [self._one_of_batch(q, sampling, ahead, i) for i, q in enumerate(asked)]
            )
        finally:
            if ahead is not None:
                ahead.close()

    def _one_of_batch(
        self, q: Question, sampling: Sampling, ahead: Ahead | None, number: int
    ) -> Steps:
        """One question, whose errors are its answer. Its cache row is given back as it ends."""
        talk: Talk | None = None
        try:
            talk = self.conversation(trace=q.trace)
            image: Images | Given = q.image
            if ahead is not None:
                image = yield from ahead.given(number)
            steps = talk.steps(
                q.text,
                q.tool_choice or "auto",
                q.limits,
                replace(sampling, seed=q.seed),
                image,
                intervention=q.intervention,
            )
            return (yield from steps)
        except (UserError, MissingExtraError, ServerError) as error:
            return _failed(error, Trace() if talk is None else talk.trace)
        except GeneratorExit:  # the batch is given up: its other pictures are not wanted
            if ahead is not None:
                ahead.close()
            raise
        finally:
            if ahead is not None:
                ahead.finished(number)
            if talk is not None:
                talk.close()

    def conversation(self, image: Images = None, *, trace: TraceTarget = None) -> Talk:
        """Several questions on the same pictures: one session, one trace."""
        return Talk(self, image, trace)


def _failed(error: Exception, trace: Trace) -> Answer:
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
    tools: Tools, table: ResolvedTable | None = None, abilities: Abilities | None = None
) -> ToolRegistry:
    if isinstance(tools, ToolRegistry):
        return tools
    registry = ToolRegistry.with_installed(tools or ())
    if table is not None and abilities is not None:
        require_tools(table, registry, abilities)
    return registry
