"""One row of the published JSON: messages and lists of picture paths, checked on reading.

A row is ``{"messages": [{"role", "content"}, ...], "images": [...], "clip_images": [...], ...}``.
A tag in a user message (``<image>``, ``<clip_image>``, ...) stands for the next picture of the list
that bears its name. ``meta`` may hold what else is known of the row (:data:`META`). Plain values
only: nothing is opened here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vpt_agent.errors import UserError
from vpt_agent.tokens.table import IMAGE_TAG, PUBLISHED

Rules = Literal["strict", "published"]
"""``strict`` refuses what cannot be meant; ``published`` takes what the release takes."""

Role = Literal["user", "assistant"]
Crop = tuple[int, int, int, int]

Problem = Literal[
    "not_json",
    "not_a_row",
    "unknown_keys",
    "counts",
    "paths",
    "missing_pictures",
    "unreadable_pictures",
    "crops_outside",
    "calls",
    "results",
    "kinds",
]
"""What can be wrong with a row: it is no JSON; it lacks messages in turn; it has keys that nothing
reads; tags and pictures differ in number; a path or its crop is malformed; a picture is missing,
or broken; a crop leaves its picture; a call is malformed; calls and their results differ in
number; a kind is needed that the model does not have."""

META = "meta"
"""The one key beside the published ones. All of its own keys are optional; those that the library
writes and reads: ``id``, ``type`` (of the question), ``kind`` (of the row: the first kind called,
or ``direct``), ``tools`` (names of the kinds that are needed), ``regions`` (cells [[x_min, y_min,
x_max, y_max], ...] of a grid of ``grid`` x ``grid``), ``answer`` (the plain answer), ``trigger``
(whether the question carries the trigger phrase), ``forced_calls`` (numbers, from 1, of the row's
calls that came from outside: they carry no loss)."""

VIDEO_TAG = "<video>"
PUBLISHED_TAGS = tuple(dict.fromkeys((IMAGE_TAG, *(kind.tag for kind in PUBLISHED.values()))))

# A tail that holds numbers and commas only, and at least one comma, is meant as a crop.
_CROP_TAIL = re.compile(r"[-+.\d\s]*,[-+.,\d\s]*")


class RowError(UserError):
    """A row that cannot be used; ``problem`` says of what kind its fault is."""

    def __init__(
        self,
        problem: Problem,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem = problem
        super().__init__(what, where=where, got=got, expected=expected, fix=fix)


def column_of(tag: str) -> str:
    """The row's list for a tag: ``<clip_image>`` is filled from ``clip_images``."""
    return tag.strip("<>") + "s"


@dataclass(frozen=True)
class Message:
    """One turn as text."""

    role: Role
    content: str


@dataclass(frozen=True)
class ImageRef:
    """A picture's path, and the part of it to look at (left, upper, right, lower) in its pixels."""

    path: str
    crop: Crop | None = None


@dataclass(frozen=True)
class Row:
    """A checked row: user and assistant in turn; ``pictures`` are the lists by tag.

    ``where`` names the row in errors; ``meta`` is what else is known of it (:data:`META`).
    """

    messages: tuple[Message, ...]
    pictures: Mapping[str, tuple[ImageRef, ...]]
    where: str = "row"
    meta: Mapping[str, Any] = field(default_factory=dict)

    def tags(self, tag: str) -> int:
        """How often ``tag`` stands in the user messages."""
        return sum(m.content.count(tag) for m in self.messages if m.role == "user")


def parse_image_path(path: str, *, where: object = None) -> ImageRef:
    """Split a path from its crop suffix ``_left,upper,right,lower`` (FACTS section 3).

    The tail after the last ``_`` is a crop if it is written in numbers with commas and no ``.`` of
    a file's ending follows. The release takes any tail without a ``.`` for one and fails on
    ``/data/my_file``; here that is a path. What is meant as a crop and is none (not four whole
    numbers, no area, beyond the left or upper edge) is a :class:`RowError`.
    """
    head, mark, tail = path.rpartition("_")
    if not mark or not _CROP_TAIL.fullmatch(tail):
        return ImageRef(path)
    numbers = [n.strip() for n in tail.split(",")]
    if len(numbers) != 4 or not all(re.fullmatch(r"[-+]?\d+", n) for n in numbers):
        raise RowError(
            "paths",
            "the crop at the end of a picture's path is not four whole numbers",
            where=where,
            got=path,
            expected="PATH_left,upper,right,lower in pixels of the picture",
        )
    left, upper, right, lower = (int(n) for n in numbers)
    if left < 0 or upper < 0 or right <= left or lower <= upper:
        raise RowError(
            "paths",
            "the crop at the end of a picture's path has no area inside the picture",
            where=where,
            got=path,
            expected="0 <= left < right and 0 <= upper < lower",
        )
    return ImageRef(head, (left, upper, right, lower))


