"""Checks a question against what the model and its tools can do, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vpt_agent.agent.state import Request
from vpt_agent.engine.sampling import Sampling
from vpt_agent.errors import UserError
from vpt_agent.prompt.vpt import VPTLayout
from vpt_agent.tokens.grid import RegionPolicy
from vpt_agent.tokens.table import PUBLISHED, ResolvedTable
from vpt_agent.tool import ToolRegistry
from vpt_agent.tool.registry import GROUP
from vpt_agent.types import Limits, View


@dataclass(frozen=True)
class Abilities:
    """What a checkpoint says of itself (its manifest, see `vpt-agent inspect`).

    ``trigger``: ``phrase`` if it calls tools only when the question carries the trigger phrase,
    ``free`` if it chooses. ``untrained`` kinds run but mean nothing. ``contracts`` are the hashes
    of the tools it was trained with.
    """

    name: str
    trigger: str = "free"
    untrained: tuple[str, ...] = ()
    regions: RegionPolicy = "published"
    domain: str = ""
    contracts: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For the trace."""
        return asdict(self)


def plan_request(
    question: str,
    views: tuple[View, ...],
    *,
    tool_choice: str,
    limits: Limits,
    sampling: Sampling,
    table: ResolvedTable,
    registry: ToolRegistry,
    abilities: Abilities,
    layout: VPTLayout,
    sources: Mapping[str, bytes],
    notes: tuple[str, ...] = (),
) -> Request:
    """A checked request: kinds offered, kinds required at first, trigger phrase, warnings."""
    if not isinstance(question, str) or not question.strip():
        raise UserError("the question is empty", got=repr(question), fix="ask something")
    callable_kinds = [r.name for r in table.rows if registry.find(r.kind.tool) is not None]
    first = _required(tool_choice, callable_kinds, table, registry, abilities)
    offered = [k for k in callable_kinds if k not in abilities.untrained or k in first]
    if tool_choice == "none":
        offered = []
    warnings = [*notes, *_warnings(abilities, table, registry)]
    warnings += [
        f"the perception kind {k} of this model was never trained: its result means nothing"
        for k in first
        if k in abilities.untrained
    ]
    if abilities.trigger == "phrase":
        if first:
            question = layout.with_trigger(question, first[0])
        # A kind without a phrase is called freely, whatever the others need.
        elif tool_choice == "auto" and all(
            table[k].kind.trigger and table[k].kind.trigger not in question for k in offered
        ):
            warnings.append(
                "this model calls its tools only when it is asked to: with tool_choice='auto' and "
                "no trigger phrase in the question it will hardly ever look again; name a tool in "
                "tool_choice, or use tool_choice='required'"
            )
    zero = [name for name in ("calls", "rounds") if getattr(limits, name) < 1]
    if first and zero:
        warnings.append(
            f"tool_choice={tool_choice!r} asks for a call, but the limit of {zero[0]} is 0: "
            "none is made"
        )
    return Request(
        question=question,
        views=views,
        kinds=tuple(offered),
        first=tuple(first),
        tool_choice=tool_choice,
        limits=limits,
        sampling=sampling,
        tools=registry.contracts(),
        model=abilities.to_dict(),
        sources=sources,
        warnings=tuple(dict.fromkeys(warnings)),
    )


def require_tools(table: ResolvedTable, registry: ToolRegistry, abilities: Abilities) -> None:
    """Raise :class:`UserError` if a kind of the user's own has no tool: nothing that is installed
    with this library would answer its calls. (Published kinds without their tools are only not
    offered, with a warning.)"""
    shipped = {kind.tool for kind in PUBLISHED.values()}
    for row in table.rows:
        name = row.kind.tool
        if name in shipped or registry.find(name) is not None:
            continue
        hashes = [f"{k}, contract {v}" for k, v in abilities.contracts.items() if k == name
                  or k.startswith(f"{name}@")]  # fmt: skip
        failed = [f"it is installed but did not load: {f.error} ({f.owner})"
                  for f in registry.failed if f.name == name]  # fmt: skip
        raise UserError(
            "this model calls a tool that is not here",
            where=f"{abilities.name}, perception kind {row.name}",
            got="; ".join(failed) or "tools: " + (", ".join(t.name for t in registry) or "none"),
            expected=", ".join(hashes) or f"{name}, whose contract the checkpoint does not say",
            fix=f"pass it: PerceptionAgent.from_pretrained(..., tools=[{name}]); or install the "
            f"package that offers it under the entry point group {GROUP!r}; to go without it, pass "
            "a ToolRegistry of just the tools you want",
        )


def _required(
    choice: str,
    kinds: list[str],
    table: ResolvedTable,
    registry: ToolRegistry,
    abilities: Abilities,
) -> list[str]:
    """Kinds of which the first turn must call one."""
    if choice in ("auto", "none"):
        return []
    if choice == "required":
        trained = [k for k in kinds if k not in abilities.untrained]
        if not trained:
            raise UserError(
                "tool_choice='required', but this model can call no tool",
                where=abilities.name,
                fix="register the tools of its kinds, or use tool_choice='auto'",
            )
        if abilities.trigger == "phrase":
            # One phrase can be asked for: the kinds that share the first one's.
            phrase = table[trained[0]].kind.trigger
            return [k for k in trained if table[k].kind.trigger == phrase]
        return trained
    tool = registry.find(choice) if isinstance(choice, str) else None
    if tool is None and any(failed.name == choice for failed in registry.failed):
        registry[choice]  # raises, and says why it did not load
    if tool is None:
        raise UserError(
            "tool_choice names no tool",
            got=choice,
            expected="auto, none, required, or one of: "
            + ", ".join(sorted(t.name for t in registry)),
        )
    own = [k for k in kinds if registry.find(table[k].kind.tool) is tool]
    if not own:
        raise UserError(
            "tool_choice names a tool that this model has no perception token for",
            got=choice,
            expected=", ".join(table[k].kind.tool for k in kinds) or "no tool at all",
            fix="use a checkpoint that was trained with it",
        )
    return own


def _warnings(abilities: Abilities, table: ResolvedTable, registry: ToolRegistry) -> list[str]:
    found = []
    if abilities.domain:
        found.append(abilities.domain)
    spoken = {r.kind.tool for r in table.rows}
    shipped = {kind.tool for kind in PUBLISHED.values()}
    for tool in registry.given:  # what is only installed is not missed
        if tool.name not in spoken and tool.name not in shipped:
            found.append(
                f"the tool {tool.name} has no perception token in this model and is not offered"
            )
    for row in table.rows:
        if registry.find(row.kind.tool) is None:
            errors = [f.error for f in registry.failed if f.name == row.kind.tool]
            why = f"did not load ({errors[0]})" if errors else "is not registered"
            found.append(f"the model knows the kind {row.name}, but its tool {row.kind.tool} {why}")
    now = registry.contracts()
    for name, trained in abilities.contracts.items():
        if name in now and now[name] != trained:
            found.append(
                f"the tool {name} is not the one this model was trained with: its contract changed"
            )
    return found
