"""Boxes in the frame in which a model writes them, and in the frame that a tool wants.

A tool says the frame of its boxes by their types (:mod:`vpt_agent.tool.boxes`); a model has the
habit that it was trained with. The model sees every box of a tool in its own frame, and what it
writes is converted before the tool's schema is checked, by the one module that converts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

from pydantic import JsonValue

from vpt_agent.errors import UserError
from vpt_agent.tool.boxes import FRAME_WORDS, POINT_WORDS, BoxFrame, FrameName
from vpt_agent.tool.spec import PerceptionTool
from vpt_agent.types import View

Coordinates = Literal["norm1000", "shown", "view"]
"""The frame in which a model writes boxes: 0 to 1000 of a picture's width and height
(``norm1000``), pixels of the picture as it was resized for the model (``shown``), or pixels of the
view itself (``view``)."""

HABIT_WORDS: Mapping[Coordinates, str] = {
    "norm1000": "[left, top, right, bottom], each 0 to 1000 of the picture's width or height",
    "shown": "[left, top, right, bottom] in pixels of the picture as you see it",
    "view": FRAME_WORDS["view"],
}

POINT_HABIT_WORDS: Mapping[Coordinates, str] = {
    "norm1000": "[x, y], each 0 to 1000 of the picture's width or height",
    "shown": "[x, y] in pixels of the picture as you see it",
    "view": POINT_WORDS,
}

LARGEST = 99_999
"""No picture has as many pixels a side; without a bound a number could have digits without end."""

_IN_SHORT: Mapping[Coordinates, str] = {
    "norm1000": "0 to 1000",
    "shown": "pixels of the resized picture",
    "view": "pixels",
}


@dataclass(frozen=True)
class Habit:
    """How one model writes boxes. ``whole``: as whole numbers."""

    coordinates: Coordinates = "view"
    whole: bool = True


def check_coordinates(value: str) -> Coordinates:
    """``value`` as a frame. Raises :class:`UserError` for anything else."""
    for known in get_args(Coordinates):
        if value == known:
            frame: Coordinates = known
            return frame
    raise UserError(
        "unknown frame for the model's boxes",
        got=repr(value),
        expected=", ".join(get_args(Coordinates)),
    )


Look = Callable[[str], tuple[View | None, tuple[int, int] | None]]
"""The view of an id, and its size (width, height) as the model saw it."""


def box_arguments(tool: PerceptionTool) -> Mapping[str, FrameName]:
    """The arguments of a tool that are boxes or points in ``view`` or ``norm1000``, by name.
    (Cells of the region grid mean the same for every model; a raw JSON Schema does not say what is
    a box.)"""
    return {name: mark.frame for name, mark in _marks(tool).items()}


@lru_cache(maxsize=256)
def _marks(tool: PerceptionTool) -> Mapping[str, BoxFrame]:
    model = getattr(tool.spec, "model", None)
    found: dict[str, BoxFrame] = {}
    for name, info in getattr(model, "model_fields", {}).items():
        mark = _last(info.metadata) or _mark_in(info.annotation)
        if mark is not None and mark.frame != "grid":
            found[info.alias or name] = mark
    return found


def _last(metadata: Sequence[Any]) -> BoxFrame | None:
    """The outermost mark: who writes ``Annotated[PixelBox, BoxFrame(...)]`` means theirs."""
    return next((m for m in reversed(metadata) if isinstance(m, BoxFrame)), None)


def _mark_in(annotation: Any) -> BoxFrame | None:
    """The mark that a type has anywhere inside it."""
    mark = _last(getattr(annotation, "__metadata__", ()))
    if mark is not None:
        return mark
    inner = [getattr(annotation, "__origin__", None)] if get_origin(annotation) is None else []
    for part in (*get_args(annotation), *inner):
        mark = None if part is None or isinstance(part, str) else _mark_in(part)
        if mark is not None:
            return mark
    return None


def schema_for(tool: PerceptionTool, habit: Habit) -> dict[str, Any]:
    """The JSON Schema of a tool's arguments with its boxes in the model's frame."""
    schema: dict[str, Any] = tool.json_schema()
    properties = schema.get("properties", {})
    for name, mark in _marks(tool).items():
        if name in properties:
            properties[name] = _said(properties[name], mark, habit)
    return schema


def _said(schema: Any, mark: BoxFrame, habit: Habit) -> Any:
    new = copy.deepcopy(schema)
    words = (POINT_HABIT_WORDS if mark.point else HABIT_WORDS)[habit.coordinates]
    if not _reworded(new, POINT_WORDS if mark.point else FRAME_WORDS[mark.frame], words):
        told = new.get("description")
        new["description"] = f"{told}; {words}" if told else words
    _bounded(new, habit)
    return new


def _reworded(schema: Any, old: str, new: str) -> bool:
    """Say ``new`` where a description says ``old``; whether any did."""
    if not isinstance(schema, dict | list):
        return False
    items = schema if isinstance(schema, list) else schema.values()
    done = [_reworded(item, old, new) for item in items]  # all of them, not up to the first
    if isinstance(schema, list):
        return any(done)
    text = schema.get("description")
    if isinstance(text, str) and old in text:
        schema["description"] = text.replace(old, new)
        return True
    return any(done)


def _bounded(schema: Any, habit: Habit) -> None:
    """The numbers of a box as the model writes them."""
    if isinstance(schema, list):
        for item in schema:
            _bounded(item, habit)
    elif isinstance(schema, dict):
        if schema.get("type") in ("number", "integer"):
            schema["type"] = "integer" if habit.whole else "number"
            schema["minimum"] = 0
            schema["maximum"] = 1000 if habit.coordinates == "norm1000" else LARGEST
            return
        for item in schema.values():
            _bounded(item, habit)


def converted(
    tool: PerceptionTool,
    arguments: Mapping[str, JsonValue],
    habit: Habit,
    view: View | None,
    shown: tuple[int, int] | None,
    *,
    look: Look | None = None,
) -> tuple[dict[str, JsonValue], tuple[str, ...]]:
    """``arguments`` with the boxes in the tool's frame, and a line for each that was converted.

    ``view`` is what the call names as its source, ``shown`` its size (width, height) as the model
    saw it; ``look`` gives both for the view that another argument names. What is no box is left
    alone, for the strict check that follows.
    """
    new, notes = dict(arguments), []
    for name, mark in _marks(tool).items():
        on, size, named = view, shown, arguments.get(mark.source)
        if mark.source != "source" and named is not None and look is not None:
            on, size = look(str(named))
        if name not in new or on is None or mark.frame == habit.coordinates:
            continue
        turned = _turned(new[name], mark, habit, on, size or on.size)
        if turned != new[name]:
            new[name] = turned
            said = _IN_SHORT[habit.coordinates]
            notes.append(f"{name}: {_short(arguments[name])} was read as {said} of {on.id}")
    return new, tuple(notes)


def _turned(
    value: JsonValue, mark: BoxFrame, habit: Habit, view: View, shown: tuple[int, int]
) -> JsonValue:
    if not isinstance(value, list):
        return value
    if len(value) != (2 if mark.point else 4) or not all(_number(item) for item in value):
        return [_turned(item, mark, habit, view, shown) for item in value]
    from vpt_agent.vision.frames import from_norm1000, to_norm1000

    # A point is converted as a box without size.
    numbers = [float(str(item)) for item in value] * (2 if mark.point else 1)
    if habit.coordinates == "norm1000":
        pixels: Sequence[float] = from_norm1000(numbers, view.size)
    elif habit.coordinates == "shown":
        # Through fractions of the picture: what was shown is the view, resized.
        pixels = from_norm1000(to_norm1000(numbers, shown), view.size)
    else:
        pixels = numbers
    wanted = to_norm1000(pixels, view.size) if mark.frame == "norm1000" else pixels
    return [round(item, 4) for item in wanted[: len(value)]]


def _number(value: JsonValue) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(float(str(value)))


def _short(value: JsonValue) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
