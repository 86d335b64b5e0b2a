"""Rows in the layouts of other trainers: LLaMA-Factory's and TRL's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from vpt_agent.data.builder.annotations import save_picture
from vpt_agent.data.pictures import row_views
from vpt_agent.data.rows import META, ImageRef, Message, Row, RowError, column_of, row_json
from vpt_agent.errors import UserError
from vpt_agent.tokens.table import IMAGE_TAG

Target = Literal["llamafactory", "llamafactory-vpt", "trl", "trl-prompt"]
TARGETS: tuple[Target, ...] = ("llamafactory", "llamafactory-vpt", "trl", "trl-prompt")
Reencoded = Literal["refuse", "picture"]


def convert_rows(
    rows: Iterable[Row],
    target: Target,
    *,
    pictures: str | Path | None = None,
    reencoded: Reencoded = "refuse",
) -> Iterator[dict[str, Any]]:
    """The JSON objects of ``rows`` for another trainer.

    ``llamafactory``: its sharegpt layout, messages and ``images``. ``llamafactory-vpt``: what the
    released fork of it reads, crop suffixes and encoders' lists included. ``trl``: messages whose
    contents are lists of parts, and ``images``. ``trl-prompt``: ``prompt`` and ``completion``, one
    object for each assistant turn, so that calls are learnt too.

    Only the fork knows crops and encoders: for the others crops are cut into files in ``pictures``,
    and a re-encoded picture is refused (:class:`RowError`), or shown once more as a ``picture``.
    Paths become absolute (the fork does not find relative ones with a crop); ``meta`` is left out.
    Call tokens stay in the text: add them to the tokenizer before training.
    """
    if target not in TARGETS:
        raise UserError("unknown layout", got=target, expected=", ".join(TARGETS))
    if reencoded not in ("refuse", "picture"):
        raise UserError("unknown reencoded", got=reencoded, expected="refuse or picture")
    for row in map(_absolute, rows):
        if target == "llamafactory-vpt":
            whole = row_json(row)
            whole.pop(META, None)
            yield whole
            continue
        plain = _plain(row, None if pictures is None else Path(pictures), reencoded)
        if target == "llamafactory":
            whole = row_json(plain)
            whole.pop(META, None)
            yield whole
        elif target == "trl":
            yield _parts(plain.messages, plain)
        else:
            for index in range(1, len(plain.messages), 2):
                given, said = plain.messages[:index], plain.messages[index : index + 1]
                yield {
                    "prompt": _parts(given, plain)["messages"],
                    "completion": _parts(said, plain)["messages"],
                    "images": _parts(given, plain)["images"],
                }


def dataset_info(name: str, file: str, target: Target) -> dict[str, Any]:
    """The entry that LLaMA-Factory's ``dataset_info.json`` needs for the file.

    Every list is named, ``clip_images`` too, which the released description forgets.
    """
    lists = ["images"]
    if target == "llamafactory-vpt":
        lists += ["detection_images", "clip_images", "seg_images"]
    tags = {"role_tag": "role", "content_tag": "content",
            "user_tag": "user", "assistant_tag": "assistant"}  # fmt: skip
    columns = {"messages": "messages"} | {column: column for column in lists}
    return {name: {"file_name": file, "formatting": "sharegpt", "columns": columns, "tags": tags}}


def _absolute(row: Row) -> Row:
    def placed(ref: ImageRef) -> ImageRef:
        return ImageRef(os.path.abspath(ref.path), ref.crop)

    pictures = {tag: tuple(map(placed, refs)) for tag, refs in row.pictures.items()}
    return replace(row, pictures=pictures)


def _plain(row: Row, folder: Path | None, reencoded: Reencoded) -> Row:
    """The row with one list of whole pictures, in the order of their tags."""
    others = sorted(tag for tag, refs in row.pictures.items() if refs and tag != IMAGE_TAG)
    if others and reencoded == "refuse":
        raise RowError(
            "kinds",
            "this layout knows no encoders",
            where=row.where,
            got=", ".join(map(column_of, others)),
            fix="show the pictures once more: reencoded='picture'; or use llamafactory-vpt",
        )
    rest = {tag: iter(refs) for tag, refs in row.pictures.items()}
    tags = re.compile("|".join(map(re.escape, row.pictures)))
    refs: list[ImageRef] = []
    messages: list[Message] = []
    for message in row.messages:
        if message.role == "user":
            refs += [next(rest[tag]) for tag in tags.findall(message.content)]
            message = replace(message, content=tags.sub(IMAGE_TAG, message.content))
        messages.append(message)
    if any(ref.crop is not None for ref in refs):
        refs = _cut(row, refs, folder)
    return replace(row, messages=tuple(messages), pictures={IMAGE_TAG: tuple(refs)})


def _cut(row: Row, refs: list[ImageRef], folder: Path | None) -> list[ImageRef]:
    if folder is None:
        raise UserError(
            "this layout knows no crops: they must be cut into files",
            where=row.where,
            fix="name a folder for them: pictures=",
        )
    views = row_views(replace(row, pictures={IMAGE_TAG: tuple(refs)}))[IMAGE_TAG]
    return [
        ref
        if ref.crop is None
        else ImageRef(os.path.abspath(save_picture(view.image, folder, row.where)))
        for ref, view in zip(refs, views, strict=True)
    ]


def _parts(messages: Iterable[Message], row: Row) -> dict[str, Any]:
    """Messages as lists of parts, and the pictures that they show."""
    said: list[Mapping[str, Any]] = []
    shown = 0
    for message in messages:
        parts: list[dict[str, str]] = []
        for index, text in enumerate(message.content.split(IMAGE_TAG)):
            if index:
                parts.append({"type": "image"})
                shown += 1
            if text:
                parts.append({"type": "text", "text": text})
        said.append({"role": message.role, "content": parts})
    images = [ref.path for ref in row.pictures[IMAGE_TAG][:shown]]
    return {"messages": said, "images": images}
