from __future__ import annotations

from typing import NamedTuple

import pytest
from PIL import Image

from vpt_agent.trace import (
    Decoded,
    ErrorInfo,
    ImageEncoded,
    LimitReached,
    PerceptionAppended,
    Prefilled,
    PromptRendered,
    RunFinished,
    RunStarted,
    SpanInfo,
    ToolCalled,
    ToolFinished,
    ToolRejected,
    Trace,
    ViewInfo,
    WarningGiven,
)
from vpt_agent.types import Box, View


class Pictures(NamedTuple):
    original: View
    crop: View


@pytest.fixture
def pictures() -> Pictures:
    image = Image.linear_gradient("L").resize((120, 80)).convert("RGB")
    original = View("image_1", image, "image_1", Box(0, 0, 120, 80), (120, 80))
    box = Box(15, 10, 75, 50)
    crop = View(
        "view_1", image.crop((15, 10, 75, 50)), "image_1", box, (120, 80), "image_1", "crop_region"
    )
    return Pictures(original, crop)


def fill(trace: Trace, pictures: Pictures, run: str = "r1", continues: str | None = None) -> None:
    """One run as the agent would tell it, with a call that worked and one that did not."""
    original, crop = (ViewInfo.of(v, trace.add_picture(v)) for v in pictures)
    at = {"run": run}
    said = SpanInfo(source="sampled", ids=(7,), logprobs=(-0.5,), text="<start>")
    trace.emit(
        RunStarted(
            **at,
            question="What stands on the <b>tag</b>?",
            views=(original,),
            seed=7,
            limits={"calls": 8, "seconds": None},
            tools={"crop_region@1": "ab" * 32},
            continues=continues,
        )
    )
    trace.emit(
        PromptRendered(
            **at,
            text="user: What",
            spans=(
                SpanInfo(source="given", ids=(1, 2), text="user: "),
                SpanInfo(source="visual", ids=(5, 5), view="image_1", kind="region"),
                SpanInfo(source="given", ids=(3,), text="What"),
            ),
        )
    )
    trace.emit(ImageEncoded(**at, view="image_1", encoder="base", visual_tokens=2, grid=(1, 2, 4)))
    trace.emit(Prefilled(**at, tokens=5, next_position=4))
    at["turn"] = 1
    trace.emit(
        Decoded(
            **at,
            spans=(said, SpanInfo(source="forced", ids=(8, 9), text="<end>")),
            removed_mass=(0.25,),
            stop="turn",
        )
    )
    trace.emit(
        ToolCalled(
            **at,
            call_id="c1",
            name="crop_region",
            arguments={"region": [1, 1, 4, 4]},
            kind="region",
            origin="sampled",
            tokens=(7, 8, 9),
        )
    )
    trace.emit(
        ToolFinished(
            **at, call_id="c1", name="crop_region", ok=True, views=(crop,), visual_tokens=1
        )
    )
    trace.emit(
        ToolRejected(
            **at,
            error=ErrorInfo(kind="unknown_tool", message="no tool crap", detail="Trace\nback"),
        )
    )
    trace.emit(
        PerceptionAppended(
            **at,
            call_ids=("c1",),
            spans=(SpanInfo(source="visual", ids=(5,), view="view_1", call_id="c1"),),
            visual_tokens=1,
            start=8,
            next_position=9,
        )
    )
    at["turn"] = 2
    trace.emit(Decoded(**at, spans=(SpanInfo(source="sampled", ids=(4, 6), text="K4X2"),)))
    trace.emit(LimitReached(**at, limit="calls", value=9, allowed=8))
    trace.emit(WarningGiven(**at, message="knows its scenes only"))
    trace.emit(
        RunFinished(
            **at, status="answered", text="K4X2", usage={"prompt_tokens": 5, "seconds": 0.25}
        )
    )


@pytest.fixture
def told(pictures: Pictures) -> Trace:
    trace = Trace()
    fill(trace, pictures)
    return trace
