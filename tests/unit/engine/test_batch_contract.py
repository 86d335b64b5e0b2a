"""Contract X3: a batch of N equals N single runs, rows at different stages included."""

from __future__ import annotations

import torch

from tests.unit.engine.conftest import KINDS, Kit
from vpt_agent.engine.core import Engine
from vpt_agent.engine.decode import TurnRules, decode_turn
from vpt_agent.engine.parts import Part
from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.engine.session import Session
from vpt_agent.tokens.grammar import Grammar


def rules(kit: Kit, count: int) -> TurnRules:
    table = kit.engine.table
    return TurnRules(
        grammar=Grammar(table),
        end=-1,  # nothing stops it: every row decodes exactly ``count`` tokens
        stop=frozenset(),
        starts=frozenset(r.start for r in table.rows),
        max_new_tokens=count,
        max_calls=9,
    )


def story(session: Session, kit: Kit, parts: list[Part], seed: int, count: int):
    """Prefill in two steps, decode ``count`` tokens with a seed: a run of its own length."""
    yield from session.feed(parts[:1])
    fed = yield from session.feed(parts[1:])
    logits = fed[-1].logits[-1]
    sampler = Sampler(Sampling(temperature=1.0, seed=seed))
    turn = yield from decode_turn(session, logits, sampler, rules(kit, count))
    return logits, [i for span in turn.spans for i in span.ids]


def runs(kit: Kit, engine: Engine) -> list:
    return [
        story(engine.session(), kit, kit.conversation(kind, seed), 7 + seed, 5 + 3 * seed)
        for seed, kind in enumerate(KINDS)
    ]


def test_mixed_batch_equals_single_runs(kit: Kit) -> None:
    single = [kit.fresh().drive([run])[0] for run in runs(kit, kit.fresh())[:0]]
    for seed, kind in enumerate(KINDS):
        engine = kit.fresh()
        run = story(engine.session(), kit, kit.conversation(kind, seed), 7 + seed, 5 + 3 * seed)
        single.append(engine.drive([run])[0])
    engine = kit.fresh()
    together = engine.drive(runs(kit, engine))
    for (one_logits, one_ids), (logits, ids) in zip(single, together, strict=True):
        torch.testing.assert_close(logits, one_logits, atol=1e-4, rtol=0)
        assert ids == one_ids
    assert max(engine.counters.rows_per_forward) >= 4, "rows did share forwards"


def test_rows_may_leave_and_join(one: Kit) -> None:
    """A row freed in the middle is used again, and its old content does no harm."""
    engine = one.fresh()
    keep = [engine.session() for _ in range(3)]
    parts = [one.conversation(k, 1) for k in ("clip", "text", "region")]
    engine.drive([s.feed(p) for s, p in zip(keep, parts, strict=True)])
    row = keep[1].row
    keep[1].close()
    late = engine.session()
    assert late.row == row
    from vpt_agent.engine.parts import Tokens

    tail = [Tokens(one.ids(" more of it"))]
    results = engine.drive(
        [keep[0].feed(tail), keep[2].feed(tail), late.feed(one.conversation("dino", 2))]
    )
    for session_parts, got in zip(
        (parts[0] + tail, parts[2] + tail, one.conversation("dino", 2)), results, strict=True
    ):
        alone = one.fresh().session()
        torch.testing.assert_close(
            got[-1].logits[-1], alone.append(session_parts)[-1], atol=1e-4, rtol=0
        )
