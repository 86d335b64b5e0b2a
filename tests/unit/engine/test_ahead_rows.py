"""Many rows at once on the device, its ends and limits, and what it leaves to the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.engine.conftest import DEVICE, KINDS, Kit
from tests.unit.engine.test_ahead import GREEDY, assert_same, engine_of, rules, tell
from vpt_agent.engine.ahead import make_ahead
from vpt_agent.engine.core import Engine
from vpt_agent.engine.decode import TurnRules
from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.errors import UserError
from vpt_agent.model.onestep import pack_for_steps
from vpt_agent.model.testing import tiny_model
from vpt_agent.tokens.grammar import Grammar
from vpt_agent.vision.policy import ImagePolicy

MIX = [
    GREEDY,
    Sampling(1.0, seed=1),
    Sampling(0.8, top_k=30, seed=2),
    Sampling(1.2, top_p=0.9, seed=3),
]


def compare(kit: Kit, *runs: tuple[str, Sampling, TurnRules], **options: Any) -> Engine:
    """Runs together on the device, each alone on the host: all the same."""
    device = engine_of(kit, "device", **options)
    together = tell(device, kit, *runs)
    for ours, run in zip(together, runs, strict=True):
        (alone,) = tell(engine_of(kit, "host"), kit, run)
        assert_same(ours, alone)
    return device


def test_rows_that_differ_in_everything_go_together(kit: Kit) -> None:
    starts = {k: kit.engine.table[k].start for k in KINDS[1:]}
    runs = [
        (kind, MIX[i % 4], rules(kit, 3 + 5 * i, max_calls=i % 3, **(
            {"first": frozenset({starts[kind]})} if i % 2 and kind in starts else {}
        )))
        for i, kind in enumerate([*KINDS, *KINDS])
    ]  # fmt: skip
    device = compare(kit, *runs)
    assert max(device.counters.rows_per_forward) >= 8, "rows did share steps"
    assert device.ahead is not None
    assert device.ahead.counters.turns == len(runs)


def test_more_rows_than_one_batch_holds(one: Kit) -> None:
    runs = [("text", Sampling(1.0, seed=i), rules(one, 6)) for i in range(35)]
    device = compare(one, *runs)
    assert device.counters.rows_per_forward.count(32) >= 5


@pytest.mark.parametrize("count", range(1, 12))
def test_a_turn_ends_at_its_last_token(one: Kit, count: int) -> None:
    start = frozenset({one.engine.table["clip"].start})
    compare(
        one, ("clip", GREEDY, rules(one, count)), ("text", GREEDY, rules(one, count, first=start))
    )


def test_stop_ids_end_a_turn_wherever_they_stand(one: Kit) -> None:
    free = rules(one, 24)
    (told,) = tell(engine_of(one, "host"), one, ("text", MIX[1], free))
    said = [i for span in told[0].spans for i in span.ids]
    for at in (1, 2, 4, 5, 9, 17):
        end = said[at]
        compare(one, ("text", MIX[1], replace(free, end=end, stop=frozenset({end}))))
        compare(one, ("text", MIX[1], replace(free, end=-1, stop=frozenset({end}))))


@pytest.mark.parametrize("kind", ["clip", "region"])
def test_an_inline_call_ends_decoding(kit: Kit, kind: str) -> None:
    first = frozenset({kit.engine.table[kind].start})
    turn = rules(kit, 24, first=first, inline=frozenset({kind}))
    device = compare(kit, ("text", MIX[1], turn))
    assert device.ahead is not None
    assert device.ahead.counters.dropped == 0


def test_banned_ids_and_a_kind_that_is_not_offered(kit: Kit) -> None:
    table = kit.engine.table
    only = Grammar(table, kinds=["region"])
    words = frozenset(range(0, 200, 2))
    compare(
        kit,
        ("text", MIX[1], rules(kit, 20, grammar=only, banned=only.barred | words)),
        ("text", MIX[1], rules(kit, 20, banned=words)),
        ("text", MIX[0], rules(kit, 20, max_calls=0)),
    )


def test_a_small_budget_gives_the_same(one: Kit) -> None:
    """Rows lose their blocks to others and are computed anew, in the middle of their turns."""
    runs = [("clip", MIX[i % 4], rules(one, 40)) for i in range(4)]
    whole = compare(one, *runs)
    tight = compare(one, *runs, max_cached_tokens=16 * 16)
    assert whole.counters.repeated_tokens == 0
    assert tight.counters.repeated_tokens > 0


def test_a_deadline_throws_away_what_the_device_said_behind_it(one: Kit) -> None:
    heard: list[int] = []
    late = rules(
        one,
        on_token=lambda token, source: heard.append(token),
        expired=lambda: len(heard) >= 3,
    )
    device = engine_of(one, "device")
    ((turn, _, session),) = tell(device, one, ("text", MIX[1], late))
    assert (turn.stop, turn.count, len(heard)) == ("deadline", 3, 3)
    assert device.ahead is not None
    assert device.ahead.counters.dropped == 2  # four were asked for, two of them read
    assert device.cache.lengths[session.row] == len(session)
    heard.clear()
    ((host, _, other),) = tell(engine_of(one, "host"), one, ("text", MIX[1], late))
    assert host.spans == turn.spans
    assert session.ids[: len(other.ids)] == other.ids


def test_the_host_looks_seldom(one: Kit) -> None:
    run = ("text", MIX[1], rules(one, 65, end=-1, stop=frozenset(), max_calls=0))
    device, host = engine_of(one, "device"), engine_of(one, "host")
    tell(device, one, run)
    tell(host, one, run)
    assert host.counters.host_reads == 65
    # The first token, then batches of 4, 8, 16, 16, 16 and 4, at which it looks every 4 steps.
    assert device.ahead is not None
    assert device.ahead.counters.batches == 6
    assert device.ahead.counters.steps == 64
    assert device.counters.host_reads == 1 + 16


class _Changed:
    """An experiment that changes nothing."""

    name = "nothing"

    def control_embedding(self, kind: str, state: torch.Tensor) -> torch.Tensor:
        return state


def test_what_the_device_cannot_do_is_the_hosts_and_named(one: Kit) -> None:
    class Listless(Grammar):
        identity = None

    plain = rules(one, 9)
    table = one.engine.table
    for reason, changes in (
        ("unconstrained", {"constrained": False}),
        ("bans that depend on the text", {"ban": lambda state, full: frozenset({7})}),
        ("the grammar", {"grammar": Listless(table)}),
    ):
        device = compare(one, ("text", MIX[1], replace(plain, **changes)))
        assert device.ahead is not None
        assert device.ahead.counters.fallbacks == {reason: 1}
        assert device.ahead.counters.turns == 0
    device = engine_of(one, "device")
    session = device.session()
    session.intervention = _Changed()  # type: ignore[assignment]
    assert device.ahead is not None
    assert device.ahead.program_of(plain, session) is None
    assert device.ahead.counters.fallbacks == {"an experiment": 1}


@pytest.mark.skipif(DEVICE != "cpu", reason="a recorded step calls no model that breaks later")
def test_logits_that_are_no_numbers_are_the_hosts_to_say(
    one: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = engine_of(one, "device")
    real, calls = one.model.compute_logits, []

    def broken(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        logits = real(hidden)
        return logits if len(calls) < 5 else logits * float("nan")

    monkeypatch.setattr(one.model, "compute_logits", broken)
    with pytest.raises(UserError, match="its logits are NaN"):
        tell(device, one, ("text", MIX[1], rules(one)))
    assert device.ahead is not None
    assert device.ahead.counters.fallbacks == {"no numbers": 1}


def test_too_little_memory_is_the_hosts(one: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    device = engine_of(one, "device")
    assert device.ahead is not None

    def none_left(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(device.ahead, "_said", none_left)
    (ours,) = tell(device, one, ("text", MIX[1], rules(one, 9)))
    (alone,) = tell(engine_of(one, "host"), one, ("text", MIX[1], rules(one, 9)))
    assert_same(ours, alone)
    assert device.ahead.counters.fallbacks == {"memory": 8}


@pytest.mark.parametrize("base", ["qwen2_5_vl", "qwen3_vl"])
def test_other_bases(base: str) -> None:
    """Also those whose passes transformers' own classes make."""
    model, processor = tiny_model(("clip",), base=base, seed=2)
    policy = ImagePolicy(kind="fit", longest=84, crop_longest=56)
    kit = Kit(model, processor.tokenizer, Engine(model, policy), policy)
    start = frozenset({kit.engine.table["clip"].start})
    compare(kit, ("text", MIX[1], rules(kit, 20, first=start)), ("text", GREEDY, rules(kit, 9)))


