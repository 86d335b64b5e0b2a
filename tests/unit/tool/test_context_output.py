"""What a tool is given, and what becomes of what it gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vpt_agent.errors import ImageError, ModelRetry, ToolDefinitionError, ToolFailed, UserError
from vpt_agent.tokens.table import CLIP, REGION
from vpt_agent.tool import ToolContext, ToolOutput
from vpt_agent.tool.output import LONGEST_TEXT, to_result
from vpt_agent.types import Box, ToolCall, ToolResult, View, VisualFeatures


def picture(id_: str = "image_1", size: tuple[int, int] = (40, 20)) -> View:
    return View(id_, Image.new("RGB", size, "red"), id_, Box(0, 0, *size), size)


CALL = ToolCall("c1", "look", {}, "json")


def result(output: object, context: ToolContext | None = None) -> ToolResult:
    return to_result("here.look", CALL, output, context or ToolContext(), 0.5)


def test_a_context_fills_in_its_view_and_original() -> None:
    image = picture()
    crop = View("v", image.image.crop((0, 0, 9, 9)), "image_1", Box(0, 0, 9, 9), (40, 20))
    context = ToolContext(views={"image_1": image, "v": crop})
    assert context.view is image
    assert context.original is image
    looking = context.looking_at("v")
    assert looking.view is crop
    assert looking.original is image
    assert looking.rng is context.rng
    with pytest.raises(ModelRetry, match="no view 'w'; views: image_1, v") as caught:
        context.looking_at("w")
    assert caught.value.kind == "unknown_source"
    with pytest.raises(ModelRetry, match="no picture to look at"):
        ToolContext().require_view()


def test_a_context_knows_the_model_s_rows() -> None:
    context = ToolContext(kinds={"region": REGION, "clip": CLIP})
    assert context.kind_named("clip") is CLIP
    with pytest.raises(
        UserError, match="no such perception kind; got: sam; expected: region, clip"
    ):
        context.kind_named("sam")


def test_a_bare_context_has_no_model() -> None:
    context, view = ToolContext(), picture()
    with pytest.raises(UserError, match=r"no encoder; got: clip; do: pass encode="):
        context.encode("clip", view)
    with pytest.raises(UserError, match=r"no projector; got: clip; do: pass project="):
        context.project("clip", torch.zeros(1, 2), None)


def test_a_bare_context_crops_with_names_of_its_own() -> None:
    image = picture()
    context = ToolContext(views={"image_1": image})
    first, second = (context.crop(image, Box(0, 0, n, n)) for n in (4, 8))
    assert (first.id, second.id) == ("image_1.1", "image_1.2")
    assert (first.box, first.size) == (Box(0, 0, 4, 4), (4, 4))
    with pytest.raises(ModelRetry, match="outside"):
        context.crop(image, Box(90, 90, 99, 99))


def test_a_crop_keeps_what_was_drawn_and_takes_lost_pixels_from_the_original() -> None:
    image = picture()
    context = ToolContext(views={"image_1": image})
    drawn = context.redrawn(image, Image.new("RGB", image.size, "blue"))
    assert context.crop(drawn, Box(0, 0, 4, 4)).image.getpixel((0, 0)) == (0, 0, 255)
    small = context.redrawn(image, Image.new("RGB", (20, 10), "blue"))
    crop = context.crop(small, Box(0, 0, 4, 4))
    assert (crop.size, crop.box) == ((8, 8), Box(0, 0, 8, 8))
    assert crop.image.getpixel((0, 0)) == (255, 0, 0)


def test_a_drawing_keeps_the_place_and_a_bare_picture_has_none() -> None:
    image = picture()
    context = ToolContext(views={"image_1": image})
    crop = context.crop(image, Box(10, 0, 30, 20))
    drawn = context.redrawn(crop, Image.new("L", (200, 200)))
    assert (drawn.id, drawn.parent, drawn.root) == ("image_1.1.drawn", "image_1.1", "image_1")
    assert (drawn.box, drawn.size, drawn.image.mode) == (crop.box, (200, 200), "RGB")
    bare = result([Image.new("RGBA", (5, 6)), Image.new("L", (7, 8))], context).views
    assert [v.id for v in bare] == ["c1.p1", "c1.p2"]
    assert all(v.root == v.id and v.parent == "image_1" and v.origin == "look" for v in bare)
    assert [(v.box, v.root_size, v.image.mode) for v in bare] == [
        (Box(0, 0, 5, 6), (5, 6), "RGB"),
        (Box(0, 0, 7, 8), (7, 8), "RGB"),
    ]


def test_names_of_pictures_do_not_clash() -> None:
    taken = picture("c1.p1")
    made = result(Image.new("RGB", (3, 3)), ToolContext(views={"c1.p1": taken})).views
    assert [v.id for v in made] == ["c1.p2"]


def test_each_kind_of_output() -> None:
    view = picture()
    features = VisualFeatures("clip", torch.zeros(3, 2), "condition[cpu]")
    assert result("three").text == "three"
    assert result(view).views == (view,)
    assert result(features).features is features
    assert result(features).kernels == ("condition[cpu]",)
    values = result({"n": np.float32(1.5), "at": np.arange(2), "bad": float("nan")})
    assert values.structured == {"n": 1.5, "at": [0, 1], "bad": "nan"}
    assert values.text == '{"n": 1.5, "at": [0, 1], "bad": "nan"}'
    assert values.ok
    assert values.seconds == 0.5
    assert (values.call_id, values.name) == ("c1", "look")


def test_several_parts_are_one_result() -> None:
    view = picture()
    parts = [
        ToolOutput(
            views=[view, Image.new("RGB", (2, 2))],
            text="a",
            structured={"n": 1},
            metadata={"secret": 7},
            kernels=["k", "k"],
        ),
        "b",
        {"n": 2},
    ]
    merged = result(parts)
    assert [v.id for v in merged.views] == ["image_1", "c1.p1"]
    assert merged.text == "a\nb"
    assert merged.structured == [{"n": 1}, {"n": 2}]
    assert merged.metadata == {"secret": 7}
    assert merged.kernels == ("k",)
    assert result([]) == ToolResult("c1", "look", seconds=0.5)


@pytest.mark.parametrize("output", [None, 3, b"bytes", {"a"}, [object()], ToolOutput(views=["v"])])  # type: ignore[list-item]
def test_anything_else_is_the_author_s_error(output: object) -> None:
    with pytest.raises(
        ToolDefinitionError, match=r"no result can be; where: here\.look; got: builtins\.\w+"
    ):
        result(output)


def test_features_twice_and_what_json_cannot_say() -> None:
    features = VisualFeatures("clip", torch.zeros(3, 2))
    with pytest.raises(ToolDefinitionError, match=r"once; where: here\.look; got: two"):
        result([features, ToolOutput(features=features)])
    with pytest.raises(ToolDefinitionError, match=r"JSON cannot say.*type object"):
        result({"n": object()})


def test_pictures_that_are_none() -> None:
    with pytest.raises(ToolFailed, match="a picture without pixels"):
        result(Image.new("RGB", (0, 4)))
    with pytest.raises(ImageError):
        result(_Broken())


class _Broken(Image.Image):
    """A picture whose pixels cannot be had."""

    def __init__(self) -> None:
        super().__init__()
        self._size, self._mode = (3, 3), "RGB"

    def load(self) -> None:
        raise OSError("file is truncated")


def test_a_long_text_is_cut_for_the_model_and_whole_in_the_trace() -> None:
    long = "x" * (LONGEST_TEXT + 7)
    cut = result(long)
    assert cut.text == "x" * LONGEST_TEXT + "\n[cut: 7 more letters]"
    assert cut.metadata["whole_text"] == long
    assert result(long[7:]).text == long[7:]
    assert "whole_text" not in result(long[7:]).metadata
