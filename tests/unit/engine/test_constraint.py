"""Decoding inside a call: always well formed, with the cost of the constraint recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.unit.engine.conftest import Kit
from vpt_agent.engine.decode import TurnRules, decode_turn
from vpt_agent.engine.parts import Tokens
from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.tokens.grammar import Grammar

CALLS = 1000


def rules(kit: Kit, kind: str, **changes: object) -> TurnRules:
    table = kit.engine.table
    return replace(
        TurnRules(
            grammar=Grammar(table),
            end=kit.ids("<|im_end|>")[0],
            stop=frozenset(kit.ids("<|im_end|>")),
            starts=frozenset(r.start for r in table.rows),
            first=frozenset({table[kind].start}),
            max_new_tokens=7,  # the call, and one more, before which the forced end is priced
            max_calls=1,
        ),
        **changes,
    )


def turns(kit: Kit, kind: str, count: int, **changes: object) -> list:
    """``count`` first turns after one prompt, computed once and forked; sampled, seeds 0.."""
    engine = kit.fresh()
    base = engine.session()
    logits = base.append(kit.conversation("text"))[-1]
    done = []
    for first in range(0, count, 50):
        sessions = [base.fork() for _ in range(min(50, count - first))]
        done += engine.drive(
            [
                decode_turn(
                    s,
                    logits,
                    Sampler(Sampling(temperature=1.0, seed=first + i)),
                    rules(kit, kind, **changes),
                )
                for i, s in enumerate(sessions)
            ]
        )
        for session in sessions:
            session.close()
    return done


@pytest.mark.slow
def test_forced_region_calls_are_always_valid(one: Kit, figures: Callable[..., None]) -> None:
    done = turns(one, "region", CALLS)
    regions = [c.parsed.arguments["region"] for turn in done for c in turn.calls]
    assert len(regions) == CALLS
    grid = one.engine.table["region"].kind.grid
    for x0, y0, x1, y1 in regions:
        assert 0 <= x0 <= x1 < grid
        assert 0 <= y0 <= y1 < grid
    assert len({tuple(r) for r in regions}) > 100, "random weights choose many regions"
    free = turns(one, "region", 200, constrained=False, max_new_tokens=12)
    invalid = sum(not turn.calls for turn in free) / len(free)
    mass = [m for turn in done for m in turn.removed[1:6]]
    removed = sum(mass) / len(mass)
    figures(
        "region calls on random weights",
        forced=CALLS,
        valid=len(regions),
        unconstrained_invalid_share=invalid,
        mean_mass_removed=removed,
    )
    assert all(0 <= m <= 1 for m in mass)
    assert removed > 0.5
    assert invalid > 0.5


@pytest.mark.parametrize("kind", ["clip", "dino", "sam"])
def test_a_control_call_needs_one_choice_only(kit: Kit, kind: str) -> None:
    (turn,) = turns(kit, kind, 1, max_new_tokens=2 + kit.engine.controls)
    (call,) = turn.calls
    row = kit.engine.table[kind]
    assert call.parsed.tokens == (row.start, *[row.control] * kit.engine.controls, row.end)
    assert call.control.shape == (
        kit.engine.controls,
        kit.model.config.get_text_config().hidden_size,
    )
    assert call.forced_start
    assert [s.source for s in turn.spans] == ["forced"]


def test_control_state_is_the_hidden_state_before_the_control_token(one: Kit) -> None:
    engine = one.fresh()
    session = engine.session()
    logits = session.append(one.conversation("text"))[-1]
    twin = session.fork()
    (turn,) = engine.drive([decode_turn(session, logits, Sampler(Sampling()), rules(one, "clip"))])
    twin.append([Tokens([engine.table["clip"].start])])
    import torch

    torch.testing.assert_close(turn.calls[0].control[0], twin.hidden, atol=1e-5, rtol=0)


def test_same_seed_same_tokens_and_another_seed_others(one: Kit) -> None:
    free = {"first": None, "max_new_tokens": 20}
    first, second = (turns(one, "region", 3, **free) for _ in range(2))
    ids = [[i for s in t.spans for i in s.ids] for t in first]
    assert ids == [[i for s in t.spans for i in s.ids] for t in second]
    assert ids[0] != ids[1]


def test_banned_starts_leave_no_calls(one: Kit) -> None:
    starts = frozenset(r.start for r in one.engine.table.rows)
    for turn in turns(one, "region", 20, first=None, banned=starts, max_new_tokens=30):
        assert not starts & {i for s in turn.spans for i in s.ids}
