"""Mixtures: shares, order, going on where one stopped, and what is refused."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vpt_agent.data import Mixture, Row, load_rows
from vpt_agent.errors import UserError

A = [f"a{i}" for i in range(60)]
B = [f"b{i}" for i in range(20)]


class Stream:
    """Can begin again, but not be indexed."""

    def __init__(self, items: list[str]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[str]:
        return iter(self.items)


def test_one_source_is_one_pass_in_another_order() -> None:
    got = list(Mixture([(A, 1)], seed=3, buffer=1000))
    assert sorted(got) == sorted(A)
    assert got != A
    assert list(Mixture([(A, 1)], buffer=1)) == A


@pytest.mark.parametrize("kind", [list, Stream])
def test_shares_are_those_of_the_weights(kind: Any) -> None:
    mixture = Mixture([(kind(A), 3), (kind(B), 1), ([], 0)], seed=1, buffer=8, stop="never")
    drawn = Counter(row[0] for row in itertools.islice(mixture, 4000))
    assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.02)
    assert mixture.drawn == [drawn["a"], drawn["b"], 0]


def test_when_a_pass_ends() -> None:
    ends: dict[str, list[str]] = {
        stop: list(Mixture([(A, 1), (B, 1)], seed=2, buffer=4, stop=stop))  # type: ignore[arg-type]
        for stop in ("first", "all")
    }
    assert set(B) <= set(ends["first"])
    assert len([r for r in ends["first"] if r in B]) == len(B)
    assert set(ends["all"]) == set(A) | set(B)
    assert len(ends["all"]) > len(A) + len(B)


def test_seeds_and_epochs_decide_the_order() -> None:
    def stream(seed: int = 0, epoch: int = 0) -> list[str]:
        mixture = Mixture([(A, 1), (B, 2)], seed=seed, buffer=16)
        mixture.set_epoch(epoch)
        return list(mixture)

    assert stream() == stream()
    assert stream(1) != stream()
    assert stream(epoch=1) != stream()
    mixture = Mixture([(A, 1), (B, 2)], buffer=16)
    assert list(mixture) == list(mixture)


@pytest.mark.parametrize("kind", [list, Stream])
@pytest.mark.parametrize("done", [0, 1, 17, 70])
def test_it_goes_on_where_it_stopped(kind: Any, done: int) -> None:
    def mixture() -> Mixture[str]:
        return Mixture([(kind(A), 1), (kind(B), 1)], seed=5, buffer=16)

    whole = mixture()
    whole.set_epoch(2)
    rows = list(whole)
    first = mixture()
    first.set_epoch(2)
    stream = iter(first)
    for _ in range(done):
        next(stream)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["position"] == done
    second = mixture()
    second.load_state_dict(state)
    second.set_epoch(2)  # as a trainer does before each pass
    assert list(second) == rows[done:]
    assert list(second) == rows  # and the next pass is whole


def test_rows_that_are_skipped_are_not_read() -> None:
    class Counting(list[str]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            Counting.reads += 1
            return super().__getitem__(index)

    mixture = Mixture([(Counting(A), 1)], buffer=8)
    mixture.load_state_dict(mixture.state_dict(50))
    assert len(list(mixture)) == 10
    assert Counting.reads == 10


def test_shards_share_the_stream_out() -> None:
    mixture = Mixture([(A, 1), (B, 1)], seed=4, buffer=8)
    whole = list(mixture)
    parts = [list(mixture.shard(i, 3)) for i in range(3)]
    assert [parts[i % 3][i // 3] for i in range(len(whole))] == whole
    with pytest.raises(UserError, match=r"no such shard; got: 3 of 3; expected: 0\.\.2"):
        mixture.shard(3, 3)


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, r"weights of a mixture sum to nothing; got: no source; expected: at least one"),
        ([(A, 0), (B, 0)], {}, r"weights of a mixture sum to nothing; got: \[0, 0\]"),
        ([(A, 1), (B, -1)], {}, r"a number, 0 or more; where: source 1; got: -1"),
        ([(A, float("nan"))], {}, r"a number, 0 or more; where: source 0; got: nan"),
        ([(A, True)], {}, r"a number, 0 or more; where: source 0; got: True"),
        ([(iter(A), 1)], {}, r"able to begin again; where: source 0; got: list_iterator"),
        ([(A, 1)], {"buffer": 0}, r"at least one row; where: buffer; got: 0"),
        ([(A, 1)], {"stop": "last"}, r"unknown end of a mixture; got: last; expected: first, all"),
    ],
)
def test_what_is_refused(sources: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(sources, **options)


def test_an_empty_source_is_told() -> None:
    with pytest.raises(UserError, match=r"a source of a mixture has no rows; where: source 1"):
        list(Mixture([(A, 1), ([], 1)], stop="never"))


def test_the_state_of_another_mixture_is_refused() -> None:
    state = Mixture([(A, 1)], seed=1).state_dict()
    with pytest.raises(UserError, match=r"another mixture; where: seed; got: 1; expected: 2"):
        Mixture([(A, 1)], seed=2).load_state_dict(state)
    del state["sizes"]
    with pytest.raises(UserError, match=r"another mixture; where: sizes; expected: .60"):
        Mixture([(A, 1)], seed=1).load_state_dict(state)


def test_the_state_of_other_rows_is_refused(tmp_path: Path) -> None:
    state = Mixture([(A, 1)], seed=1).state_dict()
    with pytest.raises(UserError, match=r"rows have changed.*source 0; got: 20 rows; .*60 rows"):
        Mixture([(B, 1)], seed=1).load_state_dict(state)

    def file(answer: str) -> Mixture[Row]:
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]
        (tmp_path / "rows.json").write_text(json.dumps([{"messages": turns}]))
        return Mixture([(A, 1), (load_rows(tmp_path / "rows.json"), 1)], seed=1)  # type: ignore[list-item]

    state = json.loads(json.dumps(file("a").state_dict()))
    file("a").load_state_dict(state)
    with pytest.raises(UserError, match=r"rows have changed.*where: rows.json; got: .*fingerprint"):
        file("b").load_state_dict(state)


def test_a_stream_is_sought_by_position() -> None:
    mixture = Mixture([(A, 1), (B, 2)], seed=1)
    whole = list(mixture)
    mixture.seek(7)
    assert list(mixture) == whole[7:]
