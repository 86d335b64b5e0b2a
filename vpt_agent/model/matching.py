"""Which picture belongs where: placeholders, calls and re-encoded pictures of a batch, by row.

The release matched them by order over the whole batch, so a call without its picture gave another
row's picture to it (FACTS section 9, entries 7, 12 and 15). Here a run of placeholders takes the
next picture of its kind, must have exactly that picture's number of tokens, and belongs to the
call of its own row with the same number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vpt_agent.errors import UserError
from vpt_agent.model.positions import runs
from vpt_agent.tokens.table import ResolvedKind, ResolvedTable


@dataclass(frozen=True)
class Place:
    """A picture's place: row, first position and number of its placeholders.

    ``picture`` counts the pictures of ``kind`` over the batch; ``call`` is an index into
    :attr:`Plan.calls`, or None where the picture goes in unconditioned.
    """

    kind: str
    row: int
    first: int
    count: int
    picture: int
    call: int | None = None


@dataclass(frozen=True)
class Call:
    """A call of a re-encoding kind: its row and the positions of its k control tokens."""

    kind: str
    row: int
    controls: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """All calls (row by row, in order of position) and all re-encoded pictures of a batch."""

    calls: tuple[Call, ...] = ()
    places: tuple[Place, ...] = ()


def picture_places(
    input_ids: Tensor, placeholder: int, counts: Sequence[int], *, kind: str
) -> list[Place]:
    """Where the pictures with ``counts`` visual tokens go in ``input_ids`` [B, L].

    A number of runs that differs from the number of pictures, or a run of another length, is a
    :class:`UserError` that names the row.
    """
    found = [
        (row, first, length)
        for row in range(input_ids.shape[0])
        for first, length in runs(input_ids[row] == placeholder)
    ]
    if len(found) != len(counts):
        per_row = {row: sum(r == row for r, _, _ in found) for row in range(input_ids.shape[0])}
        raise UserError(
            "pictures and their places in the text differ in number",
            where=f"{kind} pictures",
            got=f"{len(counts)} pictures, {len(found)} places; places by row: {per_row}",
            fix="pass one picture for each run of placeholders, row by row",
        )
    places = []
    for index, ((row, first, length), count) in enumerate(zip(found, counts, strict=True)):
        if length != count:
            raise UserError(
                "a picture's visual tokens do not fill its placeholders",
                where=f"row {row}, position {first}, {kind} picture {index}",
                got=f"{length} placeholders, {count} visual tokens",
                fix="expand placeholders with the processor, and do not cut inside them",
            )
        places.append(Place(kind, row, first, length, index))
    return places


def find_calls(input_ids: Tensor, table: ResolvedTable) -> tuple[Call, ...]:
    """The calls of re-encoding kinds in ``input_ids`` [B, L], row by row, by position."""
    k = table.controls
    calls: list[Call] = []
    for row in range(input_ids.shape[0]):
        for kind in table.rows:
            if kind.control is None:
                continue
            at = (input_ids[row] == kind.control).nonzero().flatten().tolist()
            if at and at[0] == 0:
                raise UserError(
                    "a control token needs a token before it, whose hidden state it carries",
                    where=f"row {row}, position 0",
                )
            if len(at) % k:
                raise UserError(
                    "control tokens do not come in whole calls",
                    where=f"row {row}, kind {kind.name}",
                    got=f"{len(at)} control tokens",
                    expected=f"a multiple of {k}",
                )
            calls += [Call(kind.name, row, tuple(at[i : i + k])) for i in range(0, len(at), k)]
    return tuple(sorted(calls, key=lambda call: (call.row, call.controls[0])))


def make_plan(
    input_ids: Tensor,
    table: ResolvedTable,
    counts: Mapping[str, Sequence[int]],
    *,
    conditioned: bool,
) -> Plan:
    """Calls and pictures of ``input_ids`` [B, L]; ``counts`` are visual tokens by kind.

    With ``conditioned`` the j-th picture of a row goes with the row's j-th call of that kind and
    must come after it; a call without a picture is fine, a picture without a call is not. Without
    it (alignment) there are no calls.
    """
    calls = find_calls(input_ids, table) if conditioned else ()
    places: list[Place] = []
    for kind in table.rows:
        if kind.kind.payload == "control":
            found = picture_places(
                input_ids, kind.placeholder, counts.get(kind.name, ()), kind=kind.name
            )
            places += _with_calls(found, calls, kind) if conditioned else found
    places.sort(key=lambda place: (place.row, place.first))
    return Plan(calls, tuple(places))


def _with_calls(places: Sequence[Place], calls: Sequence[Call], kind: ResolvedKind) -> list[Place]:
    by_row: dict[int, list[int]] = {}
    for index, call in enumerate(calls):
        if call.kind == kind.name:
            by_row.setdefault(call.row, []).append(index)
    result = []
    for place in places:
        waiting = by_row.get(place.row, [])
        if not waiting:
            raise UserError(
                "a re-encoded picture has no call that asked for it",
                where=f"row {place.row}, position {place.first}, kind {kind.name}",
                got="more pictures than calls in this row",
                fix=f"put {kind.kind.start}{kind.kind.control}{kind.kind.end} before it, or use "
                "num_inner_forward_run=1 to pass pictures without control states",
            )
        index = waiting.pop(0)
        if calls[index].controls[-1] > place.first:
            raise UserError(
                "a re-encoded picture stands before the call that asks for it",
                where=f"row {place.row}, position {place.first}, kind {kind.name}",
                got=f"its call at position {calls[index].controls[0]}",
            )
        result.append(Place(place.kind, place.row, place.first, place.count, place.picture, index))
    return result
