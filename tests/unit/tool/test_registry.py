"""The registry: all or nothing, loud, and patient with strangers' packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from vpt_agent.errors import CheckpointError, MissingExtraError, ToolDefinitionError, UserError
from vpt_agent.serving.tools import ServedTools, ServeOptions
from vpt_agent.tool import PerceptionTool, ToolRegistry, registry
from vpt_agent.types import CallError

from . import plugins

HERE = "tests.unit.tool.plugins"


def test_a_tool_is_found_by_its_name_and_its_versioned_name() -> None:
    tools = ToolRegistry([plugins.good, plugins.Stateful])
    assert tools.get("good") is plugins.good
    assert tools.get("good@1") is plugins.good
    assert tools["stateful"].name == "stateful"
    assert tools.find("good@2") is None
    assert "good" in tools
    assert "good@2" not in tools
    assert 7 not in tools
    assert [tool.name for tool in tools] == ["good", "stateful"]
    assert len(tools) == 2
    assert repr(tools) == "ToolRegistry(good@1, stateful@1)"
    assert repr(ToolRegistry()) == "ToolRegistry(empty)"
    assert tools.owner("good").endswith("plugins.good")


def test_the_plain_name_means_the_newest_version() -> None:
    tools = ToolRegistry([plugins.good_2, plugins.good])
    assert tools["good"] is plugins.good_2
    assert tools["good@1"] is plugins.good
    assert list(tools) == [plugins.good_2]
    assert tools.contracts() == {
        "good@1": plugins.good.contract_hash,
        "good@2": plugins.good_2.contract_hash,
    }


def test_a_taken_name_is_an_error_that_names_both_owners() -> None:
    tools = ToolRegistry([plugins.good])
    with pytest.raises(
        ToolDefinitionError,
        match=r"two tools are called good@1; where: \S+plugins\.good and \S+plugins\.rival; do: .*"
        "rename one of them, raise its version, or leave one out",
    ):
        tools.add(plugins.rival)
    assert tools["good"] is plugins.good


def test_adding_is_all_or_nothing() -> None:
    tools = ToolRegistry()
    with pytest.raises(ToolDefinitionError, match="two tools are called good@1"):
        tools.add_all([plugins.Stateful, plugins.good, plugins.rival])
    with pytest.raises(ToolDefinitionError, match="this is not a tool; got: 7; expected: a Perce"):
        tools.add_all([plugins.good, plugins.not_a_tool])  # type: ignore[list-item]
    assert len(tools) == 0


def test_plain_functions_are_taken_too() -> None:
    added = ToolRegistry().add(plugins.plain)
    assert isinstance(added, PerceptionTool)
    assert added.description == "Say a number plainly."


def test_what_the_model_is_told_about_a_tool_that_is_not_there() -> None:
    tools = ToolRegistry([plugins.good, plugins.Stateful])
    assert tools.get("goood") == CallError(
        "unknown_tool", "there is no tool 'goood'; did you mean good"
    )
    assert tools.get("xyz") == CallError(
        "unknown_tool", "there is no tool 'xyz'; tools: good, stateful"
    )
    long = tools.get("a\n" * 500)
    assert isinstance(long, CallError)
    assert len(long.message) < 120
    assert "\n" not in long.message


def test_what_the_user_is_told_about_a_tool_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no such tool; got: goood; expected: good; do: add it"):
        ToolRegistry([plugins.good])["goood"]
    with pytest.raises(UserError, match="expected: none: the registry is empty"):
        ToolRegistry()["good"]


def test_closing_closes_every_tool_that_is_set_up() -> None:
    tools = ToolRegistry([plugins.good, plugins.Stateful])
    stateful = tools["stateful"]
    assert isinstance(stateful, plugins.Stateful)
    tools.close()
    assert (stateful.opened, stateful.closed) == (0, 0)
    stateful.prepare("cpu")
    tools.close()
    tools.close()
    assert (stateful.opened, stateful.closed) == (1, 1)
    stateful.prepare("cpu")
    assert (stateful.opened, stateful.closed) == (2, 1)


def test_a_class_is_made_once_in_a_process() -> None:
    one = ToolRegistry([plugins.Stateful])["stateful"]
    assert ToolRegistry([plugins.Stateful])["stateful"] is one
    assert ToolRegistry([plugins.Stateful()])["stateful"] is not one


def entries(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Installed packages, as importlib.metadata would report them."""
    found = EntryPoints(EntryPoint(n, v, "vpt_agent.tools") for n, v in points.items())
    monkeypatch.setattr(registry, "entry_points", lambda group: found.select(group=group))


