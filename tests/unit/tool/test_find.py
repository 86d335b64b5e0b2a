"""Tools that a person names: in a file or a module, and what is told where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vpt_agent.errors import ToolDefinitionError, UserError
from vpt_agent.tool import ToolRegistry
from vpt_agent.tool.find import is_reference, tools_at, tools_named
from vpt_agent.tool.registry import FailedTool

HERE = "tests.unit.tool.plugins"
FILE = """
from vpt_agent.tool import PerceptionTool, perception_tool
from vpt_tools.crop_region import crop_region
from neighbour import WORD

@perception_tool
def say() -> str:
    '''Say a word.'''
    return WORD

class Base(PerceptionTool):
    '''Not a tool by itself: it has no name.'''

class Shout(Base):
    '''Say it aloud.'''
    name = "shout"
    def run(self, arguments, context):
        return WORD.upper()

_hidden = say
number = 7
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("WORD = 'hello'\n")
    path = tmp_path / "words.py"
    path.write_text(FILE)
    return path


def test_all_tools_of_a_file(file: Path) -> None:
    before = list(sys.path)
    tools = tools_at(str(file))
    assert [tool.name for tool in tools] == ["say", "shout"]
    assert tools[0].run(tools[0].spec.parse({}), None) == "hello"  # type: ignore[arg-type]
    assert sys.path == before


def test_one_tool_by_its_name(file: Path) -> None:
    (tool,) = tools_at(f"{file}:Shout")
    assert tool.full_name == "shout@1"
    (tool,) = tools_at(f"{file}:crop_region")
    assert tool.name == "crop_region"
    (tool,) = tools_at(f"{HERE}:good")
    assert tool.name == "good"
    (tool,) = tools_at(f"{HERE}:plain")
    assert tool.description == "Say a number plainly."


def test_what_says_where_a_tool_is() -> None:
    assert is_reference("a.py")
    assert is_reference("a:b")
    assert not is_reference("crop_region@1")


@pytest.mark.parametrize(
    ("text", "reference", "message"),
    [
        ("", "{}", "this file defines no tool; where: .*; do: decorate a function"),
        ("x = 1 +", "{}", "tools cannot be loaded; .*got: SyntaxError: .*do: run it with python"),
        ("import not_there_at_all", "{}", "got: ModuleNotFoundError: No module named 'not_there"),
        ("raise KeyError('x')", "{}", "got: KeyError: 'x'"),
        (FILE, "{}:gone", "no such tool; where: .*; got: gone; expected: say, Shout"),
        (FILE, "{}:number", "this is not a tool; got: 7"),
        (FILE, "not_there_at_all:x", "cannot be loaded; where: not_there_at_all; got: ModuleNotF"),
        (FILE, ":x", "does not say where a tool is; got: :x; expected: FILE.py, FILE.py:NAME"),
        (FILE, "words:", "does not say where a tool is"),
        (FILE, "gone.py", "no such file of tools; got: gone.py"),
        (
            "from vpt_agent.errors import UserError\nraise UserError('licence missing')",
            "{}",
            "^licence missing$",
        ),
    ],
)
def test_what_cannot_be_found_is_told(file: Path, text: str, reference: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises((UserError, ToolDefinitionError), match=message):
        tools_at(reference.format(file))
    assert "tools_in_words" not in sys.modules or text == FILE or not text


def test_a_person_names_a_file_an_installed_tool_or_a_module(file: Path) -> None:
    installed = ToolRegistry([tools_at(f"{file}:crop_region")[0]])
    assert [t.name for t in tools_named(str(file), installed)] == ["say", "shout"]
    assert tools_named("crop_region", installed) == [installed["crop_region"]]
    assert tools_named("crop_region@1", installed) == [installed["crop_region"]]
    assert "good" in [t.name for t in tools_named(HERE, installed)]


def test_names_of_nothing() -> None:
    broken = ToolRegistry()
    broken.failed = (FailedTool("json", "its owner", "KeyError: 1", ""),)
    with pytest.raises(UserError, match="there is no such tool; got: not_there; expected: none"):
        tools_named("not_there", ToolRegistry())
    with pytest.raises(UserError, match=r"there is no such tool; got: no\.such\.thing"):
        tools_named("no.such.thing", ToolRegistry())
    with pytest.raises(UserError, match="there is no such tool; got: a b"):
        tools_named("a b", ToolRegistry())
    with pytest.raises(ToolDefinitionError, match="installed but did not load; where: its owner"):
        tools_named("json", broken)
    with pytest.raises(ToolDefinitionError, match="module defines no tool; where: json"):
        tools_named("json", ToolRegistry())
