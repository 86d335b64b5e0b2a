"""The command without its script."""

from __future__ import annotations

import subprocess
import sys

import vpt_agent


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vpt_agent", "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"vpt-agent {vpt_agent.__version__}\n")
