"""The pictures of a row as views: each file is opened once, crops know where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vpt_agent.data.rows import ImageRef, Row
from vpt_agent.errors import UserError
from vpt_agent.types import Box, View
from vpt_agent.vision.frames import crop_view
from vpt_agent.vision.images import load_views


def row_views(row: Row, *, folder: Path | str | None = None) -> Mapping[str, tuple[View, ...]]:
    """The views of ``row`` by tag, in the order of its lists.

    ``folder`` is where relative paths begin. A path that stands in several lists is one view
    (``image_1``, ...); crops (``crop_1``, ...) are cut from the original, whose own view they
    have as parent. A missing or broken file is an :class:`ImageError`, a crop that leaves its
    picture a :class:`UserError`.
    """
    originals: dict[str, View] = {}
    crops: dict[ImageRef, View] = {}

    def view_of(ref: ImageRef) -> View:
        if ref.path not in originals:
            path = Path(ref.path) if folder is None else Path(folder) / ref.path
            (originals[ref.path],) = load_views(path, first=len(originals) + 1)
        original = originals[ref.path]
        if ref.crop is None:
            return original
        if ref not in crops:
            crops[ref] = _cut(original, ref, f"crop_{len(crops) + 1}", row.where)
        return crops[ref]

    return {tag: tuple(view_of(ref) for ref in refs) for tag, refs in row.pictures.items()}


def _cut(original: View, ref: ImageRef, id: str, where: str) -> View:
    assert ref.crop is not None
    width, height = original.size
    if ref.crop[2] > width or ref.crop[3] > height:
        raise UserError(
            "a crop leaves its picture",
            where=f"{where}, {ref.path}",
            got=ref.crop,
            expected=f"inside {width} x {height} pixels",
        )
    return crop_view(original, Box(*ref.crop), id=id)
