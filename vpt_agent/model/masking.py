"""Mask modelling of the release: paragraphs of the input are blanked in the scored pass.

The paper (section 3.4) describes an attention mask that lets the answer see only the control
token; the released code zeroes input embeddings instead, and that is what is reproduced here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vpt_agent.errors import UserError

_PARAGRAPHS = {0: (), 1: (1,), 2: (1, 3)}
"""``para_mask_id`` → numbers of the paragraphs it blanks (1 is the first user turn)."""


def zeroed_positions(
    ids: Tensor,
    *,
    rows: Sequence[int],
    spared: Sequence[tuple[int, int]],
    mask_id: int,
    ratio: float,
    start_id: int | None,
    end_id: int | None,
) -> Tensor | None:
    """Positions of ``ids`` [B, L] whose input embedding becomes zero: bool [B, L], or None.

    Paragraph p of a row lies strictly between its p-th ``start_id`` and its p-th ``end_id``. One
    draw from torch's CPU generator per paragraph number decides for all ``rows`` together, as
    published; rows may have different numbers of paragraphs. ``spared`` (row, position) are kept.
    """
    numbers = _PARAGRAPHS[mask_id]
    if not numbers or not rows:
        return None
    if start_id is None or end_id is None:
        raise UserError(
            "mask modelling needs the ids that begin and end a paragraph",
            where="VPTConfig.para_start_id, para_end_id",
            got=(start_id, end_id),
        )
    zeroed = torch.zeros(ids.shape, dtype=torch.bool)
    for number in numbers:
        if bool(torch.rand(1) < ratio):
            for row in rows:
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
