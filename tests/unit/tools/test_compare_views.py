"""compare_views: two parts at one height, side by side."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.unit.tools.world import call, context, scene, told, view
from vpt_tools.compare_views import GAP, LEAST_HEIGHT, compare_views

RED, BLUE = [20, 30, 40, 50], [120, 40, 160, 80]


def test_two_parts_of_one_picture() -> None:
    result = call(compare_views, first=RED, second=BLUE)
    (shown,) = result.views
    assert shown.root == shown.id  # no place in the original
    assert shown.size[0] == 2 * LEAST_HEIGHT + GAP
    middle = shown.size[1] - LEAST_HEIGHT // 2
    assert shown.image.getpixel((LEAST_HEIGHT // 2, middle)) == (255, 0, 0)
    assert shown.image.getpixel((LEAST_HEIGHT + GAP + 99, middle)) == (0, 0, 255)
    assert shown.image.getpixel((LEAST_HEIGHT + GAP // 2, middle)) == (255, 255, 255)
    assert (
        result.text
        == "1 (left): [20, 30, 40, 50] of image_1\n2 (right): [120, 40, 160, 80] of image_1"
    )
    assert result.structured["second"] == {"of": "image_1", "box": BLUE}


def test_two_pictures_whole() -> None:
    around = context(view(), view(Image.new("RGB", (30, 60), "lime"), "image_2"))
    result = call(compare_views, around, second_source="image_2")
    (shown,) = result.views
    assert shown.image.getpixel((shown.size[0] - 5, shown.size[1] - 5)) == (0, 255, 0)
    assert "[0, 0, 30, 60] of image_2" in str(result.text)


def test_a_difference_is_shown_and_told() -> None:
    changed = scene()
    changed.paste((255, 0, 0), (0, 0, 100, 100))
    around = context(view(), view(changed, "image_2"))
    result = call(compare_views, around, second_source="image_2", difference=True)
    assert result.structured["mean_difference"] == pytest.approx(125 / 2, abs=3)
    assert "3: how far they differ; on average" in str(result.text)
    same = call(compare_views, first=[0, 0, 9, 9], second=[1, 0, 10, 9], difference=True)
    assert same.structured["mean_difference"] == 0


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (3000, 2000), (2, 2)])
def test_any_shapes_fit(size: tuple[int, int]) -> None:
    around = context(view(), view(Image.new("RGB", size), "image_2"))
    (shown,) = call(compare_views, around, second_source="image_2", difference=True).views
    assert max(shown.size) <= 2100


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, "invalid_arguments", "nothing to compare"),
        ({"first": RED, "second": RED}, "invalid_arguments", "nothing to compare"),
        ({"first": RED, "second": [0, 0, 0, 9]}, "box_too_small", "no area"),
        ({"first": [999, 0, 1000, 9]}, "box_outside", "outside the picture"),
        ({"second_source": "x"}, "unknown_source", "no view 'x'"),
        ({"source": "x"}, "unknown_source", "no view 'x'"),
        ({"first": "here"}, "invalid_arguments", "first"),
    ],
)
def test_what_is_wrong_is_told(arguments: dict[str, object], kind: str, message: str) -> None:
    found, said = told(call(compare_views, **arguments))
    assert found == kind
    assert message in said
