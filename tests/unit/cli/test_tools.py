"""``vpt-agent tools``: what is installed, one call by hand, and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from vpt_agent.cli import app
from vpt_agent.cli import tools as tools_module
from vpt_agent.tool import (
    FailedTool,
    Installed,
    PerceptionTool,
    PixelBox,
    ToolContext,
    ToolOutput,
    ToolRegistry,
    doctor,
    perception_tool,
)
from vpt_agent.types import Box


@perception_tool(licence="MIT", extra="count")
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
        "    needs the extra count of its package",
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


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["tools", *map(str, words)])


FILE = """
from vpt_agent import PerceptionTool, perception_tool
from vpt_agent.tool import PixelBox, SourceView

@perception_tool(always_run=True)
def width(view: SourceView, box: PixelBox | None = None) -> str:
    '''Say how wide it is.'''
    return f"{view.size[0] if box is None else box[2] - box[0]:g}"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_tools.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def red(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (40, 20), "red").save(path)
    return path


def test_describe_says_what_the_model_is_told(registry: ToolRegistry, file: Path) -> None:
    told = run("describe", "count_colours")
    assert told.exit_code == 0
    assert "needs the extra count of its package" in told.stdout
    assert "time for a call: 60 s; calls at once: 4 x 1; corrections: 2" in told.stdout
    schema = told.stdout.split("The model is told:")[1]
    assert json.loads(schema) == registry["count_colours"].openai_schema()
    assert registry["count_colours"].contract_hash in told.stdout
    assert "an equal call runs again" in run("describe", f"{file}:width").stdout
    plain = json.loads(run("describe", "count_colours", "--json").stdout)
    assert plain["concurrency"] == 4


def test_describe_says_which_tokens_call_a_tool() -> None:
    told = run("describe", "crop_region").stdout
    assert "called by <|region_token_start|> ... <|region_token_end|> (kind region)" in told


def test_a_tool_that_is_not_there_is_told(registry: ToolRegistry) -> None:
    told = run("describe", "gone")
    assert told.exit_code == 2
    assert "there is no such tool; got: gone; expected: count_colours" in told.stderr


def test_call_runs_a_tool_as_an_agent_would(registry: ToolRegistry, file: Path, red: Path) -> None:
    told = run("call", "count_colours", red)
    assert (told.exit_code, told.stdout) == (0, "1\n")
    assert "done: count_colours@1 in" in told.stderr
    told = run("call", file, red, "-a", "box=0, 0, 9, 9")
    assert told.stdout == "9\n"
    assert "read: box: '0, 0, 9, 9' was read as [0, 0, 9, 9]" in told.stderr
    told = run("call", "width", red, "--from", file, "-a", "{'box': [1, 2, 3, 4],}", "--json")
    result = json.loads(told.stdout)
    assert (result["text"], result["ok"]) == ("2", True)
    assert len(result["metadata"]["repairs"]) == 2


def test_call_shows_and_saves_pictures(
    monkeypatch: pytest.MonkeyPatch, red: Path, tmp_path: Path
) -> None:
    @perception_tool
    def cut(context: ToolContext) -> ToolOutput:
        """Cut a corner, and make a picture of its own."""
        corner = context.crop(context.require_view(), Box(0, 0, 9, 9))
        return ToolOutput(views=[corner, Image.new("RGB", (5, 6))], metadata={"pen": "none"})

    monkeypatch.setattr(tools_module, "installed", lambda: ToolRegistry([cut]))
    out = tmp_path / "new" / "crops"
    told = run("call", "cut", red, "--out", out)
    assert told.stdout.splitlines() == [
        f"image_1.1: 9 x 9 pixels, 0, 0, 9, 9 of image_1, saved as {out}/image_1.1.png",
        f"call_1.p1: 5 x 6 pixels, a picture of its own, saved as {out}/call_1.p1.png",
    ]
    assert "pen: none (not for the model)" in told.stderr
    assert Image.open(out / "image_1.1.png").size == (9, 9)
    views = json.loads(run("call", "cut", red, "--json").stdout)["views"]
    assert [view["file"] for view in views] == [None, None]


def test_a_call_that_fails_says_why(registry: ToolRegistry, red: Path, file: Path) -> None:
    told = run("call", "count_colours", red, "-a", "least=many")
    assert told.exit_code == 1
    assert "error: invalid_arguments: least: Input should be a valid integer" in told.stderr
    assert "detail: ValidationError" in told.stderr
    told = run("call", "count_colours")
    assert told.exit_code == 1
    assert "error: unknown_source: there is no picture to look at" in told.stderr
    told = run("call", "count_colours", red, "-a", "[1]")
    assert told.exit_code == 2
    assert "the arguments cannot be read; got: [1]; expected: NAME=VALUE" in told.stderr
    assert run("call", "count_colours", "none.png").exit_code == 2
    file.write_text(FILE + FILE.replace("width", "height"))
    told = run("call", file, red)
    assert told.exit_code == 2
    assert f"this file has several tools; got: {file}; expected: {file}:width or" in told.stderr


class Heavy(PerceptionTool):
    """Load nothing."""

    name = "heavy"

    def setup(self, device: str) -> None:
        raise OSError(f"no weights for {device}")

    def run(self, arguments: object, context: ToolContext) -> str:
        return ""


def test_doctor_says_what_is_wrong_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Installed("count", "a:count (a 1.0)", count_colours, "a"),
        Installed("heavy", "b:Heavy (b 1.0)", Heavy(), "b"),
        FailedTool("odd", "c:odd (c 1.0)", "ImportError: no odd", "Traceback ...\nno odd"),
    ]
    monkeypatch.setattr(doctor, "installed_tools", lambda group: found)
    told = run("doctor", "--setup", "cpu", "--verbose")
    assert told.exit_code == 1
    lines = told.stdout.splitlines()
    assert "ok       count_colours@1: loads" in lines
    assert "warning  count_colours@1: the model is told nothing about unsaid" in lines
    assert "failed   heavy@1: does not set up on cpu: OSError: no weights for cpu" in lines
    assert "failed   odd: ImportError: no odd" in lines
    assert "         do: install what it imports, or uninstall the package" in lines
    assert "         Traceback ..." in lines
    assert lines[-1].startswith("2 of ")
    told = run("doctor", "--json")
    states = {f["tool"]: f["state"] for f in json.loads(told.stdout)}
    assert (states["heavy@1"], states["odd"]) == ("ok", "failed")
    found.pop()
    assert run("doctor").exit_code == 0
