"""Rules that every source file keeps. Exception lists only shrink: a stale entry fails too."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.contract.sources import ROOT, name_of, parsed, python_files

PACKAGES = python_files("vpt_agent", "tools")
ALL = [*PACKAGES, *python_files("tests", "examples")]
LONGEST_FILE = 500
LONGEST_FUNCTION = 60

TOKEN_TABLE = "vpt_agent/tokens/table.py"
SPELLS_TOKENS: set[str] = set()
"""Files besides the table that spell a token in code. Empty is the aim: take yours out."""

LONG_FUNCTIONS: set[str] = set()
"""``file:function`` longer than the limit. Empty is the aim."""


def code_strings(path: Path) -> list[str]:
    """String constants of a file, docstrings left out."""
    tree = parsed(path)
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr):
                docs.add(id(first.value))
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def functions(path: Path) -> list[tuple[str, int]]:
    """Name and number of lines of each function of a file, decorators left out."""
    return [
        (node.name, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def test_only_the_table_spells_a_token() -> None:
    spelling = {name_of(p) for p in PACKAGES if any("<|" in s for s in code_strings(p))}
    assert TOKEN_TABLE in spelling, "the check sees nothing"
    assert spelling - {TOKEN_TABLE} == SPELLS_TOKENS


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_no_function_is_too_long() -> None:
    long = {
        f"{name_of(path)}:{name}"
        for path in PACKAGES
        for name, lines in functions(path)
        if lines > LONGEST_FUNCTION
    }
    assert long == LONG_FUNCTIONS


def called(path: Path) -> list[str]:
    """Dotted names of everything a file calls."""
    return [ast.unparse(n.func) for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)]


FORBIDDEN_CALL = re.compile(r"^(eval|exec|pickle\.loads?|.*\.unsafe_load)$")


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_nothing_is_evaluated_or_unpickled(path: Path) -> None:
    assert [name for name in called(path) if FORBIDDEN_CALL.match(name)] == []
    text = path.read_text(encoding="utf-8")
    assert "import pickle" not in text
    assert "weights_only=False" not in text
    assert "trust_remote_code=True" not in text


@pytest.mark.parametrize("path", PACKAGES, ids=name_of)
def test_no_exception_is_swallowed(path: Path) -> None:
    """A broad ``except`` must raise again or keep what it caught."""
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
        if broad:
            raises = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            keeps = node.name is not None and any(
                isinstance(n, ast.Name) and n.id == node.name for n in ast.walk(node)
            )
            assert raises or keeps, f"{name_of(path)}:{node.lineno} swallows every exception"


def test_every_package_ships_that_it_is_typed() -> None:
    assert (ROOT / "vpt_agent" / "py.typed").is_file()
