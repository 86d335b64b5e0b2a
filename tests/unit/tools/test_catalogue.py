"""The catalogue says what the tools are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vpt_agent.errors import UserError
from vpt_agent.tokens.table import PUBLISHED
from vpt_agent.tool.catalogue import catalogue, main, tools_of

TOOLS = Path(__file__).parents[3] / "tools"


def test_the_catalogue_in_the_repository_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vpt_tools"]) == 0
    made = capsys.readouterr().out
    assert (TOOLS / "README.md").read_text(encoding="utf-8") == made, (
        "run: python -m vpt_agent.tool.catalogue vpt_tools > tools/README.md"
    )


def test_every_published_kind_has_its_tool() -> None:
    tools = tools_of("vpt_tools")
    assert {kind.tool for kind in PUBLISHED.values()} <= {tool.name for tool in tools}
    page = catalogue("vpt_tools")
    for kind in PUBLISHED.values():
        assert kind.start.replace("|", r"\|") in page
    assert all(tool.licence for tool in tools)


def test_wrong_use_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([]) == 2
    assert "usage: " in capsys.readouterr().err
    (tmp_path / "wrong_tools").mkdir()
    (tmp_path / "wrong_tools" / "__init__.py").touch()
    (tmp_path / "wrong_tools" / "thing.py").write_text("thing = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"of its own name; where: wrong_tools\.thing; got: 7"):
        tools_of("wrong_tools")


def test_the_tools_load_no_torch() -> None:
    code = (
        "import sys; from vpt_agent.tool.catalogue import tools_of; tools_of('vpt_tools');"
        "print('torch' in sys.modules)"
    )
    root = TOOLS.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{root}:{TOOLS}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"
