"""What the measurements share: order, medians, nested clocks, the machine."""

from __future__ import annotations

import pytest
import torch

from vpt_agent.bench import overlap
from vpt_agent.bench.answer import Loaded
from vpt_agent.bench.clock import Clock
from vpt_agent.bench.kernels import bench_kernels
from vpt_agent.bench.limits import Costs, products_seconds
from vpt_agent.bench.machine import describe, measure_rates, threads
from vpt_agent.bench.overlap import Overlap, bench_overlap
from vpt_agent.bench.start import _run, bench_import
from vpt_agent.bench.throughput import PARTS, Crowd, bench_throughput
from vpt_agent.bench.timing import Sample, Spread, in_turn, ratios, spreads, timer_for
from vpt_agent.errors import InternalError, UserError
from vpt_agent.model.testing import tiny_model

CPU = torch.device("cpu")


def test_procedures_go_in_turn_and_the_first_rounds_do_not_count() -> None:
    order: list[str] = []
    found = in_turn(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, warmup=1
    )
    assert order in (list("abbaab"), list("baabba"))
    assert {name: len(own) for name, own in found.items()} == {"a": 2, "b": 2}
    with pytest.raises(UserError, match=r"needs a repeat.*got: 0"):
        in_turn({}, repeats=0)


def test_medians_and_ratios_pair_by_pair() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    with pytest.raises(UserError, match="nothing to take a median of"):
        Spread.of([])
    slow = [Sample(4.0, 2.0), Sample(9.0, 3.0)]
    fast = [Sample(2.0, 1.0), Sample(3.0, 1.0)]
    found = ratios(slow, fast)
    assert (found["wall"]["median"], found["cpu"]["high"]) == (2.5, 3.0)
    assert spreads(slow)["cpu"]["low"] == 2.0
    assert (slow[0].by("wall"), slow[0].by("cpu")) == (4.0, 2.0)


def test_one_thread_of_a_cpu_is_measured_in_cpu_time() -> None:
    with threads(1):
        assert timer_for(CPU) == "cpu"
        with threads(2):
            assert torch.get_num_threads() == 2
            assert timer_for(CPU) == "wall"
        assert torch.get_num_threads() == 1
    assert timer_for(torch.device("cuda")) == "wall"


def test_what_is_measured_inside_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 1.0, 4.0, 6.0, 10.0, 11.0))
    monkeypatch.setattr("vpt_agent.bench.clock.time.perf_counter", lambda: next(now))
    clock = Clock()
    with clock.measure("outer"), clock.measure("inner"):
        pass
    assert clock.seconds == {"inner": 3.0, "outer": 3.0}
    with pytest.raises(KeyError), clock.measure("outer"):
        raise KeyError
    clock.add("inner", 0.5)
    assert clock.seconds == {"inner": 3.5, "outer": 4.0}


def test_the_machine_and_its_rates() -> None:
    machine = describe(CPU).to_dict()
    assert machine["device"] == "cpu"
    assert machine["torch"] == torch.__version__
    rates = measure_rates(torch.float32, CPU, repeats=1, stream=2**24)
    assert rates.dtype == "float32"
    assert rates.bytes_per_second > 1e8
    assert rates.flops_per_second > rates.bytes_per_second / 4


def test_kernels_give_a_ratio_each() -> None:
    found = bench_kernels(device=CPU, repeats=1)
    assert len(found["kernels"]) == 4
    assert [len(row["ratio"]["cpu"]) for row in found["kernels"]] == [4] * 4
    assert all(row["kernel"].startswith("vpt::") for row in found["kernels"])
    assert len(found["aims"]) == 2


def test_a_crowd_is_answered_as_one_by_one() -> None:
    crowd = Crowd(questions=3, image=56, new_tokens=4, repeats=1)
    found = bench_throughput(Loaded(*tiny_model(("clip",))), crowd)
    assert found["answers_equal"]
    assert found["together"]["rows_per_forward"] > 1
    limits = found["limits"]
    assert 0 < limits["share"] < 1
    measured = limits["with_measured_products"]
    assert measured["share"] == pytest.approx(
        limits["share"] * measured["seconds"] / limits["seconds"]
    )
    parts = found["together"]["parts"]
    assert set(parts) == {*PARTS, "rest"}
    assert all(parts[name] > 0 for name in ("vision", "blocks", "decode", "logits", "choose"))


def test_some_of_a_crowd_stand_for_all_alone() -> None:
    told: list[str] = []
    crowd = Crowd(questions=4, image=56, new_tokens=3, repeats=1, alone=2)
    found = bench_throughput(Loaded(*tiny_model(("clip",))), crowd, tell=told.append)
    assert found["answers_equal"]
    assert found["alone"]["scale"] == 2
    ratio = found["alone"]["cpu"]["median"] / found["together"]["cpu"]["median"]
    assert found["ratio"]["cpu"]["median"] == pytest.approx(ratio)
    assert told[0] == "warming up"
    assert "2 questions one after another" in told


def test_attention_is_what_a_block_has_besides_its_products() -> None:
    model = tiny_model(("clip",))[0]
    costs = Costs.of(model)
    seen = costs.attention(5, 20)
    whole = costs.block(5, 20, heads=0)
    assert whole.flops - seen.flops == 2.0 * costs.layers * 5
    assert whole.bytes - seen.bytes == costs.layer_bytes
    assert seen.bytes == 2 * costs.depth * costs.kv_width * 25 * costs.itemsize


def test_products_are_measured_over_all_weights() -> None:
    model = tiny_model(("clip",))[0]
    assert 0 < products_seconds(model, 4, 0) < 5
    assert 0 < products_seconds(model, 4, 4) < 5


def test_imports_are_measured_in_processes_of_their_own() -> None:
    found = bench_import(repeats=1, answer=False)
    assert not found["import_loads_torch"]
    assert set(found["processes"]) == {"nothing", "import", "help"}
    assert [aim["wanted"] for aim in found["aims"]] == [0.15, 0.4]
    assert all(aim["figure"] > 0 for aim in found["aims"][1:])


def test_a_measured_process_that_fails_is_an_error() -> None:
    with pytest.raises(InternalError, match=r"a measured process failed.*got: ValueError: seven"):
        _run(["-c", "raise ValueError('seven')"])


def test_what_is_done_ahead_is_measured_and_must_change_nothing() -> None:
    loaded = Loaded(*tiny_model(("dino",)))
    asked = Overlap(image=84, new_tokens=3, repeats=1, threads=1, questions=2, large=84)
    found = bench_overlap(loaded, asked)
    assert 0 <= found["features"]["hidden_share"] <= 1
    assert found["features"]["ahead"]["wall"]["median"] > 0
    assert found["pictures"]["workers"] >= 0
    with pytest.raises(InternalError, match="what was done ahead changed the answers"):
        overlap._same({"one", "other"})
