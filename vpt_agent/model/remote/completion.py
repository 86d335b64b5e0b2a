"""What a server answered: put together from its pieces, and checked, since it may be anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from vpt_agent.model.remote.messages import NativeCall


class BrokenAnswerError(Exception):
    """An answer that is none: no choices, a stream without its end. It may pass: tried again."""


@dataclass(frozen=True)
class Tokens:
    """What the server counted; None where it did not tell. ``cost`` if it says so itself."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None
    reasoning: int | None = None
    cost: float | None = None


@dataclass(frozen=True)
class Completion:
    """One answer: its words, calls, the reason of its end, a refusal, thoughts shown apart."""

    text: str
    calls: tuple[NativeCall, ...] = ()
    finish: str = "stop"
    refusal: str | None = None
    reasoning: str = ""
    tokens: Tokens = field(default_factory=Tokens)
    model: str = ""
    id: str = ""


def whole(response: Any) -> Completion:
    """A ``ChatCompletion`` of the official client, which takes what servers send unchecked. Raises
    :class:`BrokenAnswerError`."""
    choices = getattr(response, "choices", None)
    if not isinstance(choices, list) or not choices:
        raise BrokenAnswerError("the answer has no choices")
    message = getattr(choices[0], "message", None)
    if message is None:
        raise BrokenAnswerError("the answer has no message")
    parts = _Parts()
    parts.take(message, list(_list(message, "tool_calls")))
    return parts.done(response, choices[0], getattr(response, "usage", None))


def streamed(chunks: Iterable[Any], on_text: Callable[[str], None]) -> Completion:
    """An answer from its ``ChatCompletionChunk``s; ``on_text`` hears its words as they come.
    Raises :class:`BrokenAnswerError`."""
    parts = _Parts()
    last: Any = None
    ended: Any = None
    usage: Any = None
    for chunk in chunks:
        last = chunk
        usage = getattr(chunk, "usage", None) or usage
        for choice in _list(chunk, "choices"):
            delta = getattr(choice, "delta", None)
            if delta is not None:
                text = parts.take(delta, list(_list(delta, "tool_calls")))
                if text:
                    on_text(text)
            if getattr(choice, "finish_reason", None):
                ended = choice
    if ended is None:
        raise BrokenAnswerError("the stream ended before the answer did")
    return parts.done(last, ended, usage)


class _Parts:
    """Collects the words and calls of an answer."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.refusal: list[str] = []
        self.reasoning: list[str] = []
        self.calls: dict[int, list[str]] = {}  # by index: id, name, arguments

    def take(self, part: Any, calls: list[Any]) -> str:
        """Take a message or a delta; gives its words."""
        words = _words(getattr(part, "content", None))
        self.text.append(words)
        self.refusal.append(_words(getattr(part, "refusal", None)))
        for name in ("reasoning_content", "reasoning"):
            self.reasoning.append(_words(getattr(part, name, None)))
        for number, call in enumerate(calls):
            index = getattr(call, "index", None)
            self._call(index if isinstance(index, int) else number, call)
        return words

    def _call(self, index: int, call: Any) -> None:
        known = self.calls.setdefault(index, ["", "", ""])
        function = getattr(call, "function", None)
        found = (
            getattr(call, "id", None),
            getattr(function, "name", None),
            getattr(function, "arguments", None),
        )
        for place, value in enumerate(found):
            if not isinstance(value, str):
                continue
            # Ids and names come once, or whole again with each piece; arguments in pieces.
            known[place] = known[place] + value if place == 2 else (known[place] or value)

    def done(self, response: Any, choice: Any, usage: Any) -> Completion:
        calls = tuple(
            NativeCall(id_ or f"call_{index}", name, arguments)
            for index, (id_, name, arguments) in sorted(self.calls.items())
        )
        finish = str(getattr(choice, "finish_reason", None) or "stop")
        refusal = "".join(self.refusal)
        if finish == "content_filter" and not refusal:
            refusal = "the server's content filter ended the answer"
        return Completion(
            text="".join(self.text),
            calls=calls,
            finish=finish,
            refusal=refusal or None,
            reasoning="".join(self.reasoning),
            tokens=_tokens(usage),
            model=str(getattr(response, "model", "") or ""),
            id=str(getattr(response, "id", "") or ""),
        )


def _list(holder: Any, name: str) -> list[Any]:
    found = getattr(holder, name, None)
    return found if isinstance(found, list) else []


def _words(value: Any) -> str:
    """Text, or the text of a list of parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = [p.get("text") if isinstance(p, dict) else getattr(p, "text", None) for p in value]
        return "".join(t for t in texts if isinstance(t, str))
    return ""


def _tokens(usage: Any) -> Tokens:
    def number(holder: Any, name: str) -> int | None:
        value = getattr(holder, name, None)
        plain = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        return value if plain else None

    cost = getattr(usage, "cost", None)
    return Tokens(
        number(usage, "prompt_tokens"),
        number(usage, "completion_tokens"),
        number(getattr(usage, "prompt_tokens_details", None), "cached_tokens"),
        number(getattr(usage, "completion_tokens_details", None), "reasoning_tokens"),
        float(cost) if isinstance(cost, int | float) and not isinstance(cost, bool) else None,
    )
