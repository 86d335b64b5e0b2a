"""A conversation as it is kept, and as the messages of the OpenAI protocol."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vpt_agent.tokens.table import RESPONSE_END, RESPONSE_START

Message = dict[str, Any]
ImagePlace = Literal["tool", "user"]


@dataclass(frozen=True)
class Picture:
    """A picture as it is sent: its view, the words in front of it, a data URL, its size there."""

    view: str
    label: str
    url: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Said:
    """What the user says: pictures, then text."""

    text: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class NativeCall:
    """A call in the server's own form; ``arguments`` is JSON text as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answered:
    """What the model said."""

    text: str
    calls: tuple[NativeCall, ...] = ()


@dataclass(frozen=True)
class Given:
    """The result of one call: ``id`` is the call's, None where it was written in the text."""

    id: str | None
    text: str
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Results:
    """The results of one turn's calls."""

    given: tuple[Given, ...] = field(default_factory=tuple)


Entry = Said | Answered | Results


def as_messages(
    entries: Sequence[Entry], *, system: str | None, images: ImagePlace
) -> list[Message]:
    """The messages that are sent. ``images`` says where pictures of results stand."""
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": system})
    for entry in entries:
        if isinstance(entry, Said):
            messages.append({"role": "user", "content": _content(entry.pictures, entry.text)})
        elif isinstance(entry, Answered):
            messages.append(_answered(entry))
        else:
            messages += _results(entry, images)
    return messages


def _answered(entry: Answered) -> Message:
    message: Message = {"role": "assistant", "content": entry.text or None}
    if entry.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _sendable(call.arguments)},
            }
            for call in entry.calls
        ]
    elif not entry.text:
        message["content"] = ""
    return message


def _sendable(arguments: str) -> str:
    """Servers read the arguments of earlier calls again, and fail where they are no object; what
    the model wrote is in the trace."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    return arguments if isinstance(found, dict) else "{}"


def _results(entry: Results, images: ImagePlace) -> Iterator[Message]:
    behind: list[Message] = []
    written: list[Message] = []
    for given in entry.given:
        if given.id is None:
            written.append({"type": "text", "text": f"{RESPONSE_START}\n{given.text}"})
            written += _parts(given.pictures)
            written.append({"type": "text", "text": RESPONSE_END})
            continue
        content: Any = given.text
        if given.pictures and images == "tool":
            content = _content(given.pictures, given.text)
        elif given.pictures:
            names = ", ".join(p.view for p in given.pictures)
            content = given.text or f"Shown in the next message: {names}"
            behind += _parts(given.pictures)
        # An empty result is none for some servers.
        yield {"role": "tool", "tool_call_id": given.id, "content": content or "Done."}
    if behind or written:
        yield {"role": "user", "content": [*behind, *written]}


def _content(pictures: Sequence[Picture], text: str) -> Any:
    if not pictures:
        return text
    return [*_parts(pictures), *([{"type": "text", "text": text}] if text else [])]


def _parts(pictures: Sequence[Picture]) -> Iterator[Message]:
    for picture in pictures:
        if picture.label:
            yield {"type": "text", "text": f"{picture.label}:"}
        yield {"type": "image_url", "image_url": {"url": picture.url}}


def readable(entry: Entry) -> str:
    """An entry as text for a person; pictures as their names and sizes."""
    if isinstance(entry, Said):
        return "".join(map(_named, entry.pictures)) + entry.text
    if isinstance(entry, Answered):
        calls = [f"{call.name}({call.arguments})" for call in entry.calls]
        return "\n".join(filter(None, [entry.text, *calls]))
    return "\n".join("".join(map(_named, g.pictures)) + g.text for g in entry.given)


def _named(picture: Picture) -> str:
    return f"[{picture.view}: {picture.size[0]} x {picture.size[1]}]\n"


def data_url(image: Any, image_format: str) -> str:
    """A PIL image (RGB) as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format=image_format.upper())
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{image_format};base64,{text}"
