"""A perception kind for a tool of one's own, added to a model that is in memory.

Tokens go to the tokenizer, rows to the embeddings, a projector to the model where the kind
re-encodes, the row and the tool's contract to the manifest. Training makes it mean something.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vpt_agent.errors import UserError
from vpt_agent.model.configuration import perception_manifest
from vpt_agent.model.encoders import build_parts
from vpt_agent.model.fresh import grow_embeddings
from vpt_agent.model.modeling import VPTForConditionalGeneration
from vpt_agent.model.processing import VPTProcessor, chat_template
from vpt_agent.model.tokenizer import extend, token_ids
from vpt_agent.tokens.table import PerceptionKind, PerceptionTable
from vpt_agent.tool import PerceptionTool


@dataclass(frozen=True)
class AddedKind:
    """What was added: the kind, its new tokens with their ids, and whether rows were added to the
    embeddings (False: the new tokens took spare ones)."""

    kind: PerceptionKind
    tokens: Mapping[str, int]
    grew: bool


def add_perception_kind(
    model: VPTForConditionalGeneration,
    processor: VPTProcessor,
    kind: PerceptionKind,
    *,
    tool: PerceptionTool,
    like: str | None = None,
    encoder_config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> AddedKind:
    """Give ``model`` and ``processor`` (both changed in place) the tokens and the row of ``kind``.

    ``kind`` is one of :func:`vpt_agent.tokens.own_kind`; ``tool`` is what its calls run: its name,
    arguments and needs are checked against the row, and its contract's hash goes into the manifest.
    Embedding rows of new tokens, input and output, start as the mean of all rows in use (as
    published, FACTS section 1) plus normal noise of deviation 1/sqrt(D); with ``like``, the name of
    a kind that the model has, those of start, end and control start as that kind's plus a tenth of
    that noise. A ``control`` kind gets a projector of fresh weights; with an encoder of its own
    (``dino``, ``sam``) ``encoder_config`` gives that encoder's shapes, its weights are random.

    The kind is marked untrained until :func:`mark_trained`: an agent then offers it only where
    ``tool_choice`` names its tool. Everything is checked first: a :class:`UserError` changes
    nothing.
    """
    old = model.config.table.table
    _check_row(kind, old, processor, like)
    check_tool(kind, tool)
    config = copy.deepcopy(model.config.encoders or {})
    if encoder_config is not None:
        config[str(kind.config_prefix)] = dict(encoder_config)
    width = model.config.text_config.hidden_size
    table = PerceptionTable((*old.kinds, kind), old.controls)
    tokenizer = processor.tokenizer
    table.resolve({**tokenizer.get_vocab(), **dict.fromkeys(_tokens(kind), 0)}.get)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = build_parts(kind, config, width, old.controls) if kind.control else None
        new = extend(tokenizer, table)
        ids = token_ids(tokenizer, table)
        grew = len(tokenizer) > model.config.text_config.vocab_size
        if grew:
            grow_embeddings(model, len(tokenizer))
        _initialise_rows(model, kind, {t: ids[t] for t in new}, old, like)
        model.config.encoders = config
        if parts is not None:
            model.add_parts(kind, *parts)
    _write_manifest(model, processor, table, ids, tool)
    return AddedKind(kind, {t: ids[t] for t in sorted(new, key=ids.__getitem__)}, grew)


def mark_trained(model: VPTForConditionalGeneration, kinds: Iterable[str]) -> None:
    """Say in the manifest that ``kinds`` were trained: agents offer them freely from now on."""
    perception = dict(model.config.perception or {})
    done = set(kinds)
    for name in sorted(done):
        model.config.table[name]  # a UserError that lists the kinds, if it is not there
    perception["untrained"] = [k for k in perception["untrained"] if k not in done]
    model.config.perception = perception


def check_tool(kind: PerceptionKind, tool: PerceptionTool) -> None:
    """Raise :class:`UserError` unless calls of ``kind`` are calls that ``tool`` can take."""

    def wrong(got: object, expected: object) -> UserError:
        return UserError(
            "this perception kind and this tool do not fit each other",
            where=f"kind {kind.name}, tool {tool.full_name}",
            got=got,
            expected=expected,
        )

    if tool.name != kind.tool:
        raise wrong(f"a tool called {tool.name}", f"the tool that the kind names: {kind.tool}")
    schema = tool.json_schema()
    properties, required = schema.get("properties"), schema.get("required")
    known = set(properties) if isinstance(properties, dict) else set()
    needed = set(map(str, required)) if isinstance(required, list) else set()
    given = {kind.argument or "region"} if kind.payload in ("grid", "text") else set()
    if not given <= known or not needed <= given:
        named = ", ".join(sorted(known)) or "no arguments"
        raise wrong(
            f"arguments {named}; required {', '.join(sorted(needed)) or 'none'}",
            f"no required argument but {', '.join(given) or 'none'}: it is all that a call gives",
        )
    if "control" in tool.needs and kind.payload != "control":
        raise wrong("a tool that needs a control state", "a kind with the payload 'control'")


def _tokens(kind: PerceptionKind) -> tuple[str, ...]:
    """What a tokenizer may lack; characters it must have."""
    return (*kind.own_tokens, *kind.grid_tokens)


def _check_row(
    kind: PerceptionKind, old: PerceptionTable, processor: VPTProcessor, like: str | None
) -> None:
    if like is not None:
        old[like]
    if kind.name in old:
        raise UserError(
            "the model has a kind of this name already",
            got=kind.name,
            expected=f"a name that is none of {', '.join(k.name for k in old.kinds)}",
        )
    taken = {t: k.name for k in old.kinds for t in _tokens(k)}
    vocabulary = processor.tokenizer.get_vocab()
    for token in kind.own_tokens:
        if token in taken or token in vocabulary:
            raise UserError(
                "a token of the new kind means something already",
                where=f"kind {kind.name}",
                got=token,
                expected="tokens that the tokenizer does not have",
                fix=f"it belongs to the kind {taken[token]}" if token in taken else None,
            )


def _initialise_rows(
    model: VPTForConditionalGeneration,
    kind: PerceptionKind,
    new: Mapping[str, int],
    old: PerceptionTable,
    like: str | None,
) -> None:
    """Rows of the ``new`` tokens, in both tables (one, where they are tied)."""
    source: dict[str, str] = {}
    if like is not None:
        other = old[like]
        pairs = ((kind.start, other.start), (kind.end, other.end), (kind.control, other.control))
        source = {mine: its for mine, its in pairs if mine and its}
    ids = (model.config.perception or {})["ids"]
    first = min(new.values())
    tables: list[Tensor] = [model.model.embed_tokens.weight, model.lm_head.weight]
    with torch.no_grad():
        for weight in tables[: 1 if tables[0] is tables[1] else 2]:
            mean = weight[:first].float().mean(0)
            for token, at in sorted(new.items(), key=lambda item: item[1]):
                noise = torch.randn(weight.shape[1]) / weight.shape[1] ** 0.5
                row = mean + noise.to(mean)
                if token in source:
                    row = weight[ids[source[token]]].float() + 0.1 * noise.to(mean)
                weight[at] = row.to(weight)


def _write_manifest(
    model: VPTForConditionalGeneration,
    processor: VPTProcessor,
    table: PerceptionTable,
    ids: Mapping[str, int],
    tool: PerceptionTool,
) -> None:
    before = dict(model.config.perception or {})
    made = perception_manifest(
        table,
        ids,
        images=before["images"],
        regions=before["regions"],
        trigger=before["trigger"],
        untrained=[*before["untrained"], table.kinds[-1].name],
        domain=before.get("domain", ""),
        tools={**before.get("tools", {}), tool.full_name: tool.contract_hash},
    )
    old = model.config.table.table
    model.config.perception = before | made
    model.table = model.config.table
    if processor.chat_template == chat_template(old):
        processor.chat_template = chat_template(table)
    processor.perception = model.config.perception
