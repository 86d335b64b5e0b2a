"""crop_region: cells, pixels and 0 to 1000, one or several, and everything that is no box."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vpt_agent.tokens.table import CLIP, REGION
from vpt_agent.tool import ToolContext, ToolRegistry, execute
from vpt_agent.types import Box, ToolCall, ToolResult, View
from vpt_tools.crop_region import crop_region

SIZE = (160, 80)


def picture(id_: str = "image_1", size: tuple[int, int] = SIZE) -> View:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    return View(id_, image, id_, Box(0, 0, *size), size)


VIEWS = {"image_1": picture(), "image_2": picture("image_2", (64, 64))}
CONTEXT = ToolContext(views=VIEWS, kinds={"region": REGION, "clip": CLIP})


def crop(context: ToolContext = CONTEXT, **arguments: object) -> ToolResult:
    return execute(crop_region, ToolCall("c1", "crop_region", arguments, "json"), lambda: context)


def boxes(result: ToolResult) -> list[tuple[float, ...]]:
    assert result.ok, result.error
    return [tuple(view.box) for view in result.views]


def test_a_region_with_the_published_margin_and_without() -> None:
    assert boxes(crop(region=[2, 3, 3, 4])) == [(20, 20, 100, 60)]
    cover = replace(CONTEXT, regions="cover")
    assert boxes(crop(cover, region=[2, 3, 3, 4])) == [(40, 30, 80, 50)]
    assert boxes(crop(region=[0, 0, 7, 7])) == [(0, 0, *SIZE)]


def test_boxes_in_pixels_and_thousandths() -> None:
    assert boxes(crop(box=[10, 10, 30.5, 20])) == [(10, 10, 31, 20)]
    assert boxes(crop(box_1000=[500, 0, 1000, 500])) == [(80, 0, 160, 40)]
    assert boxes(crop(box=[-5, -5, 20, 20])) == [(0, 0, 20, 20)]


def test_the_crop_shows_the_original_s_pixels() -> None:
    (view,) = crop(box=[10, 10, 30, 20]).views
    assert view.image.tobytes() == VIEWS["image_1"].image.crop((10, 10, 30, 20)).tobytes()
    assert (view.parent, view.root, view.root_size) == ("image_1", "image_1", SIZE)


def test_several_at_once_keep_their_order() -> None:
    found = crop(region=[[0, 0, 0, 0], [7, 7, 7, 7]])
    assert boxes(found) == [(0, 0, 40, 20), (120, 60, 160, 80)]
    assert len({view.id for view in found.views}) == 2


def test_a_source_is_another_view_and_a_crop_of_a_crop_knows_its_place() -> None:
    assert boxes(crop(source="image_2", box=[0, 0, 8, 8])) == [(0, 0, 8, 8)]
    (inner,) = crop(box=[40, 20, 120, 60]).views
    again = replace(CONTEXT, views={**VIEWS, inner.id: inner})
    (deep,) = crop(again, source=inner.id, box_1000=[500, 500, 1000, 1000]).views
    assert tuple(deep.box) == (80, 40, 120, 60)
    assert (deep.parent, deep.root) == (inner.id, "image_1")


@pytest.mark.parametrize(
    ("context", "grid"),
    [
        (replace(CONTEXT, kind=replace(REGION, grid=16)), 16),
        (replace(CONTEXT, kinds={"clip": CLIP, "region": replace(REGION, grid=4)}), 4),
        (replace(CONTEXT, kinds={}), 8),
        (replace(CONTEXT, kind=CLIP), 8),
    ],
)
def test_the_grid_is_the_row_s(context: ToolContext, grid: int) -> None:
    last = grid - 1
    cover = replace(context, regions="cover")
    step = SIZE[0] // grid
    assert boxes(crop(cover, region=[last, 0, last, last]))[0][0] == SIZE[0] - step
    told = crop(cover, region=[0, 0, 0, grid])
    assert told.error is not None
    assert told.error.message.endswith(f"leaves the grid: cells are 0 to {last}")


def test_a_grid_can_be_said() -> None:
    cover = replace(CONTEXT, regions="cover")
    assert boxes(crop(cover, region=[31, 31, 31, 31], grid=32)) == [(155, 77, 160, 80)]
    assert crop(region=[0, 0, 0, 0], grid=5).error is not None


def test_what_is_cut_out_can_be_enlarged() -> None:
    (view,) = crop(box=[10, 10, 30, 20], enlarge=2.5).views
    assert view.size == (50, 25)
    assert view.box == Box(10, 10, 30, 20)
    again = replace(CONTEXT, views={**VIEWS, view.id: view})
    (deep,) = crop(again, source=view.id, box=[0, 0, 25, 25]).views
    assert deep.box == Box(10, 10, 20, 20)
    assert deep.size == (10, 10)  # the original's pixels, not the enlarged ones
    assert boxes(crop(box=[10, 10, 30, 20], enlarge=1)) == [(10, 10, 30, 20)]


@pytest.mark.parametrize(("degrees", "corner"), [(90, (9, 0)), (180, (19, 9)), (270, (0, 19))])
def test_what_is_cut_out_can_be_turned(degrees: int, corner: tuple[int, int]) -> None:
    """Clockwise; a turned picture is one of its own, so that boxes on it mean its pixels."""
    image = Image.new("RGB", (40, 40), "white")
    image.putpixel((10, 10), (255, 0, 0))
    context = ToolContext(views={"a": View("a", image, "a", Box(0, 0, 40, 40), (40, 40))})
    result = crop(context, box=[10, 10, 30, 20], rotate=degrees)
    (view,) = result.views
    assert view.image.getpixel(corner) == (255, 0, 0)
    assert (view.root, view.parent) == (view.id, "a")
    assert view.size == ((10, 20) if degrees in (90, 270) else (20, 10))
    assert result.text == f"Turned {degrees} degrees clockwise; cut from [10, 10, 30, 20] of a."
    assert result.metadata["boxes"] == [[10, 10, 30, 20]]
    assert boxes(crop(context, box=[10, 10, 30, 20], rotate=0)) == [(10, 10, 30, 20)]


def test_calls_of_the_first_version_mean_the_same() -> None:
    """So a model that was trained with it was trained with this one."""
    tools = ToolRegistry([crop_region])
    assert crop_region.full_name == "crop_region@2"
    assert tools["crop_region@1"] is crop_region
    (hash_,) = crop_region.takes_calls_of.values()
    assert tools.contracts() == {
        "crop_region@1": hash_,
        "crop_region@2": crop_region.contract_hash,
    }
    # The first version's contract is this one's without what it lacked.
    properties = crop_region.json_schema()["properties"]
    assert isinstance(properties, dict)
    added = {"rotate", "enlarge"}
    schema = {
        "additionalProperties": False,
        "properties": {k: v for k, v in properties.items() if k not in added},
        "type": "object",
    }
    old = {"name": "crop_region", "version": 1, "description": crop_region.description,
           "schema": schema}  # fmt: skip
    text = json.dumps(old, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == hash_


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, "invalid_arguments", "exactly one of region, box, box_1000; 0 were given"),
        ({"region": [0, 0, 1, 1], "box": [0, 0, 9, 9]}, "invalid_arguments", "2 were given"),
        ({"region": [0, 0, 8, 1]}, "box_outside", r"region \[0, 0, 8, 1\] leaves the grid"),
        ({"region": [-1, 0, 2, 1]}, "box_outside", "leaves the grid"),
        ({"region": [3, 0, 2, 1]}, "invalid_arguments", "x_min, y_min, x_max, y_max with min"),
        ({"region": [0, 3, 2, 1]}, "invalid_arguments", "with min <= max"),
        ({"region": [[0, 0, 1, 1], [0, 0, 9, 9]]}, "box_outside", r"\[0, 0, 9, 9\]"),
        ({"box": [200, 0, 300, 50]}, "box_outside", "outside the picture of 160 x 80"),
        ({"box": [5, 5, 5, 9]}, "box_too_small", "."),
        ({"box": [9, 5, 5, 9]}, "invalid_arguments", "left <= right"),
        ({"box": [0, 0, float("nan"), 9]}, "invalid_arguments", "box"),
        ({"box": [0, 0, float("inf"), 9]}, "invalid_arguments", "box"),
        ({"box_1000": [0, 0, 1200, 10]}, "box_outside", "leaves the view: 0 to 1000"),
        ({"box_1000": [-1, 0, 12, 10]}, "box_outside", "leaves the view"),
        ({"box_1000": [500, 500, 500, 500]}, "box_too_small", "."),
        ({"region": [0, 0, 1, 1], "source": "x"}, "unknown_source", "no view 'x'"),
        ({"region": [0, 0, 1]}, "invalid_arguments", "at least 4 items"),
        ({"box": [0, 0, 9, 9], "rotate": 45}, "invalid_arguments", "rotate"),
        ({"box": [0, 0, 9, 9], "enlarge": 9}, "invalid_arguments", "enlarge"),
        ({"box": [0, 0, 9, 9], "enlarge": 0.5}, "invalid_arguments", "enlarge"),
    ],
)
def test_what_is_no_box_is_told(arguments: dict[str, object], kind: str, message: str) -> None:
    result = crop(**arguments)
    assert result.error is not None
    assert result.error.kind == kind
    with pytest.raises(ValueError, match=message):
        raise ValueError(result.error.message)
    assert result.views == ()


def test_what_would_be_too_large_is_told() -> None:
    context = ToolContext(views={"image_1": picture(size=(3000, 2000))})
    result = crop(context, box=[0, 0, 3000, 2000], enlarge=8)
    assert result.error is not None
    assert "makes 24000 x 16000 pixels; at most 1.6" in result.error.message


def test_the_crops_of_a_call_are_bounded_together() -> None:
    context = ToolContext(views={"image_1": picture(size=(3000, 2000))})
    boxes = [[0, 0, 1500, 1000]] * 16  # each alone would fit, enlarged twice
    result = crop(context, box=boxes, enlarge=2)
    assert result.error is not None
    assert "3000 x 2000 + ... pixels; at most 1.0" in result.error.message
    assert len(crop(context, box=boxes[:2], enlarge=2).views) == 2
    assert len(crop(context, box=boxes, enlarge=1).views) == 16


def test_tiny_and_thin_pictures_can_be_cropped() -> None:
    for size in [(1, 1), (3, 5), (4000, 1), (1, 4000)]:
        context = ToolContext(views={"image_1": picture(size=size)})
        for cells in ([0, 0, 0, 0], [7, 7, 7, 7], [0, 0, 7, 7]):
            (view,) = crop(context, region=cells).views
            assert min(view.size) >= 1


numbers = st.integers(-3, 1100) | st.floats() | st.just(10**400)
box_like = st.lists(numbers, min_size=3, max_size=5) | st.lists(
    st.lists(numbers, min_size=4, max_size=4), max_size=3
)


@settings(max_examples=300, deadline=None)
@given(
    arguments=st.dictionaries(
        st.sampled_from(["region", "box", "box_1000", "grid", "source"]),
        box_like | st.none() | st.sampled_from([4, 8, "image_1", "image_2"]),
        max_size=3,
    )
)
def test_any_arguments_end_in_views_or_a_listed_error(arguments: dict[str, object]) -> None:
    result = crop(**arguments)
    if result.error is None:
        for view in result.views:
            width, height = view.root_size
            left, top, right, bottom = view.box
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert view.size == (right - left, bottom - top)
    else:
        assert result.error.kind in (
            "invalid_arguments",
            "unknown_source",
            "box_outside",
            "box_too_small",
        )
