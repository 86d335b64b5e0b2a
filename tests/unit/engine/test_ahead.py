"""Tokens chosen on the device, several at once, are those that the host would have chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.engine.conftest import KINDS, Kit
from vpt_agent.engine.core import Engine
from vpt_agent.engine.decode import TurnRules, decode_turn
from vpt_agent.engine.parts import Tokens
from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.engine.session import Session
from vpt_agent.tokens.grammar import Grammar

GREEDY = Sampling()
SAMPLINGS = [
    GREEDY,
    Sampling(1.0, seed=3),
    Sampling(0.7, top_k=20, seed=4),
    Sampling(1.3, top_p=0.9, seed=5),
    Sampling(1.0, top_k=50, top_p=0.8, seed=6),
]


def engine_of(kit: Kit, decoding: str, **options: Any) -> Engine:
    return Engine(kit.model, kit.policy, decoding=decoding, **options)


def rules(kit: Kit, count: int = 24, **changes: Any) -> TurnRules:
    table = kit.engine.table
    plain = TurnRules(
        grammar=Grammar(table),
        end=kit.ids("<|im_end|>")[0],
        stop=frozenset(kit.ids("<|im_end|>")),
        starts=frozenset(r.start for r in table.rows),
        max_new_tokens=count,
        max_calls=9,
    )
    return replace(plain, **changes)


def story(
    session: Session, kit: Kit, kind: str, sampling: Sampling, turn_rules: TurnRules
) -> Iterator[Any]:
    fed = yield from session.feed(kit.conversation(kind))
    turn = yield from decode_turn(session, fed[-1].logits[-1], Sampler(sampling), turn_rules)
    tail = turn.pending or kit.ids(".")
    fed = yield from session.feed([Tokens(tuple(tail))])
    return turn, fed[-1].logits[-1]


def tell(engine: Engine, kit: Kit, *runs: tuple[str, Sampling, TurnRules]) -> list[Any]:
    sessions = [engine.session() for _ in runs]
    told = engine.drive([story(s, kit, *run) for s, run in zip(sessions, runs, strict=True)])
    return [(*one, session) for one, session in zip(told, sessions, strict=True)]


def assert_same(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    """Turn, logits behind it and session: from the device and from the host."""
    (turn, logits, session), (host, expected, other) = ours, theirs
    assert [(s.source, s.ids) for s in turn.spans] == [(s.source, s.ids) for s in host.spans]
    assert (turn.stop, turn.stop_id, turn.text) == (host.stop, host.stop_id, host.text)
    # The host may keep forced tokens to compute them together; the device computes each.
    assert turn.pending == host.pending[len(host.pending) - len(turn.pending) :]
    for span, wanted in zip(turn.spans, host.spans, strict=True):
        assert span.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    known = [i for i, mass in enumerate(host.removed) if mass >= 0]
    assert [turn.removed[i] for i in known] == pytest.approx(
        [host.removed[i] for i in known], abs=1e-5
    )
    assert turn.drawn == pytest.approx(host.drawn, abs=1e-4)
    assert [type(i) for i in turn.items] == [type(i) for i in host.items]
    for call, wanted in zip(turn.calls, host.calls, strict=True):
        assert (call.parsed, call.forced_start) == (wanted.parsed, wanted.forced_start)
        assert (call.control is None) == (wanted.control is None)
        if call.control is not None:
            torch.testing.assert_close(call.control, wanted.control, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert session.ids == other.ids
    assert session.positions == other.positions
    if session.engine.cache.max_tokens is None:
        assert session.engine.cache.lengths[session.row] == len(session)
        assert session.forward_tokens + session.shared_tokens == other.forward_tokens


@pytest.mark.parametrize(
    "sampling", SAMPLINGS, ids=lambda s: f"{s.temperature}-{s.top_k}-{s.top_p}"
)
def test_a_turn_is_the_same_on_both_ways(kit: Kit, sampling: Sampling) -> None:
    for kind in KINDS:
        run = (kind, sampling, rules(kit))
        device, host = engine_of(kit, "device"), engine_of(kit, "host")
        (ours,), (theirs,) = tell(device, kit, run), tell(host, kit, run)
        assert_same(ours, theirs)
        assert ours[0].ahead == ours[0].count - 1, "all but the first were chosen on the device"
        assert theirs[0].ahead == 0


@pytest.mark.parametrize("kind", ["region", "clip", "dino", "sam"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, seed=1)], ids=["greedy", "sampled"])
def test_calls_of_every_kind(kit: Kit, kind: str, sampling: Sampling) -> None:
    """One call is asked for, and more may follow: the model says them more often than it would."""
    start = kit.engine.table[kind].start
    run = ("text", sampling, rules(kit, 20, first=frozenset({start})))
    device, host = engine_of(kit, "device"), engine_of(kit, "host")
    (ours,), (theirs,) = tell(device, kit, run), tell(host, kit, run)
    assert ours[0].calls, "a call was made"
    assert_same(ours, theirs)
