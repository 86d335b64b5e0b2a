"""Every Python block of the README and docs/ runs; the blocks of one page run in one namespace.

A page runs in a folder of its own, with the repository's examples/ beside it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.contract.sources import ROOT, name_of
from vpt_agent.cli import app

PAGES = [
    ROOT / "README.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"vpt-agent ([a-z]+)(?: ([a-z]+))?")
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")
SHIPPED = ROOT / "vpt_agent" / "weights" / "nano" / "model.safetensors"
NEEDS_GPU = 'device="cuda"'


def blocks(page: Path) -> list[str]:
    """The Python blocks of a page, at their own line numbers, so that tracebacks say where."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text[: m.start(1)].count("\n") + m.group(1) for m in BLOCK.finditer(text)]


WITH_CODE = [page for page in PAGES if blocks(page)]


def test_there_are_pages_with_code() -> None:
    assert ROOT / "README.md" in WITH_CODE
    assert ROOT / "docs" / "way-of-one-question.md" in WITH_CODE


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page):
        if "from_pretrained()" in block and not SHIPPED.is_file():
            pytest.skip("the weights that ship with the package are not in this tree yet")
        if NEEDS_GPU in block:
            compile(block, str(page), "exec")
            continue
        exec(compile(block, str(page), "exec"), namespace)  # noqa: S102 - our own pages


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_a_page_names_exist(page: Path) -> None:
    for first, second in COMMAND.findall(page.read_text(encoding="utf-8")):
        words = [first, second] if first in ("trace", "nano", "tools") and second else [first]
        result = CliRunner().invoke(app, [*words, "--help"])
        assert result.exit_code == 0, f"{name_of(page)} names 'vpt-agent {' '.join(words)}'"