def test_tools_come_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, stateful=f"{HERE}:Stateful", good=f"{HERE}:good", plain=f"{HERE}:plain")
    tools = ToolRegistry.from_entry_points()
    assert [tool.name for tool in tools] == ["good", "plain", "stateful"]
    assert tools.failed == ()
    assert tools.owner("good") == f"{HERE}:good (an unnamed package)"
    assert len(ToolRegistry.from_entry_points("another.group")) == 0


def test_a_tool_that_fails_to_load_is_kept_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(
        monkeypatch, good=f"{HERE}:good", missing="no_such_module:tool", number=f"{HERE}:not_a_tool"
    )
    tools = ToolRegistry.from_entry_points()
    assert [tool.name for tool in tools] == ["good"]
    assert [f.name for f in tools.failed] == ["missing", "number"]
    assert tools.failed[0].error == "ModuleNotFoundError: No module named 'no_such_module'"
    assert "Traceback" in tools.failed[0].detail
    with pytest.raises(
        ToolDefinitionError,
        match=r"installed but did not load; where: no_such_module:tool .*; got: ModuleNotFound",
    ):
        tools["missing"]
    told = tools.get("missing")
    assert isinstance(told, CallError)
    assert told.message == "the tool missing is installed but did not load"
    assert "No module named" in told.detail


def test_two_packages_with_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, a=f"{HERE}:good", b=f"{HERE}:rival")
    with pytest.raises(
        ToolDefinitionError, match=r"good \(.*\) and .*rival \(an unnamed package\)"
    ):
        ToolRegistry.from_entry_points()


def test_what_lacks_something_is_left_out_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, good=f"{HERE}:good", lacking=f"{HERE}:lacking")
    assert [t.name for t in ToolRegistry.from_entry_points()] == ["good", "lacking"]
    tools = ToolRegistry.from_entry_points(usable=True)
    assert [t.name for t in tools] == ["good"]
    with pytest.raises(
        ToolDefinitionError,
        match=r"installed but cannot be used yet; .*got: it has no checkpoint; do: give one",
    ):
        tools["lacking"]
    told = tools.get("lacking")
    assert isinstance(told, CallError)
    assert told.message == "the tool lacking is installed but cannot be used yet"


def test_an_extra_that_is_missing_leaves_a_tool_out(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, good=f"{HERE}:good", plain=f"{HERE}:plain")
    error = MissingExtraError("its extra is not installed")
    monkeypatch.setattr(
        registry, "lacking", lambda tool, package: error if tool.name == "good" else None
    )
    tools = ToolRegistry.from_entry_points(usable=True)
    assert [t.name for t in tools] == ["plain"]
    assert tools.failed[0].fix == "see `vpt-agent tools doctor`"
    whole = ToolRegistry.from_entry_points()
    assert (whole.lacks("good"), whole.lacks("plain")) == (error, None)
    served = ServedTools(whole, ServeOptions())
    assert served.left_out == {"good": "its extra is not installed"}


def test_given_tools_stand_beside_the_installed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, good=f"{HERE}:good", lacking=f"{HERE}:lacking")
    with pytest.raises(CheckpointError, match="it has no checkpoint"):
        ToolRegistry.with_installed([plugins.Lacking])
    whole, other = plugins.Lacking("a.pt"), plugins.Lacking("b.pt")
    tools = ToolRegistry.with_installed([whole, whole])
    assert tools["lacking"] is whole
    assert tools.failed == ()
    assert tools.given == (whole,)
    with pytest.raises(ToolDefinitionError, match="two tools are called lacking@1"):
        ToolRegistry.with_installed([whole, other])
    # Another checkpoint for the same class, though the installed one lacks nothing.
    monkeypatch.setattr(plugins.lacking, "checkpoint", "installed.pt")
    assert ToolRegistry.from_entry_points(usable=True)["lacking"] is plugins.lacking
    assert ToolRegistry.with_installed([other])["lacking"] is other
    # A stranger's tool of an installed one's name stays an error.
    with pytest.raises(ToolDefinitionError, match="two tools are called good@1"):
        ToolRegistry.with_installed([plugins.rival])
    assert ToolRegistry.with_installed([plugins.good])["good"] is plugins.good


def test_a_newer_version_can_take_the_calls_of_an_older_one() -> None:
    class Newer(plugins.Lacking):
        name = "thing"
        version = 3
        takes_calls_of = {"thing@1": "ab" * 32, "thing@2": "cd" * 32}  # noqa: RUF012

    tools = ToolRegistry([Newer])
    assert tools["thing@1"] is tools["thing@3"] is tools["thing"]
    assert "thing@4" not in tools
    assert tools.contracts() == {
        "thing@1": "ab" * 32,
        "thing@2": "cd" * 32,
        "thing@3": tools["thing"].contract_hash,
    }
