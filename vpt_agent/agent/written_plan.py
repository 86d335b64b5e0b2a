"""Checks a question against the tools of a model that writes its calls as JSON."""

from __future__ import annotations

from vpt_agent.agent.dialect import Asked
from vpt_agent.agent.plan import Abilities
from vpt_agent.agent.state import Request
from vpt_agent.errors import UserError
from vpt_agent.tool import PerceptionTool, ToolRegistry


def can_be_written(tool: PerceptionTool) -> bool:
    """Whether a tool can be called as JSON: no control state, no encoder of a VPT model."""
    return not any(need == "control" or need.startswith("encoder:") for need in tool.needs)


def plan_written(asked: Asked, registry: ToolRegistry, abilities: Abilities) -> Request:
    """The request: the tools that are offered, and those of which the first turn calls one."""
    if not isinstance(asked.question, str) or not asked.question.strip():
        raise UserError("the question is empty", got=repr(asked.question), fix="ask something")
    offered = [tool.name for tool in registry if can_be_written(tool)]
    must = _must(asked.tool_choice, offered, registry)
    if asked.tool_choice == "none":
        offered = []
    warnings = [*asked.notes, *([abilities.domain] if abilities.domain else [])]
    zero = [name for name in ("calls", "rounds") if getattr(asked.limits, name) < 1]
    if must and zero:
        warnings.append(
            f"tool_choice={asked.tool_choice!r} asks for a call, but the limit of {zero[0]} is 0: "
            "none is made"
        )
    return Request(
        question=asked.question,
        views=asked.views,
        kinds=tuple(offered),
        first=tuple(must),
        tool_choice=asked.tool_choice,
        limits=asked.limits,
        sampling=asked.sampling,
        tools=registry.contracts(),
        model=abilities.to_dict(),
        sources=asked.sources,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def _must(choice: str, offered: list[str], registry: ToolRegistry) -> list[str]:
    """Tools of which the first turn must call one."""
    if choice in ("auto", "none"):
        return []
    if choice == "required":
        if not offered:
            raise UserError(
                "tool_choice='required', but there is no tool that can be called as JSON",
                got=", ".join(tool.name for tool in registry) or "no tool at all",
                fix="register a tool, or use tool_choice='auto'",
            )
        return offered
    tool = registry[choice] if isinstance(choice, str) and choice in registry else None
    if tool is None:
        if isinstance(choice, str) and any(failed.name == choice for failed in registry.failed):
            registry[choice]  # raises, and says why it did not load
        raise UserError(
            "tool_choice names no tool",
            got=choice,
            expected=f"auto, none, required, or one of: {', '.join(sorted(offered))}",
        )
    if tool.name not in offered:
        raise UserError(
            "tool_choice names a tool that cannot be called as JSON",
            got=choice,
            expected=", ".join(sorted(offered)) or "no tool at all",
            fix="use a VPT checkpoint: it calls this tool by a perception token",
        )
    return [tool.name]
