"""Several questions about one picture: the session, and what it has seen, is kept between them.

python examples/conversation.py [PICTURE "QUESTION" ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from vpt_agent import PerceptionAgent

SCENE = Path(__file__).with_name("scene.png")
QUESTIONS = ("What is written on the red tag?", "Read the blue tag.")


def main(picture: str = str(SCENE), *questions: str) -> None:
    """Print each answer, and how many positions were computed for it."""
    agent = PerceptionAgent.from_pretrained()
    chat = agent.conversation(image=picture)
    for question in questions or QUESTIONS:
        answer = chat.ask(question)
        usage = answer.usage
        print(question)
        print(f"  {answer.text}")
        print(f"  {usage.forward_tokens} positions, {usage.encoder_calls} pictures encoded")
    chat.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
