"""The shipped model looks closer through an MCP server, and answers as with its own tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.serving.kit import over_http
from vpt_agent.agent import PerceptionAgent
from vpt_agent.config import shipped_model
from vpt_agent.serving.tools import ServedTools, ServeOptions
from vpt_agent.tool import ToolRegistry
from vpt_tools.crop_region import crop_region

SCENE = Path(__file__).parents[3] / "examples" / "scene.png"
QUESTION = "What is written on the red tag?"


def test_the_shipped_model_looks_through_a_server(tmp_path: Path) -> None:
    if not (shipped_model() / "model.safetensors").is_file():
        pytest.skip("the weights that ship with the package are not in this tree yet")
    near = PerceptionAgent.from_pretrained(tools=ToolRegistry([crop_region]), device="cpu")
    here = near.run(QUESTION, image=SCENE)
    near.close()

    # What a region's cells are is the model's to say, and a server has none.
    kinds = {row.name: row.kind for row in near.engine.table.rows}
    options = ServeOptions(regions=near.abilities.regions, kinds=kinds)
    served = ServedTools(ToolRegistry([crop_region]), options)
    registry = ToolRegistry()
    with over_http(served) as address:
        registry.mount_mcp(address, prefix="", only=["crop_region"], pictures="image")
        far = PerceptionAgent.from_pretrained(tools=registry, device="cpu")
        there = far.run(QUESTION, image=SCENE, trace=tmp_path / "run")
        far.close()
    served.close()

    assert [result.error for result in there.results] == [None]
    assert [call.name for call in there.calls] == ["crop_region"]
    assert there.views[-1].sha256 == here.views[-1].sha256, "the same pixels"
    assert there.text == here.text
    # What comes from elsewhere is a picture of its own: nothing says which part it shows.
    assert there.views[-1].root == there.views[-1].id
    assert "MCP server" in registry.owner("crop_region")
