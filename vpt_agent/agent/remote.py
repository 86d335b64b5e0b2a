"""The voice of a model behind a server: the conversation goes there with every request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vpt_agent.agent.dialect import Asked, Heard
from vpt_agent.agent.dispatch import Dispatcher
from vpt_agent.agent.plan import Abilities
from vpt_agent.agent.recorder import Recorder
from vpt_agent.agent.state import Conversation, Request
from vpt_agent.agent.written_items import WrittenReader
from vpt_agent.agent.written_plan import plan_written
from vpt_agent.engine.intervention import Condition, Intervention
from vpt_agent.engine.parts import Wait
from vpt_agent.model.remote.client import (
    Done,
    Expired,
    Item,
    Piece,
    Question,
    Remote,
    TooLong,
    Trouble,
)
from vpt_agent.model.remote.completion import Completion
from vpt_agent.model.remote.messages import (
    Answered,
    Entry,
    Given,
    NativeCall,
    Picture,
    Results,
    Said,
    data_url,
    readable,
)
from vpt_agent.model.voice import Allowed, Cost, Outcome, Reply, ReplyStop, SaidCall, Steps
from vpt_agent.prompt.chat import SYSTEM, tools_section, without_thoughts
from vpt_agent.tokens.grammar import ParseError
from vpt_agent.tool import WrittenCall, WrittenError, read_arguments, read_calls
from vpt_agent.tool.habits import Habit, schema_for
from vpt_agent.types import ToolCall, ToolResult, View

LETTERS = 4
"""Letters that a token has, about: for limits, where a server does not count."""
MUCH = 1_000_000
"""Tokens of the longest conversation, where nobody says."""


@dataclass(frozen=True)
class RemoteDialect:
    """See :class:`vpt_agent.agent.dialect.Dialect`: models behind servers."""

    remote: Remote
    dispatcher: Dispatcher
    abilities: Abilities
    shown: dict[tuple[str, str], Picture] = field(default_factory=dict)

    def plan(self, asked: Asked) -> Request:
        """Tools that are offered and required."""
        return plan_written(asked, self.dispatcher.registry, self.abilities)

    def conversation(self) -> Conversation:
        """With no session: the server keeps none."""
        return Conversation()

    def voice(
        self, request: Request, talk: Conversation, recorder: Recorder, heard: Heard
    ) -> RemoteVoice:
        """Turns as messages."""
        return RemoteVoice(request, talk, self, recorder, heard)

    def text(self, ids: Sequence[int]) -> str:
        """A server has no ids."""
        return ""

    def raw_text(self, ids: Sequence[int]) -> str:
        """A server has no ids."""
        return ""


class RemoteVoice:
    """See :class:`vpt_agent.model.voice.Voice`."""

    def __init__(
        self,
        request: Request,
        talk: Conversation,
        dialect: RemoteDialect,
        recorder: Recorder,
        heard: Heard,
    ) -> None:
        self.request, self.talk, self.recorder, self.heard = request, talk, recorder, heard
        self.remote, self.dispatcher = dialect.remote, dialect.dispatcher
        self.options = dialect.remote.options
        self.habit = Habit(self.options.coordinates)
        registry = dialect.dispatcher.registry
        self.offered = {name: registry[name] for name in request.kinds}
        self.reader = WrittenReader(self.offered, talk, self.habit, self.size_sent)
        self._sent_pictures = dialect.shown
        self._items: list[SaidCall | ParseError] = []
        self._references: list[str | None] = []  # ids of the reply's items, by the server
        self._said = ""
        self._used = 0

    @property
    def tools(self) -> Sequence[str]:
        """Names of the tools that it may call in this question."""
        return self.request.kinds

    @property
    def intervention(self) -> Intervention | None:
        """None: nothing of a server's model can be changed."""
        return None

    @property
    def condition(self) -> Condition | None:
        """None: there are no control states."""
        return None

    # --- what is said to the model --------------------------------------------------------

    def ask(self) -> Steps[None]:
        """The question and its pictures become a message; nothing is sent yet."""
        yield from ()
        self.talk.told |= frozenset(self.tools)
        pictures = tuple(self._picture(view) for view in self.request.views)
        entry = Said(self.request.question, pictures)
        self.recorder.remote_prompt(readable(entry))
        self._add(entry)

    def _add(self, entry: Entry) -> None:
        self.talk.messages = [*self.talk.messages, entry]

    def size_sent(self, view: View) -> tuple[int, int]:
        """Width and height at which a view is sent."""
        scale = min(1.0, self.options.longest / max(view.size))
        return max(1, round(view.size[0] * scale)), max(1, round(view.size[1] * scale))

    def _picture(self, view: View) -> Picture:
        label = self._label(view)
        key = (view.sha256, label)
        if key not in self._sent_pictures:
            size = self.size_sent(view)
            image = view.image
            if size != view.size:
                image = image.resize(size, Image.Resampling.LANCZOS)
            url = data_url(image, self.options.image_format)
            self._sent_pictures[key] = Picture(view.id, label, url, size)
            while len(self._sent_pictures) > 64:
                self._sent_pictures.pop(next(iter(self._sent_pictures)))
        return self._sent_pictures[key]

    def _label(self, view: View) -> str:
        """A view's name, since calls name their ``source``; its size where boxes are in pixels."""
        if not self.talk.told:
            return ""
        if self.habit.coordinates == "norm1000":
            return view.id
        size = self.size_sent(view) if self.habit.coordinates == "shown" else view.size
        return f"{view.id} ({size[0]} x {size[1]} pixels)"

    def results(self, outcome: Sequence[Outcome], errors: Sequence[ParseError]) -> Steps[bool]:
        """What the calls gave becomes messages; every call of the server's own gets one."""
        yield from ()
        results, wrong = iter(outcome), iter(errors)
        given = []
        for item, reference in zip(self._items, self._references, strict=True):
            if isinstance(item, ParseError):
                given.append(Given(reference, f"Error: {next(wrong).message}"))
            else:
                given.append(self._given(reference, *next(results)))
        entry = Results(tuple(given))
        self.recorder.remote_results([call.id for call, _ in outcome], readable(entry))
        self._add(entry)
        return True

    def _given(self, reference: str | None, call: ToolCall, result: ToolResult) -> Given:
        text = result.text or ""
        if result.error is not None:
            text = "\n".join(filter(None, [text, f"Error: {result.error.message}"]))
        return Given(reference, text, tuple(self._picture(view) for view in result.views))

    def inline(self, outcome: Outcome) -> Steps[bool]:
        """Servers have no inline calls."""
        yield from ()
        return True

    # --- what the model says --------------------------------------------------------------

    def reply(self, allowed: Allowed) -> Steps[Reply]:
        """One request; what it says is heard as it comes."""
        self._said = ""
        began = time.perf_counter()
        asking = self.remote.ask(self._question(allowed), seconds=allowed.left())
        try:
            while True:
                (item,) = yield Wait((asking.next(),))
                done = self._take(item)
                if done is None:
                    continue
                if isinstance(done, Reply):
                    return done
                return self._answered(done, allowed, time.perf_counter() - began)
        finally:
            asking.stop()

    def _take(self, item: Item) -> Reply | Done | None:
        if isinstance(item, Piece):
            self._said += item.text
            if self.heard.text is not None:
                self.heard.text(item.text)
        elif isinstance(item, Trouble):
            self._said = ""  # what had come of it is void
            self.recorder.request_failed(item)
            if item.left_out is not None:
                self.recorder.warn(
                    f"the server refused {item.left_out}: it is asked without from now on"
                )
        elif isinstance(item, TooLong):
            return Reply([], "new_tokens")
        elif isinstance(item, Expired):
            return Reply([], "deadline")
        else:
            return item
        return None

    def _question(self, allowed: Allowed) -> Question:
        names = [n for n in self.tools if n not in allowed.without] if allowed.calls > 0 else []
        schemas = [self._schema(name) for name in names]
        native = self.options.calls == "native"
        sampling = self.request.sampling
        settings: dict[str, Any] = {
            "limit": allowed.new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.top_p < 1:
            settings["top_p"] = sampling.top_p
        if sampling.seed is not None:
            settings["seed"] = sampling.seed
        if sampling.top_k:
            self.recorder.warn("top_k is no part of the protocol: this server is not told of it")
        # A conversation that holds calls needs their tools, though none may be made any more.
        kept = [self._schema(name) for name in self.tools] if not names else schemas
        return Question(
            tuple(self.talk.messages),
            self._system(schemas, native),
            kept if native else (),
            self._choice(names, allowed) if native and kept else None,
            settings,
        )

    def _schema(self, name: str) -> dict[str, Any]:
        tool = self.offered[name]
        function = {
            "name": tool.name,
            "description": tool.description,
            "parameters": schema_for(tool, self.habit),
        }
        return {"type": "function", "function": function}

    def _system(self, schemas: Sequence[Mapping[str, Any]], native: bool) -> str | None:
        if native or not schemas:
            return self.options.system
        return f"{self.options.system or SYSTEM}\n\n{tools_section(schemas)}"

    def _choice(self, names: Sequence[str], allowed: Allowed) -> Any:
        """The server's tool choice; None where the default says the same."""
        if not names:
            return "none"
        must = [n for n in self.request.first if n in names] if allowed.opening else []
        if not must:
            return None
        if len(must) == 1:
            return {"type": "function", "function": {"name": must[0]}}
        return "required"

    def _answered(self, done: Done, allowed: Allowed, seconds: float) -> Reply:
        said = done.completion
        self._said = said.text if said.refusal is None else said.refusal
        found, self._references = self._found(said)
        tokens = self._counted(done)
        self._items = self.reader.of(found, allowed)
        native = said.calls if any(r is not None for r in self._references) else ()
        self._add(Answered(self._said, native))
        stop: ReplyStop = "end"
        if said.refusal is not None:
            stop = "refused"
        elif said.finish == "length":
            stop = "new_tokens"
        self.recorder.remote_said(self._said, said.finish, seconds)
        if self.request.first and allowed.opening and allowed.calls > 0 and not self._items:
            self.recorder.warn(
                f"tool_choice={self.request.tool_choice!r} asked for a call, and the server's "
                "model made none"
            )
        return Reply(self._items, stop, tokens)

    def _found(self, said: Completion) -> tuple[list[WrittenCall | WrittenError], list[str | None]]:
        """The calls of an answer, each with its id by the server; those in its words, where the
        server made none of its own."""
        if not self.offered or said.refusal is not None:
            return [], []
        cut = said.finish == "length"
        if said.calls:
            return [_read(call, cut=cut) for call in said.calls], [c.id for c in said.calls]
        written = list(read_calls(said.text, cut=cut).items)
        return written, [None] * len(written)

    def _counted(self, done: Done) -> int:
        """Write down what the request took; the tokens that the model said."""
        said, counted = done.completion, done.completion.tokens
        cost = counted.cost
        if cost is None and self.options.prices is not None and counted.prompt is not None:
            cost = self.options.prices.cost(
                counted.prompt, counted.completion or 0, counted.cached or 0
            )
        self.recorder.request_answered(done, cost)
        if counted.completion is None:
            self.recorder.warn(
                "the server does not count tokens: limits go by about 4 letters each"
            )
        length = len(said.text) + sum(len(c.arguments) for c in said.calls)
        tokens = length // LETTERS + 1 if counted.completion is None else counted.completion
        self._used = (counted.prompt or 0) + tokens
        return tokens

    def cut(self) -> None:
        """A turn that ended early stands in the messages as far as it came."""
        if self.talk.messages and not isinstance(self.talk.messages[-1], Answered):
            self._add(Answered(self._said))
            return
        # Calls that were not run: their answers must stand behind them all the same.
        given = tuple(Given(r, "Error: not run") for r in self._references if r is not None)
        if given:
            self._add(Results(given))

    def text(self) -> str:
        """What the model answered in its last turn, calls and thoughts left out."""
        said = without_thoughts(self._said)
        return read_calls(said).text.strip() if self.offered else said

    def tool_of(self, error: ParseError) -> str:
        """The tool whose call was begun."""
        return error.call

    # --- how much fits --------------------------------------------------------------------

    def longest(self) -> int:
        """Tokens that a conversation can have, as far as it was said."""
        return self.options.context or MUCH

    def room(self) -> int:
        """What is left of it by the server's last count."""
        return self.longest() - self._used

    def cost(self, result: ToolResult) -> Cost:
        """About what a result takes: the server does not say before."""
        visual = sum(self.dispatcher.visual_tokens(view) for view in result.views)
        return Cost(visual, visual + len(result.text or "") // LETTERS + 1)


def _read(call: NativeCall, *, cut: bool) -> WrittenCall | WrittenError:
    """A call in the server's own form."""
    if not call.name:
        return WrittenError("invalid_json", "the call has no name", call.arguments)
    found = read_arguments(call.arguments, cut=cut)
    if isinstance(found, WrittenError):
        return WrittenError(found.kind, found.message, call.arguments, call.name)
    return WrittenCall(call.name, found.arguments, call.arguments, found.repairs, call.id)
