"""Whatever a model sends, every tool gives a result or one of the listed kinds of error."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.unit.tools.test_segment import Known
from tests.unit.tools.world import call, context, scene, view
from vpt_agent.errors import CallErrorKind
from vpt_agent.tool import PerceptionTool
from vpt_tools.compare_views import compare_views
from vpt_tools.crop_region import crop_region
from vpt_tools.image_zoom_in_tool import image_zoom_in_tool
from vpt_tools.measure import measure

TOOLS: list[PerceptionTool] = [compare_views, crop_region, image_zoom_in_tool, measure, Known()]
AROUND = context(view(scene((60, 40))), view(Image.new("RGB", (1, 3)), "image_2"))
KINDS = set(get_args(CallErrorKind))

number = st.integers(-3, 70) | st.floats() | st.just(10**400)
numbers = st.lists(number, min_size=1, max_size=5)
value = (
    numbers
    | st.lists(numbers, max_size=4)
    | number
    | st.booleans()
    | st.none()
    | st.sampled_from(["image_1", "image_2", "x", "distance", "area", "colour", "mm", "", "\0"])
)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_arguments(tool: PerceptionTool, data: st.DataObject) -> None:
    names = list(tool.json_schema()["properties"])  # type: ignore[arg-type]
    arguments = data.draw(st.dictionaries(st.sampled_from([*names, "other"]), value, max_size=5))
    result = call(tool, AROUND, **arguments)
    if result.error is None:
        for shown in result.views:
            assert min(shown.size) >= 1
            assert shown.image.mode == "RGB"
    else:
        assert result.error.kind in KINDS
        # What a tool did not foresee would be told by the name of its exception.
        assert result.error.kind != "tool_failed", (arguments, result.error.detail)
        assert "\n" not in result.error.message
