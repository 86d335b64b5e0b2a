"""The finished checkpoint answers some rows, as its user would have it do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vpt_agent.agent import PerceptionAgent
from vpt_agent.agent.agent import Tools
from vpt_agent.agent.plan import Abilities, require_tools
from vpt_agent.data import Row, RowError, row_views
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.tokens.table import IMAGE_TAG, PUBLISHED, PerceptionTable
from vpt_agent.tool import ToolRegistry
from vpt_agent.training.logs import write_whole
from vpt_agent.training.sources import Taken
from vpt_agent.types import Limits

ANSWERS = "answers.json"
LIMITS = Limits(calls=4, new_tokens=64)


def answer_rows(
    checkpoint: Path,
    rows: Sequence[Taken],
    out: Path,
    *,
    say: Callable[[str], None],
    tools: Tools = None,
) -> tuple[dict[str, Any], ...]:
    """Load ``checkpoint``, answer the first question of ``rows``, and write ``out`` (JSON).

    Each answer has ``question``, ``expected`` (the row's last message), ``answer``, ``calls`` (the
    tools called) and ``status``. The question loses its trigger phrase: the agent adds what the
    checkpoint needs. ``tools`` as in ``PerceptionAgent``. The file is written when all are there.
    """
    agent = PerceptionAgent.from_pretrained(str(checkpoint), device="cpu", tools=tools)
    answers = []
    for row in rows:
        if isinstance(row, RowError):  # skipped and counted in the evaluation
            continue
        question = plain_question(row, agent.layout.table)
        shown = row_views(row)[IMAGE_TAG][: row.messages[0].content.count(IMAGE_TAG)]
        answer = agent.run(question, image=[view.image for view in shown] or None, limits=LIMITS)
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
    write_whole(out, json.dumps(answers, indent=1, ensure_ascii=False))
    return tuple(answers)


def require_own_tools(model: VPTForConditionalGeneration, name: str, tools: Tools) -> None:
    """Raise :class:`UserError` if no tool answers the calls of one of the model's own kinds.

    So that it is found out before a model is trained that could not be asked.
    """
    if isinstance(tools, ToolRegistry):  # which says that all is meant
        return
    registry = ToolRegistry.with_installed(tools or ())
    contracts = (model.config.perception or {}).get("tools", {})
    require_tools(model.table, registry, Abilities(name, contracts=contracts))


def plain_question(row: Row, table: PerceptionTable) -> str:
    """The first message without its pictures' tags and without any kind's trigger phrase, the
    published ones and those of ``table``."""
    text = row.messages[0].content.replace(IMAGE_TAG, "")
    triggers = {kind.trigger for kind in (*PUBLISHED.values(), *table.kinds)} - {""}
    for trigger in sorted(triggers, key=len, reverse=True):
        text = text.replace(trigger, "")
    return text.strip()
