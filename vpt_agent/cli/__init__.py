"""The command ``vpt-agent``. Nothing here computes: each command calls one library function.

Commands import the library when they run, so ``--help`` and usage errors load no torch.
"""

from __future__ import annotations

from vpt_agent.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="vpt-agent")
