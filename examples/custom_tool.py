"""A perception tool of your own: here, a newer version of the one that answers region tokens.

The model calls ``crop_region``; of two versions the newer one runs. A package offers its tools to
every agent by an entry point in the group ``vpt_agent.tools``.

    python examples/custom_tool.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import ImageOps

from vpt_agent import PerceptionAgent, ToolContext, ToolOutput, perception_tool
from vpt_agent.tool import GridBoxes
from vpt_tools.crop_region import crop_region

SCENE = Path(__file__).with_name("scene.png")
QUESTION = "What is written on the red tag?"


@perception_tool(name="crop_region", version=3)
def crop_with_contrast(
    context: ToolContext, region: GridBoxes, source: str | None = None
) -> ToolOutput:
    """Look closer at one or more parts of a picture, with the contrast raised.

    Args:
        source: id of the view to look at; the latest picture by default
    """
    crops = crop_region(context, region=region)
    views = [context.redrawn(view, ImageOps.autocontrast(view.image)) for view in crops]
    # For the trace only: the model never sees it.
    return ToolOutput(views=views, metadata={"contrast": "raised"})


def main() -> None:
    """Answer with the tool above in place of the one that comes with the package."""
    agent = PerceptionAgent.from_pretrained(tools=[crop_with_contrast])
    answer = agent.run(QUESTION, image=SCENE)
    print(QUESTION)
    for result in answer.results:
        print(f"  {result.name}: {dict(result.metadata)}, {[view.size for view in result.views]}")
    print(answer.text)


if __name__ == "__main__":
    main()
