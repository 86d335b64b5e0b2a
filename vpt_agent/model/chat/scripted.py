"""The scripted model as a stock one: it writes its calls as JSON, for tests and demos."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vpt_agent.model.scripted import ScriptedTokenizer
from vpt_agent.prompt.chat import ChatLayout, Message, Schema
from vpt_agent.tokens.table import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    RESPONSE_END,
    RESPONSE_START,
    VISION_END,
    VISION_START,
)


def scripted_layout(tokenizer: ScriptedTokenizer) -> ChatLayout:
    """The layout of a template that has everything: tools, and pictures in their results."""
    return ChatLayout(tokenizer, _render, image_token=IMAGE_PAD)


def _render(messages: Sequence[Message], tools: Sequence[Schema] | None, opened: bool) -> str:
    out = []
    if tools:
        told = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        out.append(f"{IM_START}system\n<tools>\n{told}\n</tools>{IM_END}\n")
    for message in messages:
        said = _said(message["content"])
        role = message["role"]
        if role == "tool":
            role, said = "user", f"{RESPONSE_START}\n{said}\n{RESPONSE_END}"
        out.append(f"{IM_START}{role}\n{said}{IM_END}\n")
    if opened:
        out.append(f"{IM_START}assistant\n")
    return "".join(out)


def _said(content: Any) -> str:
    if isinstance(content, str):
        return content
    picture = f"{VISION_START}{IMAGE_PAD}{VISION_END}"
    return "".join(picture if p["type"] == "image" else p["text"] for p in content)
