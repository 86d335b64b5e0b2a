"""Boxes in the frame in which a model writes them, and in the tool's."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from PIL import Image
from pydantic import Field

from vpt_agent.errors import UserError
from vpt_agent.tool import (
    BoxFrame,
    GridBox,
    Norm1000Box,
    Norm1000Boxes,
    PerceptionTool,
    PixelBox,
    PixelBoxes,
    PixelPoint,
    PixelPoints,
    perception_tool,
)
from vpt_agent.tool.habits import (
    Coordinates,
    Habit,
    box_arguments,
    check_coordinates,
    converted,
    schema_for,
)
from vpt_agent.types import Box, View
from vpt_tools.crop_region import crop_region

SHOWN = (300, 200)


@pytest.fixture
def view() -> View:
    return View("v", Image.new("RGB", (600, 400)), "v", Box(0, 0, 600, 400), (600, 400))


@perception_tool
def boxes(
    pixels: PixelBox,
    thousand: Norm1000Box | None = None,
    many: PixelBoxes | None = None,
    more: list[Norm1000Boxes] | None = None,
    cells: GridBox | None = None,
    told: Annotated[PixelBox, Field(description="where it is")] = None,
    number: int = 3,
) -> str:
    """Take boxes."""
    return ""


def test_boxes_are_found_by_their_types() -> None:
    assert dict(box_arguments(boxes)) == {
        "pixels": "view",
        "thousand": "norm1000",
        "many": "view",
        "more": "norm1000",
        "told": "view",
    }
    assert dict(box_arguments(crop_region)) == {"box": "view", "box_1000": "norm1000"}

    class Raw(PerceptionTool):
        """Takes a raw schema."""

        name = "raw"
        arguments = {"type": "object", "properties": {"box": {"type": "array"}}}  # noqa: RUF012

        def run(self, arguments: Any, context: Any) -> str:
            return ""

    assert dict(box_arguments(Raw())) == {}


@pytest.mark.parametrize(
    ("habit", "written"),
    [
        ("norm1000", [100, 250, 500, 1000]),
        ("shown", [30, 50, 150, 200]),
        ("view", [60, 100, 300, 400]),
    ],
)
def test_every_habit_means_the_same_place(
    view: View, habit: Coordinates, written: list[int]
) -> None:
    given = {"pixels": written, "thousand": written, "many": [written, written], "number": 7}
    new, notes = converted(boxes, given, Habit(habit), view, SHOWN)
    assert new["pixels"] == [60, 100, 300, 400]
    assert new["thousand"] == [100, 250, 500, 1000]
    assert new["many"] == [[60, 100, 300, 400]] * 2
    assert new["number"] == 7
    changed = {name for name in ("pixels", "thousand", "many") if new[name] != given[name]}
    assert {note.partition(":")[0] for note in notes} == changed
    assert all("was read as" in note and note.endswith("of v") for note in notes)


def test_what_is_no_box_is_left_for_the_check(view: View) -> None:
    given: dict[str, Any] = {
        "pixels": [1, 2, 3],
        "thousand": "here",
        "many": [[1, True, 2, 3]],
        "told": [float("nan"), 0, 1, 1],
        "cells": [0, 0, 7, 7],
    }
    new, notes = converted(boxes, given, Habit("norm1000"), view, SHOWN)
    assert repr(new) == repr(given)
    assert notes == ()
    assert converted(boxes, {"pixels": [1, 2, 3, 4]}, Habit("norm1000"), None, None)[1] == ()


def test_the_schema_tells_boxes_in_the_model_s_frame() -> None:
    for habit, words, most in (
        ("norm1000", "each 0 to 1000 of the picture", 1000),
        ("shown", "in pixels of the picture as you see it", 99_999),
        ("view", "in pixels of the source view", 99_999),
    ):
        properties = schema_for(boxes, Habit(habit))["properties"]
        assert words in properties["pixels"]["description"]
        assert properties["told"]["description"].startswith("where it is; [left, top")
        items = properties["pixels"]["items"]
        assert items == {"type": "integer", "minimum": 0, "maximum": most}
        assert "cells of the region grid" in str(properties["cells"])
        assert properties["number"] == {"type": "integer", "default": 3}
    # The tool's own schema, and so its contract, is untouched.
    assert "0 to 1000 of the source view" in str(boxes.json_schema())


def test_numbers_may_stay_numbers() -> None:
    properties = schema_for(boxes, Habit("view", whole=False))["properties"]
    assert properties["pixels"]["items"]["type"] == "number"


def test_unknown_frames_are_refused() -> None:
    assert check_coordinates("shown") == "shown"
    with pytest.raises(UserError, match=r"unknown frame.*'metres'.*norm1000, shown, view"):
        check_coordinates("metres")


Other = Annotated[PixelBox, BoxFrame("view", source="second")]


@perception_tool
def places(
    at: PixelPoint,
    many: PixelPoints | None = None,
    there: Other | None = None,
    second: str | None = None,
    source: str | None = None,
) -> str:
    """Take points, and a box on another picture."""
    return ""


@pytest.mark.parametrize(
    ("habit", "written"), [("norm1000", [100, 250]), ("shown", [30, 50]), ("view", [60, 100])]
)
def test_points_are_converted_as_boxes_are(
    view: View, habit: Coordinates, written: list[int]
) -> None:
    given: dict[str, Any] = {"at": written, "many": [written, written]}
    new, notes = converted(places, given, Habit(habit), view, SHOWN)
    assert new["at"] == [60, 100]
    assert new["many"] == [[60, 100]] * 2
    assert len(notes) == (0 if habit == "view" else 2)
    strange: dict[str, Any] = {"at": [1, 2, 3, 4], "many": "x"}
    assert converted(places, strange, Habit(habit), view, SHOWN)[0] == strange


def test_points_are_told_in_the_model_s_frame() -> None:
    schema = schema_for(places, Habit("norm1000"))["properties"]
    assert schema["at"]["description"] == "[x, y], each 0 to 1000 of the picture's width or height"
    assert schema["at"]["items"] == {"type": "integer", "minimum": 0, "maximum": 1000}
    many = str(schema["many"])
    assert "a list of points, each [x, y], each 0 to 1000" in many
    assert "pixels" not in many
    assert "as you see it" in str(schema_for(places, Habit("shown"))["properties"]["at"])


def test_a_box_can_lie_on_another_view(view: View) -> None:
    """Its size counts there, not that of the source view."""
    small = View("w", Image.new("RGB", (100, 50)), "w", Box(0, 0, 100, 50), (100, 50))
    seen: dict[str, tuple[View | None, tuple[int, int] | None]] = {"w": (small, (100, 50))}
    box = [0, 0, 500, 1000]
    given: dict[str, Any] = {"there": box, "second": "w", "at": [500, 500]}

    def look(name: str) -> tuple[View | None, tuple[int, int] | None]:
        return seen.get(name, (None, None))

    new, notes = converted(places, given, Habit("norm1000"), view, SHOWN, look=look)
    assert new["there"] == [0, 0, 50, 50]
    assert new["at"] == [300, 200]
    assert notes[1].endswith("0 to 1000 of w")
    plain = converted(places, {"there": box}, Habit("norm1000"), view, SHOWN, look=look)[0]
    assert plain["there"] == [0, 0, 300, 400]
    unknown = converted(places, {**given, "second": "?"}, Habit("norm1000"), view, SHOWN, look=look)
    assert unknown[0]["there"] == box
