"""One token of the only row that asks for anything: most steps of a single answer.

There is nothing to plan, to share or to lay out then, and every line between two passes of the
model runs with caches that the weights have emptied. What is not that simple goes the ordinary way
(:meth:`vpt_agent.engine.core.Engine.step`), which computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from vpt_agent.engine.parts import Block, Fed
from vpt_agent.errors import UserError

if TYPE_CHECKING:
    from vpt_agent.engine.core import Engine
    from vpt_agent.engine.live import Live


def token_block(token: int, position: int) -> Block:
    """The block of one word at ``position``."""
    return Block([token], torch.full((3, 1), position), [position + 1])


def alone(engine: Engine, feeding: Sequence[Live]) -> Fed | None:
    """What the only run of ``feeding`` is told; None if this step is not that simple, or failed:
    the ordinary way then says why. Called under the engine's lock, in inference mode."""
    if len(feeding) != 1:
        return None
    feed = feeding[0].feed
    session, block, cache = feed.session, feed.block, engine.cache
    row, past = session.row, len(session.ids)
    if len(block.ids) != 1 or block.visual or feed.logits != "last" or feed.ahead is not None:
        return None
    if session.closed or not 0 < past < engine.max_positions or not feeding[0].fresh:
        return None
    if cache.lengths[row] != past or cache.needed(row, 1) > cache.free:
        return None
    model, device = engine.model, engine.device
    try:
        # Filled and viewed, since lists and indexes are read slowly by comparison.
        embeds = model.get_input_embeddings()(torch.full((1, 1), block.ids[0], device=device))
        cache.begin_token(row)
        places = block.positions.view(3, 1, 1).to(device)
        hidden = model.run_language_model(embeds, places, None, cache).squeeze(0)  # [1, D]
        logits = model.compute_logits(hidden).float()
    except (UserError, torch.OutOfMemoryError):
        return None
    cache.commit((row,), (1,))
    count = engine.counters
    count.forwards += 1
    count.tokens += 1
    count.padded_tokens += 1
    count.rows_per_forward.append(1)
    session.touched = count.forwards
    session.advance(block, hidden, computed=1, calls=1)
    return Fed(hidden, logits)
