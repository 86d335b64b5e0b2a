"""Rows made for one encoder, for a model that has another."""

from __future__ import annotations

import re
from dataclasses import replace

from vpt_agent.data.rows import Message, Row, RowError
from vpt_agent.errors import UserError
from vpt_agent.tokens.table import PUBLISHED, PerceptionKind, PerceptionTable

_REENCODING = tuple(kind for kind in PUBLISHED.values() if kind.payload == "control")


def retarget(row: Row, table: PerceptionTable, *, encoder: str | None = None) -> Row:
    """``row`` with its re-encoding calls, tags and picture lists those of a kind in ``table``.

    Calls of kinds that the model has stay as they are, but for the number of control tokens, which
    becomes the table's. Others become calls of ``encoder`` (a kind's name; may be left out where
    the model has one re-encoding kind only). Regions are not touched. A row that needs an encoder
    and a model without any is a :class:`RowError`.
    """
    own = [kind for kind in table.kinds if kind.payload == "control" and kind.control]
    made_for = [kind for kind in _REENCODING if _uses(row, kind)]
    foreign = [kind for kind in made_for if kind.name not in table]
    target = _target(row, own, foreign, encoder) if foreign else None
    messages, pictures = row.messages, dict(row.pictures)
    for kind in made_for:
        to = target if kind in foreign and target is not None else table[kind.name]
        messages = tuple(_rewritten(m, kind, to, table.controls) for m in messages)
        if to.tag != kind.tag:
            both = [m for m in row.messages if kind.tag in m.content and to.tag in m.content]
            if both or (pictures.get(to.tag) and pictures[kind.tag]):
                raise RowError(
                    "kinds",
                    "a row looks through several encoders, which cannot become one",
                    where=row.where,
                    got=", ".join(k.name for k in made_for),
                    fix="leave it out, or use a model that has them all",
                )
            pictures[to.tag], pictures[kind.tag] = pictures[kind.tag], ()
    if messages == row.messages and pictures == row.pictures:
        return row
    renamed = {kind.name: target.name for kind in foreign if target is not None}
    return replace(row, messages=messages, pictures=pictures, meta=_renamed(row, renamed))


def _uses(row: Row, kind: PerceptionKind) -> bool:
    said = any(kind.start in m.content for m in row.messages if m.role == "assistant")
    return said or bool(row.pictures.get(kind.tag))


def _target(
    row: Row, own: list[PerceptionKind], foreign: list[PerceptionKind], encoder: str | None
) -> PerceptionKind:
    if not own:
        raise RowError(
            "kinds",
            "a row needs a perception kind that the model does not have",
            where=row.where,
            got=", ".join(kind.name for kind in foreign),
            expected="a re-encoding kind in the model",
        )
    if encoder is None and len(own) > 1:
        raise UserError(
            "the model has several encoders: say which one rows are re-targeted to",
            got=", ".join(kind.name for kind in foreign),
            expected=", ".join(kind.name for kind in own),
            fix="name one: encoder=",
        )
    found = [kind for kind in own if encoder in (None, kind.name)]
    if not found:
        raise UserError(
            "unknown encoder", got=encoder, expected=", ".join(kind.name for kind in own)
        )
    return found[0]


def _rewritten(
    message: Message, kind: PerceptionKind, to: PerceptionKind, controls: int
) -> Message:
    if message.role == "user":
        return replace(message, content=message.content.replace(kind.tag, to.tag))
    assert kind.control is not None
    assert to.control is not None
    # Only whole calls: a torn one stays, and is told by the check.
    call = re.compile(f"{re.escape(kind.start)}(?:{re.escape(kind.control)})+{re.escape(kind.end)}")
    wanted = to.start + to.control * controls + to.end
    return replace(message, content=call.sub(lambda _: wanted, message.content))


def _renamed(row: Row, names: dict[str, str]) -> dict[str, object]:
    meta = dict(row.meta)
    if meta.get("kind") in names:
        meta["kind"] = names[meta["kind"]]
    if isinstance(meta.get("tools"), list):
        meta["tools"] = [names.get(name, name) for name in meta["tools"]]
    return meta
