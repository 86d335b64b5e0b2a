"""Objects that entry points of the tests name."""

from __future__ import annotations

from vpt_agent.errors import CheckpointError, VPTError
from vpt_agent.tool import PerceptionTool, ToolContext, perception_tool


@perception_tool
def good(n: int) -> str:
    """Say a number."""
    return str(n)


@perception_tool(name="good", version=2)
def good_2(n: int) -> str:
    """Say a number better."""
    return str(n)


@perception_tool(name="good")
def rival(n: int) -> str:
    """Say another number."""
    return str(-n)


class Stateful(PerceptionTool):
    """Keep a number."""

    name = "stateful"
    opened = closed = 0

    def setup(self, device: str) -> None:
        self.opened += 1

    def run(self, arguments: object, context: ToolContext) -> str:
        return "1"

    def close(self) -> None:
        self.closed += 1


def plain(n: int) -> str:
    """Say a number plainly."""
    return str(n)


not_a_tool = 7


class Lacking(PerceptionTool):
    """A tool that works once it is given a checkpoint."""

    name = "lacking"

    def __init__(self, checkpoint: str = "") -> None:
        self.checkpoint = checkpoint

    def lacks(self) -> VPTError | None:
        return None if self.checkpoint else CheckpointError("it has no checkpoint", fix="give one")

    def run(self, arguments: object, context: object) -> str:
        return self.checkpoint


lacking = Lacking()
