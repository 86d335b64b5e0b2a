"""``vpt-agent tools list`` shows what is installed, broken tools included."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vpt_agent.cli import app
from vpt_agent.cli import tools as tools_module
from vpt_agent.tool import FailedTool, PixelBox, ToolContext, ToolRegistry, perception_tool


@perception_tool(licence="MIT", extra="vpt-agent[count]")
def count_colours(
    context: ToolContext, least: int = 1, box: PixelBox | None = None, unsaid: int = 0
) -> str:
    """Count the colours of the picture.

    Shades count.

    Args:
        least: how many pixels a colour needs to count
    """
    colours = context.require_view().image.getcolors(1 << 24) or []
    return str(sum(1 for pixels, _ in colours if pixels >= least))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> ToolRegistry:
    made = ToolRegistry([count_colours])
    made.failed = (FailedTool("odd", "odd_tools:odd (odd 1.0)", "ImportError: no odd", "..."),)
    monkeypatch.setattr(tools_module, "installed", lambda: made)
    return made


def test_list_says_what_each_tool_is(registry: ToolRegistry) -> None:
    lines = CliRunner().invoke(app, ["tools", "list"]).stdout.splitlines()
    assert lines == [
        "count_colours@1: Count the colours of the picture. Shades count.",
        "    least: how many pixels a colour needs to count",
        "    box: [left, top, right, bottom] in pixels of the source view",
        "    unsaid: no description",
        "    needs view",
        "    install vpt-agent[count]",
        "    licence MIT",
        f"    of {registry.owner('count_colours')}",
        "odd: does not load: ImportError: no odd",
        "    of odd_tools:odd (odd 1.0)",
    ]


def test_json_has_the_schema_and_the_contract(registry: ToolRegistry) -> None:
    told = json.loads(CliRunner().invoke(app, ["tools", "list", "--json"]).stdout)
    (tool,) = told["tools"]
    assert tool["name"] == "count_colours"
    assert tool["arguments"]["properties"]["least"]["type"] == "integer"
    assert tool["contract"] == registry["count_colours"].contract_hash
    assert [broken["name"] for broken in told["failed"]] == ["odd"]
