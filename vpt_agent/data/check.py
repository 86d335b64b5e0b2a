"""What can be wrong with a row that reads well: its pictures, its calls, and their results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from PIL import Image

from vpt_agent.data.rows import ImageRef, Row, RowError
from vpt_agent.errors import ImageError
from vpt_agent.tokens.grammar import ParsedCall, ParseError, read_text
from vpt_agent.tokens.table import IMAGE_TAG, PUBLISHED, PerceptionTable
from vpt_agent.vision.images import load_image

Depth = Literal["none", "headers", "pixels"]
"""How far pictures are looked at: not at all; whether they are there, and their size; or decoded
to the last pixel."""

ALL_KINDS = PerceptionTable(tuple(PUBLISHED.values()))

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_LABEL = re.compile(r"Region \d+:")


def problems(
    row: Row, *, pictures: Depth = "headers", table: PerceptionTable | None = None
) -> Iterator[RowError]:
    """Every fault of ``row``: of its pictures (see :data:`Depth`), its calls and their results.

    ``table`` is the model's; then kinds that it lacks are a fault too. Without it the published
    kinds count. Paths are opened as they are: relative ones from the current folder.
    """
    yield from picture_problems(row, pictures)
    yield from call_problems(row, table or ALL_KINDS)
    if table is not None:
        known = {kind.tag for kind in table.kinds} | {IMAGE_TAG}
        lacking = sorted(tag for tag, refs in row.pictures.items() if refs and tag not in known)
        if lacking:
            yield RowError(
                "kinds",
                "a row needs a perception kind that the model does not have",
                where=row.where,
                got=", ".join(lacking),
                expected=", ".join(kind.name for kind in table.kinds) or "no kind",
                fix="re-target the row to the model's own kinds",
            )


# --- pictures ---------------------------------------------------------------------------------


def picture_size(path: str) -> tuple[int, int]:
    """(width, height) of the upright picture, from the head of its file; or an ``ImageError``."""
    stat = Path(path)
    try:
        known = stat.stat()
    except OSError as error:
        raise ImageError("there is no such file", where=path, fix="check the path") from error
    return _size(path, known.st_mtime_ns, known.st_size)


@lru_cache(maxsize=65536)
def _size(path: str, _changed: int, _length: int) -> tuple[int, int]:
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            # Pillow decodes a whole PNG to look for EXIF data behind its pixels: there is none.
            tagged = opened.format != "PNG" or "exif" in opened.info
            turned = tagged and opened.getexif().get(_ORIENTATION) in _TURNED
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(
            "this is not a picture that can be read", where=path, got=type(error).__name__
        ) from error
    return (height, width) if turned else (width, height)


def picture_problems(row: Row, pictures: Depth) -> Iterator[RowError]:
    """Missing and broken pictures of ``row``, and crops that leave theirs."""
    if pictures == "none":
        return
    sizes: dict[str, tuple[int, int] | None] = {}
    for refs in row.pictures.values():
        for ref in refs:
            if ref.path not in sizes:
                try:
                    sizes[ref.path] = _look(ref.path, pictures)
                except ImageError as error:
                    sizes[ref.path] = None
                    there = Path(ref.path).exists()
                    yield RowError(
                        "unreadable_pictures" if there else "missing_pictures",
                        error.what,
                        where=f"{row.where}, {ref.path}",
                        got=error.got,
                        fix=None if there else "remap its prefix, or name the folder it lies in",
                    )
            size = sizes[ref.path]
            if size is not None and leaves(ref, size):
                yield RowError(
                    "crops_outside",
                    "a crop leaves its picture",
                    where=f"{row.where}, {ref.path}",
                    got=ref.crop,
                    expected=f"inside {size[0]} x {size[1]} pixels",
                )


def _look(path: str, pictures: Depth) -> tuple[int, int]:
    return load_image(path).size if pictures == "pixels" else picture_size(path)


def leaves(ref: ImageRef, size: tuple[int, int]) -> bool:
    """Whether the crop of ``ref`` goes beyond a picture of ``size`` (width, height)."""
    return ref.crop is not None and (ref.crop[2] > size[0] or ref.crop[3] > size[1])


# --- calls ------------------------------------------------------------------------------------


def call_problems(row: Row, table: PerceptionTable) -> Iterator[RowError]:
    """Calls that are malformed, and calls and results that do not agree in number."""
    crops = iter(row.pictures.get(IMAGE_TAG, ()))
    asked: Counter[str] = Counter()
    for index, message in enumerate(row.messages):
        if message.role == "user":
            shown = [next(crops, None) for _ in range(message.content.count(IMAGE_TAG))]
            if index:
                cut = sum(ref is not None and ref.crop is not None for ref in shown)
                yield from _unanswered(row, index, asked, cut, table)
            continue
        events = read_text(message.content, table, complete_controls=False)
        asked = Counter(e.kind for e in events if isinstance(e, ParsedCall))
        for event in events:
            if isinstance(event, ParseError):
                yield RowError(
                    "calls",
                    "a call in a row cannot be read",
                    where=f"{row.where}, message {index}",
                    got=event.message,
                )


def _unanswered(
    row: Row, index: int, asked: Counter[str], crops: int, table: PerceptionTable
) -> Iterator[RowError]:
    text = row.messages[index].content
    words = text
    for tag in row.pictures:
        words = words.replace(tag, "")
    only_pictures = not _LABEL.sub("", words).strip()
    # Kinds that show pictures through the base tower share a tag: their calls count together.
    for tag in dict.fromkeys(kind.tag for kind in table.kinds if kind.encoder != "none"):
        calls = sum(asked[k.name] for k in table.kinds if k.tag == tag and k.encoder != "none")
        shown = text.count(tag)
        # Pictures may be given later too, so that only crops need a call; and a call that failed
        # is answered in words.
        needs_call = crops if tag == IMAGE_TAG else shown
        if needs_call > calls or (calls > shown and only_pictures):
            yield RowError(
                "results",
                "the calls of a turn and the results after it differ in number",
                where=f"{row.where}, message {index}",
                got=f"{calls} calls, {shown} {tag}",
            )
