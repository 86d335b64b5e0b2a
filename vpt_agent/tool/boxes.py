"""Types of arguments that are boxes: each says its frame, and the model reads it in the schema.

A box is four numbers: left, top, right, bottom. A tool that takes several at once uses
``GridBoxes``, ``PixelBoxes`` or ``Norm1000Boxes``: the model may write one box or a list of them,
the tool gets a list. ``PixelPoint`` and ``PixelPoints`` are for points.
:mod:`vpt_agent.vision.frames` converts between the frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

MOST_BOXES = 16
"""How many boxes one call may name."""

_GRID = "[x_min, y_min, x_max, y_max], cells of the region grid, all inclusive"
_PIXEL = "[left, top, right, bottom] in pixels of the source view"
_NORM = "[left, top, right, bottom], 0 to 1000 of the source view's width and height"
_POINT = "[x, y] in pixels of the source view"

FrameName = Literal["grid", "view", "norm1000"]

FRAME_WORDS: Mapping[FrameName, str] = {"grid": _GRID, "view": _PIXEL, "norm1000": _NORM}
"""How the frames are told in a schema."""

POINT_WORDS = _POINT
"""How the frame of a point is told."""


@dataclass(frozen=True)
class BoxFrame:
    """Marks a type of box with its frame; the schema is not changed by it.

    ``source`` names the argument that says which view the box lies on (if that is left out, it is
    the source view); ``point`` says that it is ``[x, y]`` and no box.
    """

    frame: FrameName
    source: str = "source"
    point: bool = False


GridBox = Annotated[
    list[int], Field(min_length=4, max_length=4, description=_GRID), BoxFrame("grid")
]
"""``[x_min, y_min, x_max, y_max]``: cells of a k x k grid on the source view, inclusive."""

PixelBox = Annotated[
    list[float], Field(min_length=4, max_length=4, description=_PIXEL), BoxFrame("view")
]
"""``[left, top, right, bottom]`` in pixels of the source view, right and bottom exclusive."""

Norm1000Box = Annotated[
    list[float], Field(min_length=4, max_length=4, description=_NORM), BoxFrame("norm1000")
]
"""``[left, top, right, bottom]``, each 0 to 1000 of the source view's width or height."""


PixelPoint = Annotated[
    list[float],
    Field(min_length=2, max_length=2, description=_POINT),
    BoxFrame("view", point=True),
]
"""``[x, y]`` in pixels of the source view: 0, 0 is the corner of its first pixel."""


def _as_list(value: object) -> object:
    """One box as a list of one box. Anything else is left for pydantic to judge."""
    if isinstance(value, list | tuple) and value and not isinstance(value[0], list | tuple):
        return [value]
    return value


def _schema(item: str, description: str) -> WithJsonSchema:
    box = {"type": "array", "items": {"type": item}, "minItems": 4, "maxItems": 4}
    several = {"type": "array", "items": box, "minItems": 1, "maxItems": MOST_BOXES}
    return WithJsonSchema({"anyOf": [box, several], "description": f"{description}; or a list"})


_SEVERAL = Field(min_length=1, max_length=MOST_BOXES)
_ONE_OR_MORE = BeforeValidator(_as_list)
GridBoxes = Annotated[list[GridBox], _SEVERAL, _ONE_OR_MORE, _schema("integer", _GRID)]
PixelBoxes = Annotated[list[PixelBox], _SEVERAL, _ONE_OR_MORE, _schema("number", _PIXEL)]
Norm1000Boxes = Annotated[list[Norm1000Box], _SEVERAL, _ONE_OR_MORE, _schema("number", _NORM)]
_POINTS = {
    "type": "array",
    "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    "minItems": 1,
    "maxItems": MOST_BOXES,
    "description": f"a list of points, each {_POINT}",
}
PixelPoints = Annotated[list[PixelPoint], _SEVERAL, _ONE_OR_MORE, WithJsonSchema(_POINTS)]
