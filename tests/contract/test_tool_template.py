"""The template is a package: built, installed, found, called, and used by an agent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.sources import ROOT

TEMPLATE = ROOT / "tools" / "_template"
AGENT = """
import sys
from vpt_agent import PerceptionAgent
from vpt_agent.tokens import PerceptionTable, own_kind
kind = own_kind("brightness", payload="none")
agent = PerceptionAgent.from_script(
    [kind.call_text(), "It is bright."], table=PerceptionTable((kind,))
)
answer = agent.run("How bright is it?", image=sys.argv[1])
print(answer.results[0].text, "|", answer.text)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the built template is installed, and nothing else is new."""
    folder = tmp_path_factory.mktemp("template")
    copy = folder / "copy"  # a build leaves files beside what it builds
    shutil.copytree(TEMPLATE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    site = folder / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation",
         "--no-index", "--disable-pip-version-check", "--target", str(site), str(copy)],
        check=True,
        capture_output=True,
        text=True,
    )  # fmt: skip
    paths = [str(site), str(ROOT), str(ROOT / "tools")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "SITE": str(site)}


def run(installed: dict[str, str], *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=installed, capture_output=True, text=True, cwd=cwd
    )


def test_it_is_found_and_well(installed: dict[str, str], tmp_path: Path) -> None:
    code = "from vpt_agent.cli import main; main()"
    done = run(installed, "-c", code, "tools", "doctor", "--json", cwd=tmp_path)
    findings = {f["tool"]: f for f in json.loads(done.stdout)}
    assert findings["brightness@1"]["state"] == "ok", done.stdout
    assert findings["brightness@1"]["owner"] == (
        "vpt_brightness:brightness (vpt-tool-brightness 0.1.0)"
    )


def test_it_is_called_by_hand(installed: dict[str, str], tmp_path: Path) -> None:
    code = "from vpt_agent.cli import main; main()"
    picture = str(ROOT / "examples" / "scene.png")
    words = ["tools", "call", "brightness", picture, "-a", "box=0,0,50,50", "--json"]
    told = json.loads(run(installed, "-c", code, *words, cwd=tmp_path).stdout)
    assert told["ok"]
    assert told["views"][0]["box"] == [0, 0, 50, 50]
    assert told["text"] == f"brightness {told['structured']['brightness']} of 255"


def test_its_own_test_passes_and_an_agent_uses_it(
    installed: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(TEMPLATE / "tests", tmp_path / "tests")
    done = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout
    done = run(installed, "-c", AGENT, str(ROOT / "examples" / "scene.png"), cwd=tmp_path)
    assert done.stdout.strip().endswith("of 255 | It is bright."), done.stderr
