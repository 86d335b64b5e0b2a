"""What the project's files say about each other."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from importlib.metadata import entry_points

import vpt_agent
from tests.contract.sources import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FLOOR = re.compile(r"^([a-z0-9-]+)>=([0-9.]+)")
PINNED_FOR_CPU = "torch"


def pins(name: str) -> dict[str, str]:
    """The pins of a constraints file."""
    lines = (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def floors() -> dict[str, str]:
    """The lower bounds of the core requirements."""
    matches = [FLOOR.match(requirement) for requirement in PROJECT["dependencies"]]
    return {m[1]: m[2] for m in matches if m}


def test_every_core_requirement_has_a_lower_bound() -> None:
    assert len(floors()) == len(PROJECT["dependencies"])


def test_lowest_versions_are_the_lower_bounds() -> None:
    """So that the run against constraints/lowest.txt checks what pyproject.toml promises."""
    lowest = pins("lowest.txt")
    expected = {name: floor for name, floor in floors().items() if name != PINNED_FOR_CPU}
    assert set(lowest) == set(expected)
    for name, floor in expected.items():
        assert re.fullmatch(re.escape(floor) + r"(\.0)*", lowest[name]), name


def test_the_cpu_constraints_pin_torch_alone() -> None:
    assert set(pins("cpu.txt")) == {PINNED_FOR_CPU}


def test_no_torchvision_in_the_core() -> None:
    assert not any("torchvision" in requirement for requirement in PROJECT["dependencies"])


def test_the_version_is_said_once_more_and_the_same() -> None:
    assert PROJECT["version"] == vpt_agent.__version__


def test_every_tool_file_is_an_entry_point_and_loads() -> None:
    points = PROJECT["entry-points"]["vpt_agent.tools"]
    files = {p.stem for p in (ROOT / "tools" / "vpt_tools").glob("[!_]*.py")}
    assert set(points) == files
    assert set(points.values()) == {f"vpt_tools.{name}:{name}" for name in files}
    installed = {p.name: p for p in entry_points(group="vpt_agent.tools")}
    for name in set(points) & set(installed):
        assert installed[name].load() is not None


def test_the_readme_shows_the_figures_that_were_measured() -> None:
    spec = importlib.util.spec_from_file_location("readme_script", ROOT / "benchmarks/readme.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    figures = json.loads((ROOT / "benchmarks/results/perception.json").read_text(encoding="utf-8"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.split(script.BEGIN)[1].split(script.END)[0].strip() == script.table(figures)