def read_row(
    data: object,
    *,
    where: str = "row",
    tags: Sequence[str] = PUBLISHED_TAGS,
    ignore: Collection[str] = (),
    rules: Rules = "strict",
) -> Row:
    """Check one JSON value and make it a :class:`Row`; what is wrong is a :class:`RowError`.

    ``tags`` says which lists there can be (see :func:`column_of`); ``ignore`` names other keys that
    may stand in the row. An unknown key is an error, because a list under a wrong name would be
    lost (as the release loses ``clip_images``). Tags and pictures must agree in number; under
    ``published`` rules lists for re-encoding may be too long, and unknown keys are ignored.
    """
    if not isinstance(data, Mapping):
        raise RowError("not_a_row", "a row is a JSON object", where=where, got=type(data).__name__)
    columns = {column_of(tag): tag for tag in tags}
    known = {"messages", META, *columns, *ignore}
    unknown = sorted(str(k) for k in data if k not in known)
    if unknown and rules == "strict":
        raise RowError(
            "unknown_keys",
            "a row has keys that nothing reads",
            where=where,
            got=", ".join(unknown),
            expected=", ".join(("messages", *columns)),
            fix="rename them, or name them in ignore=",
        )
    row = Row(
        _messages(data.get("messages"), where),
        {tag: _refs(data.get(name), f"{where}, {name}") for name, tag in columns.items()},
        where,
        _meta(data.get(META), where),
    )
    for message in row.messages:
        _check_tags(message, (*tags, VIDEO_TAG), where)
    for tag in tags:
        _check_count(tag, row, rules)
    return row


def row_json(row: Row) -> dict[str, Any]:
    """The row as published JSON; :func:`read_row` of it gives the row back.

    Lists that are empty are left out, but for ``images``; so is an empty ``meta``.
    """
    lists = {
        column_of(tag): [image_path(ref) for ref in refs]
        for tag, refs in row.pictures.items()
        if refs or tag == IMAGE_TAG
    }
    messages = [{"role": m.role, "content": m.content} for m in row.messages]
    meta = {META: dict(row.meta)} if row.meta else {}
    return {"messages": messages, **lists, **meta}


def image_path(ref: ImageRef) -> str:
    """The path with its crop suffix, as :func:`parse_image_path` reads it."""
    return ref.path if ref.crop is None else f"{ref.path}_{','.join(map(str, ref.crop))}"


def _meta(value: object, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise RowError(
            "not_a_row",
            "what else is known of a row is a JSON object",
            where=f"{where}, {META}",
            got=repr(value)[:100],
        )
    # Readers of tables (datasets) fill what a row lacks with None.
    return {key: item for key, item in value.items() if item is not None}


def _messages(value: object, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value or len(value) % 2:
        raise RowError(
            "not_a_row",
            "a row needs messages in pairs of user and assistant",
            where=where,
            got=f"{len(value)} messages" if isinstance(value, list) else type(value).__name__,
            expected="a list: user, assistant, user, assistant, ...",
        )
    messages = []
    for index, item in enumerate(value):
        role: Role = "assistant" if index % 2 else "user"
        if not isinstance(item, Mapping) or not isinstance(item.get("content"), str):
            raise RowError(
                "not_a_row",
                "a message has a role and a text",
                where=f"{where}, message {index}",
                got=repr(item)[:100],
                expected='{"role": ..., "content": "..."}',
            )
        if item.get("role") != role:
            raise RowError(
                "not_a_row",
                "the messages' roles do not alternate",
                where=f"{where}, message {index}",
                got=repr(item.get("role")),
                expected=role,
            )
        messages.append(Message(role, item["content"]))
    return tuple(messages)


def _refs(value: object, where: str) -> tuple[ImageRef, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(path, str) and path for path in value):
        raise RowError(
            "paths",
            "a list of pictures holds paths",
            where=where,
            got=repr(value)[:100],
            expected='["a.jpg", "a.jpg_left,upper,right,lower"]',
        )
    return tuple(parse_image_path(p, where=f"{where}[{i}]") for i, p in enumerate(value))


def _check_tags(message: Message, tags: Sequence[str], where: str) -> None:
    if VIDEO_TAG in message.content:
        raise RowError(
            "not_a_row",
            "videos cannot be used",
            where=where,
            got=VIDEO_TAG,
            fix="use pictures of its frames",
        )
    said = [tag for tag in tags if tag in message.content]
    if message.role == "assistant" and said:
        raise RowError(
            "not_a_row",
            "a picture stands in an assistant's message",
            where=where,
            got=", ".join(said),
            expected="pictures in user messages",
        )


def _check_count(tag: str, row: Row, rules: Rules) -> None:
    places, pictures = row.tags(tag), len(row.pictures[tag])
    spare_is_fine = rules == "published" and tag != IMAGE_TAG
    if pictures < places or (pictures > places and not spare_is_fine):
        raise RowError(
            "counts",
            f"too {'few' if pictures < places else 'many'} pictures for the tags in the messages",
            where=f"{row.where}, {column_of(tag)}",
            got=f"{pictures} pictures",
            expected=f"{places}, one for each {tag}",
        )
