"""Pictures read on threads: in order, a bounded number, each error with its own question."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vpt_agent import PerceptionAgent
from vpt_agent.agent import Question
from vpt_agent.agent import pictures as module
from vpt_agent.agent.pictures import WAITING, Ahead, Pictures
from vpt_agent.engine.sampling import Sampling
from vpt_agent.errors import ImageError, UserError
from vpt_agent.trace import Trace
from vpt_agent.types import View


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_several_pictures_are_read_side_by_side_in_order(tmp_path: Path) -> None:
    seen: list[tuple[str, View]] = []
    threads = Pictures(lambda v: seen.append((threading.current_thread().name, v)), workers=3)
    plain = Pictures(lambda v: pytest.fail("no thread, nothing to prepare"), workers=0)
    file = tmp_path / "one.png"
    file.write_bytes(jpeg(5))
    given: list[Any] = [jpeg(1), file, Image.new("P", (9, 9)), np.zeros((4, 5), np.uint16) + 300]
    found, wanted = threads.load(given), plain.load(given)
    assert [v.sha256 for v in found.views] == [v.sha256 for v in wanted.views]
    assert found.files == wanted.files == (given[0], jpeg(5), None, None)
    assert found.notes_of == wanted.notes_of
    assert any("16 bits" in note for note in found.notes)
    assert {v.sha256 for _, v in seen} == {v.sha256 for v in found.views}
    assert all(name.startswith("pictures") for name, _ in seen)
    seen.clear()
    threads.load(jpeg(1))  # one alone gains nothing
    assert not seen
    assert threads.load(found) is found
    threads.close()


def test_the_first_error_of_several_is_told() -> None:
    threads = Pictures(lambda _: None, workers=2)
    with pytest.raises(ImageError, match="the file is empty"):
        threads.load([jpeg(1), b"", b"no picture"])
    with pytest.raises(UserError, match="the list of pictures is empty"):
        threads.load([])
    threads.close()


def test_a_bounded_number_is_read_ahead() -> None:
    lock, begun = threading.Condition(), []

    def prepare(view: View) -> None:
        with lock:
            begun.append(view)
            lock.notify_all()

    def count(wanted: int) -> int:
        with lock:
            lock.wait_for(lambda: len(begun) >= wanted, timeout=20)
        return len(begun)

    total = WAITING + 6
    threads = Pictures(prepare, workers=2)
    assert threads.ahead([jpeg(1)], most=9) is None
    assert Pictures(prepare, workers=0).ahead([jpeg(1)] * 3, most=9) is None
    ahead = Ahead(threads, [jpeg(i) for i in range(total)], most=WAITING + 2)
    assert count(WAITING) == WAITING
    for number in range(3):  # three take theirs; of questions two more may go on
        run = ahead.given(number)
        (future,) = next(run).futures
        with pytest.raises(StopIteration) as done:
            run.send([future.result(timeout=20)])
        assert done.value.value.views[0].sha256 == begun_of(jpeg(number))
    assert count(WAITING + 2) == WAITING + 2
    ahead.finished(0)
    assert count(WAITING + 3) == WAITING + 3
    ahead.close()
    ahead.finished(1)
    threads.close()
    assert len(begun) == WAITING + 3


def begun_of(data: bytes) -> str:
    return Pictures(lambda _: None, workers=0).load(data).views[0].sha256


@pytest.mark.parametrize("workers", [0, 3])
def test_a_batch_answers_as_one_by_one_and_errors_are_of_their_question(workers: int) -> None:
    agent = PerceptionAgent.from_script(["A red tag."])
    agent.pictures.workers = workers
    asked = [Question(f"What is {i}?", [jpeg(i), jpeg(i + 1)]) for i in range(20)]
    asked[3] = Question("What is broken?", b"no picture at all")
    asked[4] = Question("What is nothing?")
    answers = agent.run_batch(asked)
    assert [a.status for a in answers].count("failed") == 1
    assert answers[3].status == "failed"
    assert any("not a picture that can be read" in w for w in answers[3].warnings)
    for i, answer in enumerate(answers):
        if i not in (3, 4):
            assert answer.text == "A red tag."
            wanted = [begun_of(jpeg(i)), begun_of(jpeg(i + 1))]
            assert [v.sha256 for v in answer.views] == wanted
    assert not answers[4].views
    agent.close()


def test_questions_that_end_before_they_ask_hold_up_nobody(tmp_path: Path) -> None:
    agent = PerceptionAgent.from_script(["A red tag."])
    agent.pictures.workers = 2
    file = tmp_path / "a file"
    file.write_text("no folder can be made in it")
    broken = [Question("What?", jpeg(1), trace=file / "run") for _ in range(WAITING + 2)]
    answers = agent.run_batch([*broken, *(Question("What?", jpeg(i)) for i in range(3))])
    assert [a.status for a in answers[: len(broken)]] == ["failed"] * len(broken)
    assert [a.text for a in answers[len(broken) :]] == ["A red tag."] * 3
    agent.close()


def test_pictures_go_with_the_run_that_took_them() -> None:
    threads = Pictures(lambda _: None, workers=1)
    ahead = Ahead(threads, [jpeg(1), jpeg(2)], most=1)
    run = ahead.given(0)
    (future,) = next(run).futures
    with pytest.raises(StopIteration):
        run.send([future.result(timeout=20)])
    assert not ahead._futures[0].done(), "a batch does not hold all of its pictures"
    threads.close()


def test_a_batch_that_is_given_up_reads_no_more() -> None:
    agent = PerceptionAgent.from_script(["A red tag."])
    read: list[View] = []
    agent.pictures = Pictures(read.append, workers=1)
    total = 3 * WAITING
    ahead = agent.pictures.ahead([jpeg(i) for i in range(total)], most=WAITING)
    assert ahead is not None
    sampling = Sampling()
    runs = [
        agent._one_of_batch(Question("What?", jpeg(i)), sampling, ahead, i) for i in range(WAITING)
    ]
    for run in runs:
        next(run)
    for run in runs:
        run.close()
    agent.pictures.submit(lambda _: None, None).result(timeout=20)  # what was asked for is done
    assert len(read) <= WAITING
    agent.close()


def test_closing_loses_nothing_that_was_asked_for() -> None:
    held = threading.Event()

    def prepare(view: View) -> None:
        held.wait(20)

    threads = Pictures(prepare, workers=1)
    ahead = Ahead(threads, [jpeg(1), jpeg(2)], most=2)
    threads.close()
    held.set()
    for number in range(2):
        (future,) = next(ahead.given(number)).futures
        assert future.result(timeout=20).views


def test_runs_of_one_trace_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pictures, "ahead", lambda *_, **__: pytest.fail("not in one trace"))
    agent = PerceptionAgent.from_script(["Yes."])
    trace = Trace()
    agent.run_batch([Question(f"Is it {i}?", jpeg(i), trace=trace) for i in range(4)])
    started = [e for e in trace.events if e.type == "run_started"]
    assert [(e.run, e.question) for e in started] == [
        (f"run_{i + 1}", f"Is it {i}?") for i in range(4)
    ]


def test_one_cpu_reads_when_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cpus", lambda: 1)
    assert Pictures(lambda _: None).workers == 0
    monkeypatch.setattr(module, "_cpus", lambda: 99)
    assert Pictures(lambda _: None).workers == module.WORKERS
