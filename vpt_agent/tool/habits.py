"""Boxes in the frame in which a model writes them, and in the frame that a tool wants.

A tool says the frame of its boxes by their types (:mod:`vpt_agent.tool.boxes`); a model has the
habit that it was trained with. The model sees every box of a tool in its own frame, and what it
writes is converted before the tool's schema is checked, by the one module that converts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

from pydantic import JsonValue

from vpt_agent.errors import UserError
from vpt_agent.tool.boxes import FRAME_WORDS, BoxFrame, FrameName
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


@lru_cache(maxsize=256)
def box_arguments(tool: PerceptionTool) -> Mapping[str, FrameName]:
    """The arguments of a tool that are boxes in ``view`` or ``norm1000``, by name. (Cells of the
    region grid mean the same for every model; a raw JSON Schema does not say what is a box.)"""
    model = getattr(tool.spec, "model", None)
    found: dict[str, FrameName] = {}
    for name, info in getattr(model, "model_fields", {}).items():
        frame = next((m.frame for m in info.metadata if isinstance(m, BoxFrame)), None)
        frame = frame or _frame_in(info.annotation)
        if frame is not None and frame != "grid":
            found[info.alias or name] = frame
    return found


def _frame_in(annotation: Any) -> FrameName | None:
    """The frame that a type says anywhere inside it."""
    for item in getattr(annotation, "__metadata__", ()):
        if isinstance(item, BoxFrame):
            return item.frame
    inner = [getattr(annotation, "__origin__", None)] if get_origin(annotation) is None else []
    for part in (*get_args(annotation), *inner):
        frame = None if part is None or isinstance(part, str) else _frame_in(part)
        if frame is not None:
            return frame
    return None


def schema_for(tool: PerceptionTool, habit: Habit) -> dict[str, Any]:
    """The JSON Schema of a tool's arguments with its boxes in the model's frame."""
    schema: dict[str, Any] = tool.json_schema()
    properties = schema.get("properties", {})
    for name, frame in box_arguments(tool).items():
        if name in properties:
            properties[name] = _said(properties[name], frame, habit)
    return schema


def _said(schema: Any, frame: FrameName, habit: Habit) -> Any:
    new = copy.deepcopy(schema)
    words = HABIT_WORDS[habit.coordinates]
    if not _reworded(new, FRAME_WORDS[frame], words):
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
) -> tuple[dict[str, JsonValue], tuple[str, ...]]:
    """``arguments`` with the boxes in the tool's frame, and a line for each that was converted.

    ``view`` is what the call names as its source, ``shown`` its size (width, height) as the model
    saw it. What is no box is left alone, for the strict check that follows.
    """
    new, notes = dict(arguments), []
    for name, frame in box_arguments(tool).items():
        if name not in new or view is None or frame == habit.coordinates:
            continue
        turned = _turned(new[name], frame, habit, view, shown or view.size)
        if turned != new[name]:
            new[name] = turned
            said = _IN_SHORT[habit.coordinates]
            notes.append(f"{name}: {_short(arguments[name])} was read as {said} of {view.id}")
    return new, tuple(notes)


def _turned(
    value: JsonValue, frame: FrameName, habit: Habit, view: View, shown: tuple[int, int]
) -> JsonValue:
    if not isinstance(value, list):
        return value
    if len(value) != 4 or not all(_number(item) for item in value):
        return [_turned(item, frame, habit, view, shown) for item in value]
    from vpt_agent.vision.frames import from_norm1000, to_norm1000

    numbers: Sequence[float] = [float(str(item)) for item in value]
    if habit.coordinates == "norm1000":
        pixels: Sequence[float] = from_norm1000(numbers, view.size)
    elif habit.coordinates == "shown":
        # Through fractions of the picture: what was shown is the view, resized.
        pixels = from_norm1000(to_norm1000(numbers, shown), view.size)
    else:
        pixels = numbers
    wanted = to_norm1000(pixels, view.size) if frame == "norm1000" else pixels
    return [round(item, 4) for item in wanted]


def _number(value: JsonValue) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(float(str(value)))


def _short(value: JsonValue) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