def test_half_types_decode_well_formed_calls() -> None:
    """In bfloat16 passes over one token and over several round otherwise, so tokens may differ."""
    model, processor = tiny_model(("clip",), seed=3)
    policy = ImagePolicy(kind="fit", longest=84, crop_longest=56)
    kit = Kit(model.to(torch.bfloat16), processor.tokenizer, Engine(model, policy), policy)
    runs = [
        (
            "text",
            Sampling(1.0, seed=i),
            rules(kit, 12, first=frozenset({kit.engine.table[k].start})),
        )
        for i, k in enumerate(["clip", "region"] * 4)
    ]
    told = tell(engine_of(kit, "device"), kit, *runs)
    assert all(turn.calls for turn, _, _ in told)
    hosts = tell(engine_of(kit, "host"), kit, *runs)
    first = [(a[0].spans[0].ids, b[0].spans[0].ids) for a, b in zip(told, hosts, strict=True)]
    assert all(ours == theirs for ours, theirs in first), "the forced starts"


def test_random_numbers_do_not_depend_on_how_many_are_asked_for() -> None:
    one, other = (Sampler(Sampling(1.0, seed=9)) for _ in range(2))
    ahead = one.ahead(5)
    assert [one.take() for _ in range(2)] == ahead[:2]
    assert one.ahead(4)[:3] == ahead[2:]
    assert [other.take() for _ in range(6)] == [*ahead[:2], *one.ahead(4)]
    assert all(0 <= x < 1 for x in ahead)


