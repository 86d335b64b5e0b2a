"""From written calls to calls: boxes converted, what may not be called said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vpt_agent.agent.state import Conversation
from vpt_agent.model.voice import Allowed, SaidCall
from vpt_agent.tokens.grammar import ParseError
from vpt_agent.tool import PerceptionTool, WrittenCall, WrittenError, read_calls
from vpt_agent.tool.habits import Habit, converted
from vpt_agent.types import View


@dataclass(frozen=True)
class WrittenReader:
    """Reads a model's calls. ``size_seen`` gives the size (width, height) at which a view was
    shown; boxes are written by ``habit``."""

    offered: Mapping[str, PerceptionTool]
    talk: Conversation
    habit: Habit
    size_seen: Callable[[View], tuple[int, int]]

    def items(self, text: str, allowed: Allowed, *, cut: bool) -> list[SaidCall | ParseError]:
        """The calls in a turn's text, and what began as one and is none. Without tools a text
        is a text, whatever it looks like."""
        if not self.offered:
            return []
        return self.of(read_calls(text, cut=cut).items, allowed)

    def of(
        self, found: Sequence[WrittenCall | WrittenError], allowed: Allowed
    ) -> list[SaidCall | ParseError]:
        """The same for calls that were read already. Where no call may be made any more, a turn
        that holds nothing else is the last one."""
        if allowed.calls <= 0:
            return []
        items: list[SaidCall | ParseError] = []
        count = 0
        for item in found:
            if isinstance(item, WrittenError):
                items.append(ParseError(item.kind, item.message, (), item.name or ""))
                continue
            count += 1
            name = item.name.partition("@")[0]
            if count > allowed.calls:
                message = "no more calls can be made: answer with what you have"
                items.append(ParseError("limit", message, (), name))
            elif name in allowed.without:
                message = f"{name} failed too often: answer without it"
                items.append(ParseError("limit", message, (), name))
            else:
                items.append(self.call(item))
        return items

    def call(self, item: WrittenCall) -> SaidCall:
        """One call, its boxes in the tool's frame."""
        arguments, repairs = dict(item.arguments), item.repairs
        tool = self.offered.get(item.name)
        if tool is not None:
            view, size = self._look(tool.source_of(arguments, tuple(self.talk.views)))
            arguments, notes = converted(tool, arguments, self.habit, view, size, look=self._look)
            repairs += notes
        return SaidCall(item.name, arguments, "json", repairs=repairs, reference=item.id)

    def _look(self, named: object) -> tuple[View | None, tuple[int, int] | None]:
        view = self._source(named)
        return view, None if view is None else self.size_seen(view)

    def _source(self, named: object) -> View | None:
        """The view that a call names; the latest of the user's pictures, if it names none."""
        if named is None:
            return self.talk.originals[-1] if self.talk.originals else None
        return self.talk.views.get(str(named))
