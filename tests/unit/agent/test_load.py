"""What the loader refuses, and what the request says about tools that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vpt_agent.agent import PerceptionAgent
from vpt_agent.errors import CheckpointError, ToolDefinitionError, UserError
from vpt_agent.tool import ToolRegistry
from vpt_agent.tool.registry import FailedTool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "toaster"}, "unknown device"),
        ({"dtype": "int3"}, "unknown dtype"),
        ({"weights": "int4"}, "unknown weights; .*got: int4; expected: own, int8, float8"),
        ({"decoding": "gpu"}, "unknown way of decoding; .*got: gpu; expected: auto, device"),
        ({"options": 64}, r"options must be EngineOptions\(...\); where: options; got: 64"),
        ({"max_cached_tokens": "8k"}, "must be a whole number of tokens; .*got: '8k'"),
        ({"max_cached_tokens": True}, "must be a whole number of tokens; .*got: True"),
    ],
)
def test_options_are_checked_before_anything_is_read(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        PerceptionAgent.from_pretrained(tmp_path / "nothing", **options)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="has no CUDA device"):
        PerceptionAgent.from_pretrained(tmp_path / "nothing", device="cuda")


def test_a_model_without_kinds_is_no_agent() -> None:
    from vpt_agent.model.testing import tiny_model

    model, processor = tiny_model(encoders=("clip",))
    model.config.perception = None
    with pytest.raises(CheckpointError, match="this model has no perception kinds"):
        PerceptionAgent.from_model(model, processor.tokenizer)


def test_a_tool_that_did_not_load_is_told_with_its_reason() -> None:
    registry = ToolRegistry()
    registry.failed = (FailedTool("crop_region", "there:here (pkg 1)", "ImportError: x", "..."),)
    agent = PerceptionAgent.from_script(["Ok."], tools=registry)
    with pytest.raises(ToolDefinitionError, match="installed but did not load"):
        agent.run("q?", tool_choice="crop_region")
    with pytest.raises(UserError, match="this model can call no tool"):
        agent.run("q?", tool_choice="required")
    said = " | ".join(agent.run("q?").warnings)
    assert "its tool crop_region did not load (ImportError: x)" in said
    assert "its tool reencode_sam is not registered" in said
