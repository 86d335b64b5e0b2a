"""Mask modelling: parts of the input that the scored pass does not see.

The paper (section 3.4) describes an attention mask that lets the answer see only the control
token; the released code zeroes input embeddings instead. Both are here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vpt_agent.errors import UserError

_PARAGRAPHS = {0: (), 1: (1,), 2: (1, 3)}
"""``para_mask_id`` → numbers of the paragraphs it blanks (1 is the first user turn)."""


@dataclass(frozen=True)
class MaskRule:
    """What is hidden, how, and for whom a draw decides; see ``para_mask_id`` of the config.

    ``how`` ``attention``: what follows a row's first control token, and that token, sees nothing
    of the turn that asked nor of what leads from there to the call; what it knows of them came
    through the control state. ``draw``: once for the batch, as published, or for each row.
    """

    mask_id: int = 0
    ratio: float = 1.0
    how: Literal["embeddings", "attention"] = "embeddings"
    draw: Literal["batch", "row"] = "batch"

    def __post_init__(self) -> None:
        if self.mask_id not in _PARAGRAPHS or not 0 <= self.ratio <= 1:
            raise UserError(
                "no such mask",
                where="MaskRule",
                got=f"mask_id {self.mask_id}, ratio {self.ratio}",
                expected="mask_id 0, 1 or 2, ratio 0 to 1",
            )
        if self.how == "attention" and self.mask_id == 2:
            raise UserError(
                "attention masks hide the question only",
                where="MaskRule",
                got="mask_id 2",
                expected="mask_id 0 or 1, or how='embeddings'",
            )


def hidden_stretches(
    ids: Tensor,
    *,
    first_controls: Mapping[int, int],
    rule: MaskRule,
    start_id: int | None,
    end_id: int | None,
) -> dict[int, tuple[int, int]]:
    """Keys (first, end) by row that its positions from ``end`` on do not see: attention masks.

    ``ids`` [B, L]; ``first_controls``: position of the first control token by row.
    """
    if not rule.mask_id or not first_controls:
        return {}
    start_id, _ = _checked_ids(start_id, end_id)
    hidden: dict[int, tuple[int, int]] = {}
    for row in _drawn(sorted(first_controls), rule.ratio, rule.draw):
        starts = (ids[row] == start_id).nonzero().flatten().tolist()
        if len(starts) > 1 and starts[1] + 1 < first_controls[row]:
            hidden[row] = (starts[1] + 1, first_controls[row])
    return hidden


def _drawn(rows: Sequence[int], ratio: float, draw: str) -> list[int]:
    """Those of ``rows`` that are masked this time, by torch's CPU generator."""
    if draw == "row":
        return [row for row in rows if bool(torch.rand(1) < ratio)]
    return list(rows) if bool(torch.rand(1) < ratio) else []


def _checked_ids(start_id: int | None, end_id: int | None) -> tuple[int, int]:
    if start_id is None or end_id is None:
        raise UserError(
            "mask modelling needs the ids that begin and end a paragraph",
            where="VPTConfig.para_start_id, para_end_id",
            got=(start_id, end_id),
        )
    return start_id, end_id


def zeroed_positions(
    ids: Tensor,
    *,
    rows: Sequence[int],
    spared: Sequence[tuple[int, int]],
    mask_id: int,
    ratio: float,
    start_id: int | None,
    end_id: int | None,
    draw: Literal["batch", "row"] = "batch",
) -> Tensor | None:
    """Positions of ``ids`` [B, L] whose input embedding becomes zero: bool [B, L], or None.

    Paragraph p of a row lies strictly between its p-th ``start_id`` and its p-th ``end_id``. One
    draw from torch's CPU generator per paragraph number decides for all ``rows`` together, as
    published, or, with ``draw`` ``row``, for each; rows may have different numbers of paragraphs.
    ``spared`` (row, position) are kept.
    """
    numbers = _PARAGRAPHS[mask_id]
    if not numbers or not rows:
        return None
    start_id, end_id = _checked_ids(start_id, end_id)
    zeroed = torch.zeros(ids.shape, dtype=torch.bool)
    for number in numbers:
        for row in _drawn(rows, ratio, draw):
            _blank(zeroed[row], ids[row].cpu(), number, start_id, end_id)
    for row, at in spared:
        zeroed[row, at] = False
    return zeroed.to(ids.device)


def _blank(zeroed: Tensor, ids: Tensor, number: int, start_id: int, end_id: int) -> None:
    starts = (ids == start_id).nonzero().flatten().tolist()
    ends = (ids == end_id).nonzero().flatten().tolist()
    if number < len(starts):
        end = ends[number] if number < len(ends) else len(ids)
        zeroed[starts[number] + 1 : end] = True
