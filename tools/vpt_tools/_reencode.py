"""Re-encode a picture under the control of the call's own hidden state (paper section 3.2)."""

from __future__ import annotations

from pydantic import Field

from vpt_agent.errors import ToolFailed
from vpt_agent.tool import PerceptionTool, ToolArguments, ToolContext
from vpt_agent.types import VisualFeatures


class ReencodeArguments(ToolArguments):
    """Which view to encode again."""

    source: str | None = Field(
        default=None, description="id of the view to encode again; the latest picture by default"
    )


class Reencode(PerceptionTool):
    """Encode a whole picture again with the encoder of one kind, under the control state."""

    arguments = ReencodeArguments
    licence = "Apache-2.0"
    # A SAM ViT-L encoder takes about a minute on a CPU; what hangs longer than this never ends.
    timeout = 600.0

    def __init__(self, kind: str, encoder: str) -> None:
        self.kind = kind
        self.name = f"reencode_{kind}"
        self.description = (
            f"Look at a whole picture again with {encoder}, for what you are thinking of now."
        )
        self.needs = frozenset({"view", "control", f"encoder:{kind}"})

    def run(self, arguments: ReencodeArguments, context: ToolContext) -> VisualFeatures:
        """The visual tokens [V, D] of the view, conditioned on the control state [k, D]."""
        if context.control is None:
            raise ToolFailed(f"{self.name} needs the control state of a call by perception tokens")
        features = context.encode(self.kind, context.require_view())
        return context.project(self.kind, features, context.control)
