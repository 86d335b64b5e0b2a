"""A session: one row of the KV pool, everything that was said in it, and where it stands.

Nothing is computed twice: appending computes the new tokens only. A control token's input
embedding is the final-norm hidden state at the position before it (paper section 3.3; FACTS: the
"prompt"), which the session has at hand, so no second pass is needed. Later control tokens see
earlier conditioned ones: the ``causal`` rule.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vpt_agent.engine.alone import token_block
from vpt_agent.engine.intervention import Intervention
from vpt_agent.engine.parts import (
    Block,
    Fed,
    Feed,
    Logits,
    Part,
    Tokens,
    Unconditioned,
    Visual,
    cut,
)
from vpt_agent.errors import InternalError, UserError
from vpt_agent.model.positions import span_positions
from vpt_agent.types import Span

if TYPE_CHECKING:
    from vpt_agent.engine.ahead import Ask
    from vpt_agent.engine.core import Engine


@dataclass
class Control:
    """A control state [D] that a control token left.

    ``used`` is None until a call or a feature block takes it; then the session length below which
    a truncation undoes that.
    """

    token: int
    state: Tensor
    used: int | None = None


@dataclass(frozen=True)
class Mark:
    """Where a session stood: what :meth:`Session.rewind` goes back to."""

    length: int
    hidden: Tensor | None


class Session:
    """Append, decode, fork, truncate. Get one from :meth:`Engine.session`."""

    def __init__(self, engine: Engine, row: int) -> None:
        self.engine, self.row = engine, row
        self.ids: list[int] = []
        self.positions: list[int] = []  # next position after each token: for truncate
        self.next_position = 0
        self.hidden: Tensor | None = None  # [D] final-norm state at the last position
        self.controls: list[Control] = []
        self.blocks: list[Block] = []  # what was appended: to compute it again, if it must be
        self.expected = 0  # length it may reach, as far as anybody said
        self.touched = 0  # when it was last used
        self.forward_tokens = 0
        self.forward_calls = 0
        self.shared_tokens = 0  # not computed for it: another session had them
        self.intervention: Intervention | None = None  # an experiment's; None changes nothing
        self._finalizer = weakref.finalize(self, engine.cache.release, row)

    def __len__(self) -> int:
        return len(self.ids)

    def close(self) -> None:
        """Give the row back; the session cannot be used afterwards."""
        self._finalizer()

    @property
    def closed(self) -> bool:
        """Whether its row was given back."""
        return not self._finalizer.alive

    def check_open(self) -> None:
        """Raise :class:`UserError` if the session was closed: its row may be another's now."""
        if self.closed:
            raise UserError(
                "this session is closed", where="Session", fix="get a new one: Engine.session()"
            )

    def fork(self) -> Session:
        """A second session with the same past: computed once, copied."""
        self.check_open()
        with self.engine.lock:
            other = self.engine.session()
            self.engine.cache.copy_row(self.row, other.row)
        other.ids, other.positions = list(self.ids), list(self.positions)
        other.blocks = list(self.blocks)
        other.next_position, other.hidden = self.next_position, self.hidden
        other.controls = [Control(c.token, c.state, c.used) for c in self.controls]
        other.intervention = self.intervention
        return other

    def truncate(self, length: int) -> None:
        """Forget everything from token ``length`` on.

        The hidden state there is gone, so at least one token must be appended before decoding,
        and that token cannot be a control token.
        """
        if length == len(self.ids):
            return
        self.check_open()
        if not 0 <= length <= len(self.ids):
            raise UserError(
                "cannot truncate a session to a length it never had",
                got=length,
                expected=f"0 to {len(self.ids)}",
            )
        with self.engine.lock:
            cache = self.engine.cache
            # Less may be there: other runs may have needed the room.
            cache.truncate(self.row, min(length, cache.lengths[self.row]))
            self.blocks = [cut(self.blocks, 0, length)] if length else []
        dropped = self.ids[length:]
        lost = sum(1 for i in dropped if i in self.engine.control_ids)
        if lost:
            self.controls = self.controls[:-lost]
        for control in self.controls:
            if control.used is not None and control.used > length:
                control.used = None
        del self.ids[length:], self.positions[length:]
        self.next_position = self.positions[-1] if self.positions else 0
        self.hidden = None

    def mark(self) -> Mark:
        """Where the session stands now."""
        return Mark(len(self.ids), self.hidden)

    def rewind(self, mark: Mark) -> None:
        """Go back to ``mark``, taken earlier in this session: as :meth:`truncate`, with the
        hidden state there."""
        self.truncate(mark.length)
        self.hidden = mark.hidden

    # --- appending ------------------------------------------------------------------------

    def feed(
        self, parts: Sequence[Part], *, logits: Logits = "last", ahead: Ask | None = None
    ) -> Generator[Feed, Fed, list[Fed]]:
        """Append ``parts``; yields what the loop must run and returns every answer.

        A block is cut in front of each control token whose state is not known yet, since that
        token's embedding is the hidden state of the token before it. ``ahead`` goes with the last
        block.
        """
        if len(parts) == 1 and isinstance(words := parts[0], Tokens) and len(words.ids) == 1:
            token = words.ids[0]
            if token not in self.engine.control_ids:  # a decoded word: nothing to lay out
                return [(yield Feed(self, token_block(token, self.next_position), logits, ahead))]
        done: list[Fed] = []
        block = _Builder(self.next_position)
        for part in parts:
            if isinstance(part, Tokens):
                for token in part.ids:
                    if token in self.engine.control_ids:
                        if block.ids:
                            wanted: Logits = "none" if logits == "last" else logits
                            done.append((yield from self._run(block, wanted)))
                            block = _Builder(self.next_position)
                        self._add_control(block, token)
                    else:
                        block.token(token)
                continue
            if isinstance(part, Unconditioned):
                part = self._condition(part, len(self.ids) + len(block.ids))
            block.visual(part)
        if block.ids:
            done.append((yield from self._run(block, logits, ahead)))
        if not done:
            raise UserError(
                "nothing to append", where="Session.feed", expected="at least one token"
            )
        return done

    def _run(
        self, block: _Builder, logits: Logits, ahead: Ask | None = None
    ) -> Generator[Feed, Fed, Fed]:
        return (yield Feed(self, block.done(), logits, ahead))

    def follow(self, token: int, hidden: Tensor) -> None:
        """Append ``token``, which the device has computed already: ``hidden`` [1, D] is its final-
        norm state, and its keys and values are in the cache."""
        steps = self.feed([Tokens((token,))])
        feed = next(steps)
        self.advance(feed.block, hidden, computed=1, calls=1)
        try:
            steps.send(Fed(hidden, None))
        except StopIteration:
            return
        raise InternalError("one token asked for two passes", where="Session.follow")

    def _add_control(self, block: _Builder, token: int) -> None:
        """The control token with its state as input embedding, or what an experiment says."""
        state: Tensor | None = self._take_control(token)
        if self.intervention is not None and state is not None:
            kind = next(r.name for r in self.engine.table.rows if r.control == token)
            state = self.intervention.control_embedding(kind, state)
        if state is None:
            block.token(token)
        else:
            block.control(token, state)

    def _take_control(self, token: int) -> Tensor:
        if self.hidden is None:
            raise UserError(
                "a control token needs the hidden state of the token before it",
                where="Session.feed",
                got=f"control token {token} at position {len(self.ids)}",
                fix="append at least one other token first",
            )
        # A copy: the state is a row of its whole block, which would be kept alive with it.
        self.controls.append(Control(token, self.hidden.clone()))
        return self.controls[-1].state

    def _condition(self, part: Unconditioned, start: int) -> Visual:
        """``part`` conditioned with the oldest control states that nothing used yet; its visual
        tokens will stand from ``start`` on."""
        needed = self.engine.kind_of(part.kind).control
        pending = [c for c in self.controls if c.used is None and c.token == needed]
        used = pending[: self.engine.controls]
        if len(used) < self.engine.controls:
            raise UserError(
                "features wait for a control state that the prompt does not give",
                where=part.kind,
                got=f"{len(used)} control tokens before it",
                expected=f"{self.engine.controls}",
                fix="put the call's tokens in front of the result's picture",
            )
        for control in used:
            control.used = start + 1
        states = torch.stack([c.state for c in used])  # [k, D]
        tokens = self.condition(part.kind, part.features, states)  # [V, D]
        return Visual(part.placeholder, tokens, None, part.view, part.kind)

    def condition(self, kind: str, features: Tensor, control: Tensor) -> Tensor:
        """Features f [V, D] conditioned with control states [k, D], by the model or as an
        experiment says."""
        plain = self.engine.model.condition
        if self.intervention is None:
            return plain(kind, features, control)
        return self.intervention.condition(kind, features, control, plain)

    def changed(self, parts: list[Part]) -> list[Part]:
        """The ``parts`` of a result, as they are or as an experiment wants them."""
        change = self.intervention
        if change is None:
            return parts
        embed = self.engine.model.get_input_embeddings()

        def empty(token: int) -> Tensor:
            return embed(torch.tensor([[token]], device=self.engine.device))[0, 0]

        kept = [change.visual(p, empty) if isinstance(p, Visual) else p for p in parts]
        return [p for p in kept if p is not None]

    def advance(self, block: Block, hidden: Tensor, *, computed: int, calls: int) -> None:
        """Called by the loop when ``block`` has been computed; ``hidden`` [n, D] is that of its
        last tokens. ``computed`` tokens went through the model for it, in ``calls`` passes."""
        self.blocks.append(block)
        self.ids += block.ids
        self.positions += block.ends
        self.next_position = block.ends[-1]
        self.hidden = hidden[-1]
        self.forward_tokens += computed
        self.forward_calls += calls

    # --- without a loop -------------------------------------------------------------------

    def append(self, parts: Sequence[Part], *, logits: Logits = "last") -> Tensor:
        """Append at once; returns the logits asked for: [1, vocab], or [n, vocab] for ``all``."""
        done = self.engine.drive([self.feed(parts, logits=logits)])[0]
        found = [f.logits for f in done if f.logits is not None]
        return torch.cat(found)

    def take_controls(self, token: int) -> Tensor:
        """The control states [k, D] of the call that was decoded last, with control token
        ``token``. Control tokens that stood outside calls before it are passed over."""
        own = [c for c in self.controls if c.used is None and c.token == token]
        own = own[-self.engine.controls :]
        for control in own:
            control.used = len(self.ids)
        return torch.stack([c.state for c in own])


