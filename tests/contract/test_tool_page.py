"""The path of docs/write-a-tool.md, from an empty folder: its file and its commands, as written."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.contract.sources import ROOT
from vpt_agent.cli import app

PAGE = (ROOT / "docs" / "write-a-tool.md").read_text(encoding="utf-8")
FILE = re.search(r"Save this as `(.+?)`:\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.search(r"<!-- ci: by hand -->\n```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FILE is not None
    assert COMMANDS is not None
    (tmp_path / FILE.group(1)).write_text(FILE.group(2))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    told = []
    for line in COMMANDS.group(1).splitlines():
        program, *words = shlex.split(line)
        assert program == "vpt-agent"
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        told.append(done.stdout)
    assert "Say the mean colour of a part of a picture." in told[0]
    colour = json.loads(told[1])
    assert set(colour) == {"red", "green", "blue"}
    assert json.loads(told[2])["structured"] == colour
