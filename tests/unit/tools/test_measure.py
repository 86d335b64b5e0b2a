"""measure: distances, areas and colours that are known beforehand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.tools.world import call, context, scene, told, view
from vpt_agent.types import Box, ToolResult
from vpt_tools.measure import colour_name, measure


def values(result: ToolResult) -> dict[str, Any]:
    assert result.ok, result.error
    assert isinstance(result.structured, dict)
    return result.structured


def test_distances_along_points() -> None:
    result = call(measure, what="distance", points=[[0, 0], [30, 40], [30, 50]])
    found = values(result)
    assert (found["pixels"], found["legs"]) == (60, [50, 10])
    assert result.text == "The distance is 60.0 pixels of image_1."
    assert result.views == ()


def test_with_a_scale_there_are_units() -> None:
    result = call(measure, what="distance", points=[[0, 0], [30, 40]], scale=0.5, unit="mm")
    assert (values(result)["amount"], values(result)["unit"]) == (25, "mm")
    assert "25 mm" in str(result.text)
    result = call(measure, what="area", box=[0, 0, 10, 20], scale=0.5, unit="mm")
    assert (values(result)["amount"], values(result)["unit"]) == (50, "mm^2")


def test_a_small_scale_loses_no_digits() -> None:
    result = call(measure, what="area", box=[0, 0, 10, 20], scale=2.5e-7, unit="m")
    assert values(result)["amount"] == pytest.approx(1.25e-11, rel=1e-9)


def test_areas_of_boxes_and_shapes() -> None:
    found = values(call(measure, what="area", box=[0, 0, 50, 40]))
    assert found["pixels"] == 2000
    assert (found["share"], found["width"], found["height"]) == (0.1, 50, 40)
    triangle = [[0, 0], [100, 0], [0, 50]]
    assert values(call(measure, what="area", points=triangle))["pixels"] == 2500
    assert values(call(measure, what="area", points=triangle[::-1]))["pixels"] == 2500


def test_in_an_enlarged_view_the_original_s_pixels_are_told_too() -> None:
    shown = replace(view(scene((400, 100))), box=Box(0, 0, 200, 100), root_size=(200, 100))
    result = call(measure, context(shown), what="distance", points=[[0, 0], [40, 0]])
    assert values(result)["original_pixels"] == 20
    result = call(measure, context(shown), what="area", box=[0, 0, 40, 10])
    assert values(result)["original_pixels"] == 200
    assert str(result.text).endswith("200.0 pixels of the original.")


def test_colours_at_points_and_in_boxes() -> None:
    result = call(measure, what="colour", points=[[25, 35], [140, 60], [0, 0], [200, 100]])
    colours = values(result)["colours"]
    assert [c["name"] for c in colours] == ["red", "blue", "grey", "grey"]
    assert colours[0] == {"rgb": [255, 0, 0], "hex": "#ff0000", "name": "red"}
    assert "[140, 60] blue, #0000ff" in str(result.text)
    (mean,) = values(call(measure, what="colour", box=[20, 30, 40, 50]))["colours"]
    assert mean["rgb"] == [255, 0, 0]


def test_a_radius_takes_a_round_patch() -> None:
    (at_edge,) = values(call(measure, what="colour", points=[[20, 40]], radius=8))["colours"]
    assert 150 < at_edge["rgb"][0] < 230  # half red, half grey
    (corner,) = values(call(measure, what="colour", points=[[0, 0]], radius=10))["colours"]
    assert corner["rgb"] == [128, 128, 128]
    (inside,) = values(call(measure, what="colour", points=[[30, 40]], radius=9))["colours"]
    assert inside["rgb"] == [255, 0, 0]  # the corners of a square would be grey


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"), ((255, 255, 255), "white"), ((120, 120, 125), "grey"),
        ((220, 20, 20), "red"), ((255, 140, 0), "orange"), ((110, 60, 20), "brown"),
        ((250, 220, 10), "yellow"), ((20, 160, 40), "green"), ((0, 200, 200), "cyan"),
        ((20, 40, 220), "blue"), ((130, 30, 200), "purple"), ((250, 80, 180), "pink"),
        ((255, 0, 20), "red"),
    ],
)  # fmt: skip
def test_names_of_colours(rgb: tuple[int, int, int], name: str) -> None:
    assert colour_name(*rgb) == name


@pytest.mark.parametrize("what", ["distance", "area", "colour"])
def test_it_can_be_shown(what: str) -> None:
    result = call(measure, what=what, points=[[10, 10], [60, 10], [30, 60]], show=True)
    (shown,) = result.views
    assert (shown.parent, shown.box, shown.size) == ("image_1", Box(0, 0, 200, 100), (200, 100))
    assert shown.image.getpixel((10, 10)) == (0, 229, 255)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"what": "length"}, "invalid_arguments", "what"),
        ({"what": "distance"}, "invalid_arguments", "two or more points, and no box"),
        ({"what": "distance", "points": [[1, 1]]}, "invalid_arguments", "two or more points"),
        ({"what": "area"}, "invalid_arguments", "area needs a box, or 3 or more points"),
        ({"what": "area", "points": [[1, 1], [2, 2]]}, "invalid_arguments", "3 or more points"),
        (
            {"what": "area", "points": [[0, 0], [9, 9], [9, 0], [0, 9]]},
            "invalid_arguments",
            "crosses itself",
        ),
        (
            {"what": "colour", "points": [[1, 1]], "box": [0, 0, 9, 9]},
            "invalid_arguments",
            "(not both)",
        ),
        ({"what": "colour", "points": [[201, 1]]}, "box_outside", "[201, 1] lies outside"),
        ({"what": "colour", "points": [[1, 2, 3]]}, "invalid_arguments", "points"),
        ({"what": "area", "box": [500, 0, 600, 9]}, "box_outside", "outside the picture"),
        ({"what": "area", "box": [5, 5, 5, 9]}, "box_too_small", "no area"),
        (
            {"what": "distance", "points": [[0, 0], [1, 1]], "scale": 2},
            "invalid_arguments",
            "scale and unit go together",
        ),
        ({"what": "colour", "points": [[1, 1]], "radius": 999}, "invalid_arguments", "radius"),
        ({"what": "colour", "points": [[1, 1]], "source": "x"}, "unknown_source", "no view 'x'"),
    ],
)
def test_what_is_wrong_is_told(arguments: dict[str, object], kind: str, message: str) -> None:
    found, said = told(call(measure, **arguments))
    assert found == kind
    assert message in said
