"""Features that are begun before they are asked for: once, the same, and told in the trace."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from PIL import Image

from vpt_agent.bench.answer import Loaded, Ours, Settings, picture
from vpt_agent.engine import features
from vpt_agent.engine.core import Engine
from vpt_agent.engine.early import MOST, Early
from vpt_agent.engine.parts import Look
from vpt_agent.errors import UserError
from vpt_agent.model.testing import tiny_model
from vpt_agent.trace import ImageEncoded
from vpt_agent.types import Answer, Box, View
from vpt_agent.vision.patches import look
from vpt_agent.vision.policy import ImagePolicy

CPU = torch.device("cpu")
MODEL, PROCESSOR = tiny_model(("dino",))


def view(shade: int, name: str = "image_1") -> View:
    image = Image.new("RGB", (56, 84), (shade, 9, 200))
    return View(name, image, name, Box(0, 0, 56, 84), (56, 84))


@pytest.fixture
def engine() -> Engine:
    made = Engine(MODEL, ImagePolicy())
    made.features.early = Early(CPU, wanted=True)
    return made


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The thread of each picture that went through an encoder of its own."""
    real, seen = MODEL.encode, []

    def encode(kind: str, **inputs: Any) -> Any:
        seen.extend([threading.current_thread().name] * len(inputs["pixels"]))
        return real(kind, **inputs)

    monkeypatch.setattr(MODEL, "encode", encode)
    return seen


def test_it_is_computed_once_on_another_thread(engine: Engine, encoded: list[str]) -> None:
    looks = [Look("dino", (view(1),))]
    engine.foresee(looks)
    engine.foresee(looks)  # known already
    (early,) = engine.look("dino", [view(1)])
    (again,) = engine.look("dino", [view(1)])
    assert [name.startswith("early") for name in encoded] == [True]
    assert engine.features.encoder_calls == 1
    assert (early.reused, again.reused) == (False, True)
    assert early.early > 0
    assert 0 <= early.hidden <= early.seconds
    assert (again.early, again.hidden) == (0, 0)
    plain = Engine(MODEL, ImagePolicy()).look("dino", [view(1)])[0]
    assert torch.equal(early.tokens, plain.tokens)
    assert (plain.early, plain.hidden) == (0, 0)
    engine.foresee(looks)  # kept: nothing to begin
    assert len(encoded) == 2


def test_what_fails_early_is_computed_when_it_is_needed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, failed = engine.features._compute, []

    def broken(source: str, views: list[View]) -> Any:
        if threading.current_thread().name.startswith("early"):
            failed.append(source)
            raise UserError("not yet")
        return compute(source, views)

    monkeypatch.setattr(engine.features, "_compute", broken)
    engine.foresee([Look("dino", (view(2),))])
    (found,) = engine.look("dino", [view(2)])
    assert failed == ["dino"]
    assert found.early == 0
    assert not found.reused


def test_closing_stops_the_thread_behind_what_was_begun(engine: Engine, encoded: list[str]) -> None:
    early = engine.features.early
    engine.foresee([Look("dino", (view(7),))])
    pool = early._pool
    assert pool is not None
    early.close()
    (found,) = engine.look("dino", [view(7)])
    assert found.early > 0
    for thread in pool._threads:
        thread.join(20)
        assert not thread.is_alive()
    engine.foresee([Look("dino", (view(8),))])  # it can be used again
    assert engine.look("dino", [view(8)])[0].early > 0
    assert len(encoded) == 2
    early.close()


def test_calls_that_never_come_leave_a_bounded_number(engine: Engine, encoded: list[str]) -> None:
    for shade in range(MOST + 4):
        engine.foresee([Look("dino", (view(shade),))])
        for begun in engine.features._begun.values():
            begun.future.exception()  # waits
    assert len(engine.features._begun) <= MOST
    (found,) = engine.look("dino", [view(0)])  # moved to those that are kept
    assert found.reused
    assert len(encoded) == MOST + 4
    engine.features.clear()
    assert not engine.features._begun


def test_where_nothing_is_gained_nothing_is_begun(encoded: list[str]) -> None:
    engine = Engine(MODEL, ImagePolicy())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert not engine.features.early.works
        engine.foresee([Look("dino", (view(3),))])
        assert not encoded
        torch.set_num_threads(2)
        assert engine.features.early.works
    finally:
        torch.set_num_threads(threads)
    engine.features.early.wanted = True
    engine.foresee([Look("base", (view(3),))])  # asked for at once, anyway
    assert not engine.features._begun


def answered(kind: str, *, wanted: bool) -> Answer:
    loaded = Loaded(*tiny_model((kind,)))
    ours = Ours(loaded, Settings(image=84, new_tokens=6, force=kind), picture(84))
    ours.agent.engine.features.early.wanted = wanted
    try:
        return ours.run()
    finally:
        ours.close()


@pytest.mark.parametrize("kind", ["dino", "sam", "clip"])
def test_an_answer_is_the_same_and_its_trace_says_what_was_begun_early(kind: str) -> None:
    early, plain = answered(kind, wanted=True), answered(kind, wanted=False)
    assert early.text == plain.text
    assert early.trace.record().ids == plain.trace.record().ids
    assert early.usage.encoder_calls == plain.usage.encoder_calls
    told = [e for e in early.trace.events if isinstance(e, ImageEncoded) and e.early > 0]
    assert [e.encoder for e in told] == ([] if kind == "clip" else [kind])
    assert all(0 <= e.hidden <= e.seconds for e in told)
    assert not [e for e in plain.trace.events if isinstance(e, ImageEncoded) and e.early > 0]


# --- pictures resized ahead of need -----------------------------------------------------------


@pytest.fixture
def resized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures were resized by each call."""
    seen: list[int] = []

    def look_at(views: Any, policy: ImagePolicy) -> Any:
        seen.append(len(views))
        return look(views, policy)

    monkeypatch.setattr(features, "look_at", look_at)
    return seen


def test_a_picture_that_was_resized_is_not_resized_again(resized: list[int]) -> None:
    engine = Engine(MODEL, ImagePolicy())
    views = [view(shade, f"image_{shade}") for shade in (1, 2, 3)]
    engine.features.prepare(views[0])
    engine.features.prepare(views[0])
    engine.features.prepare(views[2])
    assert resized == [1, 1]
    found = engine.look("base", views)
    assert resized == [1, 1, 1]
    plain = Engine(MODEL, ImagePolicy()).look("base", views)
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert (one.grid, one.kernels) == (other.grid, other.kernels)
    resized.clear()
    engine.features.prepare(views[1])  # its features are kept
    assert resized == []


def test_few_resized_pictures_wait_and_not_for_ever(
    resized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Engine(MODEL, ImagePolicy()).features
    for shade in range(features.PREPARED + 3):
        store.prepare(view(shade))
    assert len(resized) == len(store._prepared) == features.PREPARED
    monkeypatch.setattr(features, "STALE", 0.0)
    store.prepare(view(200))
    assert len(store._prepared) == 1
    store.clear()
    assert not store._prepared
    flat = View("line", Image.new("RGB", (1, 9)), "line", Box(0, 0, 1, 9), (1, 9))
    monkeypatch.setattr(store, "policy", ImagePolicy(kind="native", min_pixels=784, max_pixels=784))
    store.prepare(flat)  # what cannot be resized is said to whoever shows it
    assert len(store._prepared) <= 1
