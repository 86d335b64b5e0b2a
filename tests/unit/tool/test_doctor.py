"""The doctor finds what keeps installed tools from working."""

from __future__ import annotations

from importlib import metadata
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from vpt_agent.tool import doctor, perception_tool, registry
from vpt_agent.tool.doctor import Finding, examine
from vpt_agent.tool.extras import missing_requirements

HERE = "tests.unit.tool.plugins"


def entries(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = EntryPoints(EntryPoint(n, v, "vpt_agent.tools") for n, v in points.items())
    monkeypatch.setattr(registry, "entry_points", lambda group: found.select(group=group))


def by_tool(findings: list[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.tool, []).append(finding)
    return found


def test_what_is_installed_here_is_well() -> None:
    findings = examine(setup="cpu")
    assert [f.tool for f in findings if f.state == "failed"] == []
    assert {"crop_region@2", "reencode_clip@1"} <= set(by_tool(findings))


def test_a_tool_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, missing="no_such_module:tool", number=f"{HERE}:not_a_tool")
    found = by_tool(examine())
    (missing,), (number,) = found["missing"], found["number"]
    assert missing.state == number.state == "failed"
    assert missing.message == "ModuleNotFoundError: No module named 'no_such_module'"
    assert missing.fix.startswith("install what it imports")
    assert "Traceback" in missing.detail
    assert number.message.startswith("ToolDefinitionError: this is not a tool")
    assert number.fix == "mend or uninstall the package"


def test_a_name_that_is_taken_names_both_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, a=f"{HERE}:good", b=f"{HERE}:rival")
    (conflict,) = [f for f in examine() if f.state == "failed"]
    assert conflict.tool == "good@1"
    assert f"{HERE}:good" in conflict.owner
    assert f"{HERE}:rival" in conflict.owner
    assert "no agent can start" in conflict.message


def test_a_kind_that_no_tool_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, good=f"{HERE}:good")
    found = by_tool(examine())
    assert [f.state for f in found["crop_region"]] == ["warning"]
    assert "no installed tool answers this kind" in found["crop_region"][0].message


def test_what_the_model_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, good=f"{HERE}:good")
    messages = [f.message for f in by_tool(examine())["good@1"]]
    assert messages == ["loads", "the model is told nothing about n"]


def test_setup_is_tried_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    entries(monkeypatch, stateful=f"{HERE}:Stateful")
    assert [f.message for f in by_tool(examine())["stateful@1"]] == ["loads"]
    told = [f.message for f in by_tool(examine(setup="cpu"))["stateful@1"]]
    assert told[1].startswith("sets up on cpu in 0.")


def test_an_extra_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [
        'no-such-package-here>=8.4; extra == "yolo"',
        "another-missing-one ; extra == 'yolo'",
        'numpy>=1; extra == "yolo"',
        'missing-but-of-another; extra == "sam"',
        "pillow>=11",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: listed)
    assert missing_requirements("own", "yolo") == [
        "no-such-package-here>=8.4",
        "another-missing-one",
    ]
    assert missing_requirements("own", "") == missing_requirements("", "yolo") == []

    @perception_tool(extra="yolo")
    def detect() -> str:
        """Find things."""
        return ""

    found = registry.Installed("detect", "own:detect (own 1.0)", detect, "own")
    monkeypatch.setattr(doctor, "installed_tools", lambda group: [found])
    loads, finding = by_tool(examine(setup="cpu"))["detect@1"]
    assert loads.state == "ok"
    assert finding.state == "warning"
    assert finding.message.startswith(
        "not offered to models: its extra yolo is not installed: no-such-package-here>=8.4"
    )
    assert finding.fix == "pip install 'own[yolo]'"


def test_a_package_without_metadata_has_no_extras() -> None:
    assert missing_requirements("no-such-package-here", "yolo") == []
