"""What geometry and loading cost to import."""

import subprocess
import sys

import pytest

import vpt_agent.vision


def test_geometry_and_loading_need_no_torch() -> None:
    code = "import sys, vpt_agent.vision, vpt_agent.tokens; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_every_public_name_is_there() -> None:
    for name in vpt_agent.vision.__all__:
        assert getattr(vpt_agent.vision, name) is not None
    with pytest.raises(AttributeError, match=r"'vpt_agent.vision' has no attribute 'zoom'"):
        vpt_agent.vision.zoom  # noqa: B018
