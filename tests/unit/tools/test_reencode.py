"""reencode_*: the view's features under the control of the call's hidden state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from vpt_agent.errors import ToolFailed
from vpt_agent.tokens.table import PUBLISHED
from vpt_agent.tool import PerceptionTool, ToolContext, execute
from vpt_agent.types import Box, ToolCall, View, VisualFeatures
from vpt_tools.reencode_clip import reencode_clip
from vpt_tools.reencode_dino import reencode_dino
from vpt_tools.reencode_sam import reencode_sam

TOOLS = {"clip": reencode_clip, "dino": reencode_dino, "sam": reencode_sam}


def picture(id_: str, shade: int) -> View:
    return View(id_, Image.new("L", (4, 4), shade).convert("RGB"), id_, Box(0, 0, 4, 4), (4, 4))


def encode(kind: str, view: View) -> torch.Tensor:
    return torch.full((3, 2), float(view.image.getpixel((0, 0))[0]) + len(kind))  # type: ignore[index]


def project(kind: str, features: torch.Tensor, control: torch.Tensor | None) -> VisualFeatures:
    assert control is not None
    return VisualFeatures(kind, features + control.sum(), f"condition[{kind}]")


CONTEXT = ToolContext(
    views={"image_1": picture("image_1", 10), "image_2": picture("image_2", 20)},
    control=torch.ones(1, 2),
    kinds=PUBLISHED,
    encode=encode,
    project=project,
)


@pytest.mark.parametrize("kind", TOOLS)
def test_the_view_s_features_are_conditioned_on_the_control_state(kind: str) -> None:
    tool = TOOLS[kind]
    assert tool.name == PUBLISHED[kind].tool
    for source, shade in (("image_2", 20), (None, 10)):
        arguments = {} if source is None else {"source": source}
        call = ToolCall("c1", tool.name, arguments, "sampled", kind)
        result = execute(tool, call, lambda: CONTEXT)
        assert result.features is not None
        assert result.features.kind == kind
        assert result.features.tokens.tolist() == [[shade + len(kind) + 2.0] * 2] * 3
        assert result.kernels == (f"condition[{kind}]",)
        assert result.views == ()


@pytest.mark.parametrize("kind", TOOLS)
def test_without_control_or_encoder_the_model_is_told(kind: str) -> None:
    tool = TOOLS[kind]
    call = ToolCall("c1", tool.name, {}, "json")
    for context, message in [
        (replace(CONTEXT, control=None), "which only its perception tokens carry"),
        (replace(CONTEXT, kinds={}), f"needs the encoder {kind}, which this model lacks"),
    ]:
        result = execute(tool, call, lambda context=context: context)  # type: ignore[misc]
        assert result.error is not None
        assert result.error.kind == "tool_failed"
        assert message in result.error.message


def test_run_by_hand_without_control_is_told_too() -> None:
    with pytest.raises(ToolFailed, match="reencode_clip needs the control state"):
        reencode_clip.run(reencode_clip.spec.parse({}), replace(CONTEXT, control=None))  # type: ignore[arg-type]


def test_the_three_differ_in_their_contracts() -> None:
    tools: list[PerceptionTool] = list(TOOLS.values())
    assert len({tool.contract_hash for tool in tools}) == 3
    assert {tool.needs - {"view", "control"} for tool in tools} == {
        frozenset({f"encoder:{kind}"}) for kind in TOOLS
    }