class _Builder:
    """Collects ids, positions and visual tokens of one block."""

    def __init__(self, start: int) -> None:
        self.next = start
        self.ids: list[int] = []
        self._positions: list[Tensor] = []
        self._ends: list[int] = []
        self._visual: list[tuple[int, Tensor]] = []
        self._run = 0  # text tokens not yet turned into positions

    def token(self, token: int) -> None:
        self.ids.append(token)
        self._run += 1

    def control(self, token: int, state: Tensor) -> None:
        self._visual.append((len(self.ids), state[None]))
        self.token(token)

    def visual(self, part: Visual) -> None:
        count = part.features.shape[0]
        self._visual.append((len(self.ids), part.features))
        self.ids += [part.placeholder] * count
        if part.grid is None:
            self._run += count
            return
        self._flush()
        self._add(part.grid, count)

    def _flush(self) -> None:
        if self._run:
            self._add(None, self._run)
            self._run = 0

    def _add(self, grid: tuple[int, int, int] | None, count: int) -> None:
        start = self.next
        positions, self.next = span_positions(start, grid, count)
        self._positions.append(positions)
        if grid is None:
            self._ends += range(start + 1, self.next + 1)
        else:
            self._ends += (torch.cummax(positions.amax(0), 0).values + 1).tolist()

    def done(self) -> Block:
        self._flush()
        positions = self._positions
        joined = positions[0] if len(positions) == 1 else torch.cat(positions, dim=1)
        return Block(self.ids, joined, self._ends, self._visual)


def spans_of(parts: Sequence[Part]) -> tuple[Span, ...]:
    """How ``parts`` are recorded."""
    spans = []
    for part in parts:
        if isinstance(part, Tokens):
            spans.append(Span(part.source, tuple(part.ids)))
        else:
            ids = (part.placeholder,) * part.features.shape[0]
            call = part.call_id if isinstance(part, Visual) else None
            spans.append(Span("visual", ids, part.view, part.kind, call))
    return tuple(spans)
