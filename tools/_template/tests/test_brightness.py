"""The tool by the way that an agent takes, without a model."""

from __future__ import annotations

from PIL import Image
from vpt_brightness import brightness

from vpt_agent.tool import ToolContext, ToolRegistry, execute
from vpt_agent.types import Box, ToolCall, ToolResult, View

GREY = View("image_1", Image.new("RGB", (40, 20), (100, 100, 100)), "image_1", Box(0, 0, 40, 20),
            (40, 20))  # fmt: skip


def call(**arguments: object) -> ToolResult:
    made = ToolCall("c1", "brightness", arguments, "json")
    return execute(brightness, made, lambda: ToolContext(views={"image_1": GREY}))


def test_it_says_how_bright_a_picture_is() -> None:
    result = call()
    assert result.text == "brightness 100 of 255"
    assert result.views == ()


def test_a_part_is_shown_and_knows_its_place() -> None:
    (part,) = call(box=[4, 4, 24, 14]).views
    assert part.box == (4, 4, 24, 14)


def test_a_box_that_is_none_is_told() -> None:
    for box, kind in (([0, 0, 2, 2], "box_too_small"), ([90, 0, 99, 9], "box_outside")):
        error = call(box=box).error
        assert error is not None
        assert error.kind == kind


def test_it_is_found_once_installed() -> None:
    assert "brightness" in ToolRegistry.from_entry_points()