def test_a_way_of_decoding_that_there_is_not(one: Kit) -> None:
    with pytest.raises(UserError, match="unknown way of decoding"):
        engine_of(one, "gpu")

    class Elsewhere:
        device = torch.device("mps")

    with pytest.raises(UserError, match="this kind of device cannot choose tokens"):
        make_ahead(Elsewhere(), "device")  # type: ignore[arg-type]
    assert make_ahead(Elsewhere(), "auto") is None  # type: ignore[arg-type]
    assert (one.engine.ahead is None) == (DEVICE == "cpu"), "a CPU's host decodes unless asked"


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_the_step_is_one_graph_for_torch_compile(
    one: Kit, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in it needs Python between two operators: torch's tracer takes it whole. What its
    compiler makes of it is left out here, since that takes a minute."""
    made: list[dict[str, object]] = []
    real = torch.compile

    def traced(step: Any, **options: Any) -> Any:
        made.append(options)
        return real(step, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    runs = [("clip", MIX[2], rules(one, 12)), ("text", GREEDY, rules(one, 7))]
    if packed:
        assert pack_for_steps(one.model)
    told = tell(engine_of(one, "compiled-device"), one, *runs)
    with torch.no_grad():
        one.model.direct_decoder().packed.clear()
    for ours, run in zip(told, runs, strict=True):
        (alone,) = tell(engine_of(one, "host"), one, run)
        assert_same(ours, alone)
    assert made
    assert all(options == {"fullgraph": True, "dynamic": False} for options in made)


def test_layers_as_a_gpu_computes_them_choose_the_same(kit: Kit) -> None:
    """Weights that lie together, attention over the slots where they lie: here on a CPU."""
    starts = {k: kit.engine.table[k].start for k in KINDS[1:]}
    runs = [
        (kind, MIX[i % 4], rules(kit, 24, first=frozenset({starts[kind]})))
        for i, kind in enumerate(KINDS[1:])
    ]
    assert pack_for_steps(kit.model)
    try:
        device = compare(kit, *runs)
    finally:
        with torch.no_grad():
            kit.model.direct_decoder().packed.clear()
    assert device.ahead is not None
    assert device.ahead.counters.tokens > 40
