"""image_zoom_in_tool: the arguments of Qwen's and DeepEyes' models, small boxes widened."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.tools.world import call, context, scene, told, view
from vpt_agent.tool import ToolContext
from vpt_agent.tool.habits import Habit, schema_for
from vpt_agent.types import Box
from vpt_tools.image_zoom_in_tool import LEAST_AREA, LEAST_SIDE, image_zoom_in_tool, widened


def test_the_names_are_those_the_models_were_trained_with() -> None:
    schema = schema_for(image_zoom_in_tool, Habit("norm1000"))
    assert image_zoom_in_tool.name == "image_zoom_in_tool"
    assert list(schema["properties"])[:3] == ["bbox_2d", "label", "img_idx"]
    assert schema["required"] == ["bbox_2d"]
    assert "0 to 1000" in schema["properties"]["bbox_2d"]["description"]


def test_what_is_shown_is_the_original_s_part_enlarged() -> None:
    result = call(image_zoom_in_tool, bbox_2d=[120, 40, 160, 80], label="the blue one")
    (found,) = result.views
    assert (found.box, found.parent, found.root) == (Box(120, 40, 160, 80), "image_1", "image_1")
    assert found.size[0] * found.size[1] == pytest.approx(min(LEAST_AREA, 1600 * 64), rel=0.02)
    assert found.image.getextrema() == ((0, 0), (0, 0), (255, 255))
    assert result.metadata["label"] == "the blue one"
    assert result.text is None


def test_a_box_on_what_is_shown_means_the_same_place() -> None:
    """An enlarged crop is looked at again, by boxes in its own pixels."""
    (first,) = call(image_zoom_in_tool, bbox_2d=[100, 20, 180, 100]).views
    around = context(view(), first)
    half = [0, 0, first.size[0] / 2, first.size[1]]
    (second,) = call(image_zoom_in_tool, around, bbox_2d=half, source=first.id).views
    assert second.box == Box(100, 20, 140, 100)


def test_a_large_part_is_shown_as_it_is() -> None:
    whole = view(scene((900, 700)))
    (found,) = call(image_zoom_in_tool, context(whole), bbox_2d=[0, 0, 900, 600]).views
    assert found.size == (900, 600)


@pytest.mark.parametrize(
    ("box", "wanted"),
    [
        ((100, 50, 110, 60), (91, 41, 119, 69)),
        ((0, 0, 1, 1), (0, 0, 28, 28)),
        ((199, 99, 200, 100), (172, 72, 200, 100)),
        ((50, 50, 50, 50), (36, 36, 64, 64)),
        ((0, 10, 200, 11), (0, 0, 200, 28)),
    ],
)
def test_small_boxes_are_widened(box: tuple[float, ...], wanted: tuple[float, ...]) -> None:
    assert widened(box, (200, 100)) == wanted


def test_pictures_can_be_counted() -> None:
    around = context(view(), view(scene((50, 40)), "image_2"))
    for number in (1, "1"):
        (found,) = call(image_zoom_in_tool, around, bbox_2d=[0, 0, 50, 40], img_idx=number).views
        assert found.root == "image_2"
    (found,) = call(
        image_zoom_in_tool, around, bbox_2d=[0, 0, 50, 40], img_idx=1, source="image_2"
    ).views
    assert found.root == "image_2"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, "invalid_arguments", "bbox_2d"),
        ({"bbox_2d": [1, 2, 3]}, "invalid_arguments", "at least 4 items"),
        ({"bbox_2d": [300, 0, 400, 50]}, "box_outside", "outside the picture of 200 x 100"),
        ({"bbox_2d": [50, 0, 40, 50]}, "invalid_arguments", "left <= right"),
        ({"bbox_2d": [0, 0, float("nan"), 5]}, "invalid_arguments", "bbox_2d"),
        ({"bbox_2d": [0, 0, 9, 9], "img_idx": 1}, "unknown_source", "no view 'img_idx 1'"),
        ({"bbox_2d": [0, 0, 9, 9], "img_idx": -1}, "unknown_source", "no view 'img_idx -1'"),
        ({"bbox_2d": [0, 0, 9, 9], "source": "x"}, "unknown_source", "no view 'x'"),
        ({"bbox_2d": [0, 0, 9, 9], "image": 0}, "invalid_arguments", "image"),
        (
            {"bbox_2d": [0, 0, 9, 9], "source": "image_1", "img_idx": 4},
            "invalid_arguments",
            "name different pictures",
        ),
    ],
)
def test_what_is_wrong_is_told(arguments: dict[str, object], kind: str, message: str) -> None:
    found, said = told(call(image_zoom_in_tool, **arguments))
    assert found == kind
    assert message in said


@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    box=st.lists(st.floats(-50, 350), min_size=4, max_size=4),
)
def test_any_box_is_shown_or_told(size: tuple[int, int], box: list[float]) -> None:
    result = call(
        image_zoom_in_tool, ToolContext(views={"image_1": view(scene(size))}), bbox_2d=box
    )
    if result.error is None:
        (found,) = result.views
        assert 0 <= found.box.left < found.box.right <= size[0]
        assert found.box.width >= min(LEAST_SIDE, size[0])
        assert found.box.height >= min(LEAST_SIDE, size[1])
    else:
        assert result.error.kind in ("box_outside", "invalid_arguments")
