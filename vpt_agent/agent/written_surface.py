"""JSON by a chat template: a stock model's conversation layout, calls and boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vpt_agent.agent.dialect import Asked, Heard
from vpt_agent.agent.dispatch import Dispatcher
from vpt_agent.agent.plan import Abilities
from vpt_agent.agent.recorder import Recorder
from vpt_agent.agent.session_voice import OnToken, SessionVoice
from vpt_agent.agent.state import Conversation, Request
from vpt_agent.agent.written_items import WrittenReader
from vpt_agent.agent.written_plan import plan_written
from vpt_agent.engine.core import Engine
from vpt_agent.engine.decode import Turn, TurnRules
from vpt_agent.engine.vocabulary import Vocabulary
from vpt_agent.engine.written import Offered, WrittenGrammar
from vpt_agent.model.voice import Allowed, SaidCall
from vpt_agent.prompt.chat import ChatLayout, Shown, without_thoughts
from vpt_agent.prompt.words import Outcome, PromptPart
from vpt_agent.tokens.grammar import ParseError
from vpt_agent.tokens.table import THINK_START
from vpt_agent.tool import read_calls
from vpt_agent.tool.habits import Habit, schema_for
from vpt_agent.types import View


@dataclass(frozen=True)
class WrittenDialect:
    """See :class:`vpt_agent.agent.dialect.Dialect`: stock models of this machine. ``vocabulary`` is
    None where calls are not constrained."""

    layout: ChatLayout
    engine: Engine
    dispatcher: Dispatcher
    abilities: Abilities
    habit: Habit
    vocabulary: Vocabulary | None

    def plan(self, asked: Asked) -> Request:
        """Tools that are offered and required."""
        return plan_written(asked, self.dispatcher.registry, self.abilities)

    def conversation(self) -> Conversation:
        """With a session of its own."""
        return Conversation(self.engine.session())

    def voice(
        self, request: Request, talk: Conversation, recorder: Recorder, heard: Heard
    ) -> SessionVoice:
        """Turns as tokens of the session."""
        surface = WrittenSurface(request, talk, self)
        return SessionVoice(request, talk, surface, self.dispatcher, recorder, on_token=heard.token)

    def text(self, ids: Sequence[int]) -> str:
        """What ids say."""
        return self.layout.text(ids)

    def raw_text(self, ids: Sequence[int]) -> str:
        """What ids spell."""
        return self.layout.raw_text(ids)


class WrittenSurface:
    """See :class:`vpt_agent.agent.session_voice.Surface`."""

    def __init__(self, request: Request, talk: Conversation, dialect: WrittenDialect) -> None:
        self.request, self.talk = request, talk
        self.layout, self.vocabulary = dialect.layout, dialect.vocabulary
        self.policy, self.habit = dialect.engine.policy, dialect.habit
        self.end, self.image_pad = self.layout.end, self.layout.image_pad
        registry = dialect.dispatcher.registry
        self.offered = {name: registry[name] for name in request.kinds}
        self.reader = WrittenReader(self.offered, talk, self.habit, self.size_seen)
        self._allowed = Allowed(0, 0)
        # Rows of the output head that belong to no token.
        used = len(self.vocabulary.spelled) if self.vocabulary is not None else 0
        total = dialect.engine.model.config.get_text_config().vocab_size if used else 0
        self._unused = frozenset(range(used, total))

    @property
    def tools(self) -> Sequence[str]:
        """Names of the tools that may be called."""
        return self.request.kinds

    def size_seen(self, view: View) -> tuple[int, int]:
        """Width and height to which a view is resized for the model."""
        return self.policy.plan(view.size, crop=view.parent is not None).size

    # --- what is said to the model --------------------------------------------------------

    def _schemas(self, names: Sequence[str]) -> list[dict[str, object]]:
        schemas: list[dict[str, object]] = []
        for name in names:
            tool = self.offered[name]
            function = {
                "name": tool.name,
                "description": tool.description,
                "parameters": schema_for(tool, self.habit),
            }
            schemas.append({"type": "function", "function": function})
        return schemas

    def _shown(self, views: Sequence[View]) -> list[Shown]:
        return [Shown(v.id, self._label(v)) for v in views]

    def _label(self, view: View) -> str:
        """A view's name in front of it, since calls name their ``source``; its size, where boxes
        are in its pixels."""
        if not self.talk.told:
            return ""
        if self.habit.coordinates == "norm1000":
            return view.id
        size = self.size_seen(view) if self.habit.coordinates == "shown" else view.size
        return f"{view.id} ({size[0]} x {size[1]} pixels)"

    def opening(self, views: Sequence[View], question: str) -> list[PromptPart]:
        """The beginning of a conversation, with the tools."""
        self.talk.told = frozenset(self.tools)
        return self.layout.opening(self._shown(views), question, self._schemas(self.tools))

    def follow_up(self, views: Sequence[View], question: str) -> list[PromptPart]:
        """A later question; tools that the model was not told of yet come with it."""
        new = [name for name in self.tools if name not in self.talk.told]
        self.talk.told |= frozenset(new)
        shown = self._shown(views)
        return self.layout.follow_up(shown, question, self._schemas(new))

    def results(self, told: Sequence[Outcome], views: Mapping[str, View]) -> list[PromptPart]:
        """The turn that brings results."""
        shown = {name: Shown(name, self._label(view)) for name, view in views.items()}
        return self.layout.results(told, shown)

    def inline(self, told: Outcome) -> list[PromptPart]:
        """JSON calls have no inline results: nothing."""
        return []

    # --- what the model says --------------------------------------------------------------

    def rules(self, allowed: Allowed, on_token: OnToken | None, room: int) -> TurnRules:
        """Free outside a call, the schemas of the tools inside."""
        self._allowed = allowed
        names = [name for name in self.tools if name not in allowed.without]
        open_ = names if allowed.calls > 0 else []
        must = [n for n in self.request.first if n in open_] if allowed.opening else []
        grammar = WrittenGrammar(
            self.vocabulary,
            [self._offer(name) for name in open_],
            must=[self._offer(name) for name in must],
            thinking=self.layout.thinking,
        )
        return TurnRules(
            grammar=grammar,
            end=self.end,
            stop=self.layout.stop_ids,
            starts=frozenset(),
            banned=self._unused,
            ban=grammar.banned,
            max_new_tokens=max(0, min(allowed.new_tokens, room)),
            max_calls=allowed.calls,
            expired=allowed.expired,
            on_token=on_token,
        )

    def _offer(self, name: str) -> Offered:
        """A tool as calls of it are constrained: a ``source`` is a view that there is."""
        tool = self.offered[name]
        schema = schema_for(tool, self.habit)
        if "view" in tool.needs and "source" in schema.get("properties", {}) and self.talk.views:
            none = [] if "source" in schema.get("required", ()) else [None]
            schema["properties"]["source"] = {"enum": [*self.talk.views, *none]}
        return Offered(name, schema)

    def words(self, turn: Turn) -> list[int]:
        """All ids of the turn: :meth:`answer` leaves calls and thoughts out."""
        ids = [i for span in turn.spans for i in span.ids]
        return ids[:-1] if ids and ids[-1] == self.end else ids

    def items(self, turn: Turn) -> list[SaidCall | ParseError]:
        """What is read from the turn's text."""
        cut = turn.stop in ("new_tokens", "deadline")
        return self.reader.items(self._text(self.words(turn)), self._allowed, cut=cut)

    def _text(self, ids: Sequence[int]) -> str:
        begun = THINK_START if self.layout.thinking else ""
        return begun + self.layout.raw_text(ids)

    def tool_of(self, error: ParseError) -> str:
        """The tool whose call was begun."""
        return error.call

    def answer(self, ids: Sequence[int]) -> str:
        """The words without calls and thoughts."""
        said = without_thoughts(self._text(ids))
        return read_calls(said).text.strip() if self.offered else said

    def text_tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.layout.words.plain(text))

    def name_of(self, token: int) -> str:
        """How a token is spelled."""
        return self.layout.raw_text([token])

    def readable(self, parts: Sequence[PromptPart], counts: Mapping[str, int]) -> str:
        """A prompt as one text."""
        return self.layout.readable(parts, counts)
