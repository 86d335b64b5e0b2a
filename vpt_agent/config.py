"""Where things of the installation lie."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from vpt_agent.errors import CheckpointError


def shipped_model() -> Path:
    """The directory of the small model that ships with the package."""
    path = Path(str(resources.files("vpt_agent") / "weights" / "nano"))
    if not (path / "config.json").is_file():
        raise CheckpointError(
            "this installation lacks the small model that ships with the package",
            where=path,
            fix="reinstall vpt-agent, or name a checkpoint",
        )
    return path
