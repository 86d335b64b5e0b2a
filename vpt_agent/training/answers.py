"""The finished checkpoint answers some rows, as its user would have it do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vpt_agent.agent import PerceptionAgent
from vpt_agent.data import row_views
from vpt_agent.tokens.table import IMAGE_TAG, PerceptionTable
from vpt_agent.training.sources import Placed
from vpt_agent.types import Limits

LIMITS = Limits(calls=4, new_tokens=64)


def answer_rows(
    checkpoint: Path, rows: Sequence[Placed], out: Path, *, say: Callable[[str], None]
) -> tuple[dict[str, Any], ...]:
    """Load ``checkpoint``, answer the first question of ``rows``, and write ``out`` (JSON).

    Each answer has ``question``, ``expected`` (the row's last message), ``answer``, ``calls`` (the
    tools called) and ``status``. The question loses its trigger phrase: the agent adds what the
    checkpoint needs.
    """
    agent = PerceptionAgent.from_pretrained(str(checkpoint), device="cpu")
    answers = []
    for row, folder in rows:
        view = row_views(row, folder=folder)[IMAGE_TAG][0]
        question = _plain(row.messages[0].content)
        answer = agent.run(question, image=view.image, limits=LIMITS)
        answers.append(
            {
                "question": question,
                "expected": row.messages[-1].content,
                "answer": answer.text,
                "calls": [call.name for call in answer.calls],
                "status": answer.status,
            }
        )
        say(f"{question!r}: {answer.text!r} (expected {row.messages[-1].content!r})")
    agent.close()
    out.write_text(json.dumps(answers, indent=1, ensure_ascii=False), encoding="utf-8")
    return tuple(answers)


def _plain(text: str) -> str:
    for kind in PerceptionTable.published(("clip", "dino", "sam")).kinds:
        text = text.replace(kind.trigger, "")
    return text.replace(IMAGE_TAG, "").strip()
