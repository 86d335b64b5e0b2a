"""What is appended to a session, and what a run asks of the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vpt_agent.types import TokenSource, View

if TYPE_CHECKING:
    from vpt_agent.engine.ahead import Ask, Record
    from vpt_agent.engine.session import Session


@dataclass(frozen=True)
class Tokens:
    """Token ids [n]; ``source`` is recorded with them."""

    ids: Sequence[int]
    source: TokenSource = "given"


@dataclass(frozen=True)
class Visual:
    """Visual tokens [V, D] in the language model's width, standing for ``placeholder`` ids.

    ``grid`` (t, h, w) in patches gives them M-RoPE positions of a picture; None gives text
    positions (the position rule of the row).
    """

    placeholder: int
    features: Tensor
    grid: tuple[int, int, int] | None = None
    view: str | None = None
    kind: str | None = None
    call_id: str | None = None


@dataclass(frozen=True)
class Unconditioned:
    """Features f [V, D] of ``kind``, still to be conditioned with the session's control states.

    For prompts that already contain a call (a recorded round): the control tokens before this
    part, not used yet, give the condition.
    """

    placeholder: int
    features: Tensor
    kind: str
    view: str | None = None


Part = Tokens | Visual | Unconditioned
Logits = Literal["none", "last", "all"]


@dataclass
class Block:
    """One forward's worth of new tokens for one session.

    ``positions`` [3, n] on the CPU, ``ends`` the next position behind each token; ``visual`` are
    (offset, features [m, D]) that replace the embeddings of the ids there.
    """

    ids: list[int]
    positions: Tensor
    ends: list[int]
    visual: list[tuple[int, Tensor]] = field(default_factory=list)


def cut(blocks: Sequence[Block], start: int, stop: int) -> Block:
    """Tokens ``start`` to ``stop`` of the sequence that ``blocks`` are together."""
    ids: list[int] = []
    positions: list[Tensor] = []
    ends: list[int] = []
    visual: list[tuple[int, Tensor]] = []
    at = 0
    for block in blocks:
        low, high = max(start - at, 0), min(stop - at, len(block.ids))
        if low < high:
            for offset, tokens in block.visual:
                first, end = max(offset, low), min(offset + tokens.shape[0], high)
                if first < end:
                    whole = end - first == tokens.shape[0]
                    part = tokens if whole else tokens[first - offset : end - offset]
                    visual.append((len(ids) + first - low, part))
            ids += block.ids[low:high]
            ends += block.ends[low:high]
            positions.append(block.positions[:, low:high])
        at += len(block.ids)
    return Block(ids, torch.cat(positions, dim=1), ends, visual)


@dataclass(frozen=True)
class Feed:
    """Ask the loop to run ``block`` on ``session``.

    ``logits``: none, of the last position, or of ``all`` positions of the block. ``ahead`` lets
    the device choose what comes behind a block of one token.
    """

    session: Session
    block: Block
    logits: Logits = "last"
    ahead: Ask | None = None


@dataclass(frozen=True)
class Fed:
    """The answer: final-norm hidden states [n, D], and logits [m, vocab] in float32 or None.
    ``ahead`` is what the device chose behind the block, if it did: there are no logits then."""

    hidden: Tensor
    logits: Tensor | None
    ahead: Record | None = None


@dataclass(frozen=True)
class Look:
    """Ask the loop for the features of ``views`` under an encoder: ``base`` or a kind's name."""

    encoder: str
    views: tuple[View, ...]


def nothing() -> None:
    """What :class:`Wait` starts where the futures are on their way already."""


@dataclass(frozen=True)
class Wait:
    """Ask the loop to go on with other runs until all ``futures`` (tools on threads) are done.

    The loop calls ``start`` once every run of the step has said what it waits for, so that calls
    of one tool can go together; it may be called more than once.
    """

    futures: tuple[Future[Any], ...]
    start: Callable[[], None] = nothing


@dataclass(frozen=True)
class Looked:
    """Features of one view: tokens [V, D], the patch grid (base tower) and what was done.

    ``early`` seconds before it was asked for it was begun, and of its ``seconds`` nobody waited for
    ``hidden``; both 0 where it was begun when it was asked for.
    """

    view: View
    encoder: str
    tokens: Tensor
    grid: tuple[int, int, int] | None
    key: str
    reused: bool
    kernels: tuple[str, ...] = ()
    seconds: float = 0.0
    early: float = 0.0
    hidden: float = 0.0
