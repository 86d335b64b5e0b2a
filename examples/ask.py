"""Ask one question about a picture: what ``vpt-agent ask`` does, in code.

python examples/ask.py [PICTURE "QUESTION" [TRACE_FOLDER]]
"""

from __future__ import annotations

import sys
from pathlib import Path

from vpt_agent import PerceptionAgent

SCENE = Path(__file__).with_name("scene.png")
QUESTION = "What is written on the red tag?"


def main(picture: str = str(SCENE), question: str = QUESTION, trace: str | None = None) -> None:
    """Print the answer, and where the model looked again."""
    agent = PerceptionAgent.from_pretrained()  # the small model that ships with the package
    answer = agent.run(question, image=picture, trace=trace)

    print(question)
    for call, result in zip(answer.calls, answer.results, strict=True):
        if result.error is not None:
            print(f"  {call.name} failed: {result.error.message}")
        for view in result.views:
            print(f"  looked again by {call.name} at {[round(x) for x in view.box]}")
    print(answer.text)
    for warning in answer.warnings:
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
