"""Importing is quick and loads no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vpt_agent

TORCH_FREE = [
    "vpt_agent",
    "vpt_agent.cli",
    "vpt_agent.errors",
    "vpt_agent.prompt",
    "vpt_agent.tokens",
    "vpt_agent.tool",
    "vpt_agent.trace",
    "vpt_agent.types",
]
HEAVY = ("torch", "transformers", "accelerate")


def heavy_after(statement: str) -> list[str]:
    """Heavy packages that a fresh interpreter has loaded after ``statement``."""
    code = f"import sys; {statement}; print(*(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("module", TORCH_FREE)
def test_import_loads_no_torch(module: str) -> None:
    assert heavy_after(f"import {module}") == []


def test_the_check_sees_torch() -> None:
    assert "torch" in heavy_after("import torch")


@pytest.mark.parametrize(
    "name", sorted(set(vpt_agent.__all__) - {"PerceptionAgent", "__version__"})
)
def test_public_names_come_without_torch(name: str) -> None:
    assert heavy_after(f"from vpt_agent import {name}") == []


def test_every_public_name_is_there_and_listed() -> None:
    for name in vpt_agent.__all__:
        assert getattr(vpt_agent, name) is not None
        assert name in dir(vpt_agent)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(
        AttributeError, match=r"module 'vpt_agent' has no attribute 'PerceptionAgnt'"
    ):
        vpt_agent.PerceptionAgnt  # noqa: B018
