"""The agent's call path: calls of several runs together, equal calls once, what stops or hangs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from PIL import Image

from vpt_agent.agent import PerceptionAgent, Question
from vpt_agent.engine.parts import Wait
from vpt_agent.engine.sampling import Sampling
from vpt_agent.errors import ToolFailed, UserError
from vpt_agent.tokens import PerceptionTable, own_kind
from vpt_agent.tool import PerceptionTool, Rng, ToolArguments, ToolContext, perception_tool
from vpt_agent.types import Answer, Limits

REGION = "<|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>"
OTHER = "<|region_token_start|><|x_1|><|y_2|><|x_3|><|y_5|><|region_token_end|>"
CLIP = "<|clip_action_start|><|clip_action|><|clip_action_end|>"
PRICE = own_kind("price", payload="text", pattern=r"[A-Z]\d{1,2}", argument="key")
K7, K8 = PRICE.call_text(text="K7"), PRICE.call_text(text="K8")
RED = Image.new("RGB", (84, 56), "red")


def scripted(turns: Sequence[str], tool: object, kind: object = PRICE) -> PerceptionAgent:
    table = PerceptionTable((kind,))  # type: ignore[arg-type]
    return PerceptionAgent.from_script(list(turns), [tool], table=table)  # type: ignore[list-item]


def told(answer: Answer) -> str:
    """The last turn that results came in, as text."""
    events = [e for e in answer.trace.events if e.type == "perception_appended"]
    return "".join(span.text for span in events[-1].spans)


# --- equal calls --------------------------------------------------------------------------

PRICES = {"K7": 1, "K8": 2}


def test_an_equal_call_is_answered_without_running_again() -> None:
    ran: list[str] = []

    @perception_tool
    def price(key: str) -> str:
        """Say what a part costs."""
        ran.append(key)  # two calls of a turn may run in any order
        return f"{key} costs {PRICES[key]}"

    answer = scripted([K7 + K8, K7, "Ok."], price).run("?", image=RED)
    assert sorted(ran) == ["K7", "K8"]
    assert [r.text for r in answer.results] == ["K7 costs 1", "K8 costs 2", "K7 costs 1"]
    assert answer.results[2].metadata == {"repeats": "call_1"}
    assert answer.results[2].call_id == "call_3"
    assert "K7 costs 1" in told(answer)
    assert answer.usage.tool_calls == 3
    finished = [e for e in answer.trace.events if e.type == "tool_finished"]
    assert [e.metadata for e in finished] == [{}, {}, {"repeats": "call_1"}]


def test_what_an_equal_call_showed_is_not_shown_again() -> None:
    answer = PerceptionAgent.from_script([REGION + REGION, OTHER + REGION, "Ok."]).run(
        "?", image=RED
    )
    assert [len(r.views) for r in answer.results] == [1, 0, 1, 0]
    assert [r.metadata.get("repeats") for r in answer.results] == [None, "call_1", None, "call_1"]
    assert told(answer).count("made before; what it showed is not shown again") == 1
    assert [v.id for v in answer.views] == ["image_1", "call_1.1", "call_3.1"]


def test_a_camera_is_asked_again() -> None:
    ran: list[str] = []

    @perception_tool(always_run=True)
    def price(key: str, rng: Rng) -> str:
        """Say what a part costs now."""
        ran.append(key)
        return f"{key} costs {rng.random()}"

    answer = scripted([K7 + K7, K7, "Ok."], price).run("?", image=RED)
    assert ran == ["K7"] * 3
    assert len({r.text for r in answer.results}) == 3


def test_a_call_that_failed_is_tried_again() -> None:
    ran: list[str] = []

    @perception_tool
    def price(key: str) -> str:
        """Fail at first."""
        ran.append(key)
        if len(ran) == 1:
            raise ToolFailed("the shop is closed")
        return "41"

    answer = scripted([K7, K7, "Ok."], price).run("?", image=RED)
    assert [r.ok for r in answer.results] == [False, True]


def test_equal_calls_of_another_question_run(tmp_path: object) -> None:
    chat = PerceptionAgent.from_script([REGION, "Ok.", REGION, "Ok."]).conversation(RED)
    first, second = chat.ask("?"), chat.ask("And now?")
    assert [len(a.results[0].views) for a in (first, second)] == [1, 1]


def test_calls_with_other_control_states_are_not_equal() -> None:
    agent = PerceptionAgent.from_script([CLIP, CLIP, "Ok."])
    real = agent.model.run_language_model

    def watched(*args, **kwargs):  # type: ignore[no-untyped-def]
        hidden = real(*args, **kwargs)
        hidden[..., 1] = float(agent.engine.cache.lengths[0])  # as a real model's would, it changes
        return hidden

    agent.model.run_language_model = watched  # type: ignore[method-assign]
    answer = agent.run("?", image=RED)
    assert [r.features is not None for r in answer.results] == [True, True]
    assert [r.metadata for r in answer.results] == [{}, {}]


def test_an_inline_result_stands_where_its_call_stands() -> None:
    @perception_tool
    def price(key: str) -> str:
        """Say what a part costs."""
        return "41"

    kind = replace(PRICE, result="inline")
    answer = scripted([f"One {K7}, two {K7}, done."], price, kind).run("?", image=RED)
    assert [r.text for r in answer.results] == ["41", "41"]
    assert answer.results[1].metadata == {"repeats": "call_1"}


# --- several runs -------------------------------------------------------------------------


class Key(ToolArguments):
    key: str


class Prices(PerceptionTool):
    """Say what parts cost, several at once."""

    name = "price"
    arguments = Key
    batch_size = 8

    def __init__(self, *, fits: int = 99) -> None:
        self.batches: list[list[str]] = []
        self.closed = 0
        self.fits = fits

    def run_batch(self, items: Sequence[tuple[Key, ToolContext]]) -> list[str]:  # type: ignore[override]
        self.batches.append([a.key for a, _ in items])
        if len(items) > self.fits:
            raise MemoryError
        return [f"{a.key} costs 41" for a, _ in items]

    def close(self) -> None:
        self.closed += 1


def test_calls_of_concurrent_runs_go_in_one_batch() -> None:
    tool = Prices()
    agent = scripted([K7, "Ok."], tool)
    answers = agent.run_batch([("?", RED)] * 5)
    assert [a.results[0].text for a in answers] == ["K7 costs 41"] * 5
    assert tool.batches == [["K7"] * 5]
    agent.close()
    assert tool.closed == 1


def test_out_of_memory_splits_the_batch_of_several_runs() -> None:
    tool = Prices(fits=2)
    answers = scripted([K7, "Ok."], tool).run_batch([("?", RED)] * 5)
    assert [a.results[0].text for a in answers] == ["K7 costs 41"] * 5
    assert [len(batch) for batch in tool.batches] == [5, 2, 3, 1, 2]


def test_a_batch_equals_single_runs() -> None:
    questions = [("?", RED), ("??", None), ("???", RED)]
    tool = Prices()
    agent = scripted([K7 + K8, K8, "Ok."], tool)
    together = agent.run_batch(questions)
    for question, answer in zip(questions, together, strict=True):
        alone = agent.run(question[0], image=question[1])
        assert alone.trace.record().ids == answer.trace.record().ids
        assert [r.text for r in alone.results] == [r.text for r in answer.results]


# --- what hangs, and who stops ------------------------------------------------------------


@pytest.fixture
def release() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_a_tool_that_hangs_is_abandoned_and_the_run_goes_on(release: threading.Event) -> None:
    @perception_tool(timeout=0.05, concurrency=1)
    def price(key: str) -> str:
        """Hang."""
        release.wait(20)
        return "late"

    agent = scripted([K7, K8, "Ok."], price)
    answer = agent.run("?", image=RED, limits=Limits(retries=5))
    assert answer.text == "Ok."
    kinds = [r.error.kind for r in answer.results if r.error is not None]
    assert kinds == ["timeout", "tool_failed"]
    assert answer.results[0].metadata == {"abandoned": True}
    assert "earlier ones have not stopped" in answer.results[1].error.message  # type: ignore[union-attr]


def test_the_deadline_of_one_run_does_not_end_another_s_call(release: threading.Event) -> None:
    class Slow(Prices):
        """Wait for a while."""

        def run_batch(self, items: Sequence[tuple[Key, ToolContext]]) -> list[str]:  # type: ignore[override]
            release.wait(1.0)
            return super().run_batch(items)

    agent = scripted([K7, "Ok."], Slow())
    hurried = Question("?", RED, limits=Limits(seconds=0.3))
    answers = agent.run_batch([hurried, Question("?", RED)])
    assert answers[0].status == "limit"
    assert answers[0].results[0].error is not None
    assert answers[0].results[0].error.kind == "limit"
    assert answers[1].results[0].text == "K7 costs 41"


def test_a_run_that_is_closed_while_its_tool_runs_tells_it() -> None:
    noticed, begun = threading.Event(), threading.Event()

    @perception_tool
    def price(context: ToolContext, key: str) -> str:
        """Wait until nobody does."""
        begun.set()
        if context.cancelled.wait(20):
            noticed.set()
        return "late"

    @perception_tool
    def quick(key: str) -> str:
        """Say it at once."""
        return "41"

    agent = scripted([K7, "Ok."], price)
    talk = agent.conversation(RED)
    loop = agent.engine.steps([talk.steps("?", "auto", None, Sampling()), _idle(begun)])
    for _ in loop:
        if begun.is_set():
            break
    loop.close()
    assert noticed.wait(20), "the tool hears that nobody waits"
    talk.close()


def _idle(until: threading.Event):  # type: ignore[no-untyped-def]
    """A run that keeps the loop going while a tool of another one runs."""
    while not until.is_set():
        done: Future[None] = Future()
        threading.Timer(0.05, done.set_result, (None,)).start()
        yield Wait((done,))


# --- memory -------------------------------------------------------------------------------


def crowded(agent: PerceptionAgent, fits: int) -> list[int]:
    """Make the first look of ``agent`` run out of memory above ``fits`` pictures at once."""
    real, sizes = agent.model.encode_images, []

    def encode_images(pixel_values: torch.Tensor, grid_thw: torch.Tensor):  # type: ignore[no-untyped-def]
        sizes.append(len(grid_thw))
        if len(grid_thw) > fits:
            raise torch.OutOfMemoryError("too many")
        return real(pixel_values, grid_thw)

    agent.model.encode_images = encode_images  # type: ignore[method-assign]
    return sizes


def test_pictures_that_do_not_fit_together_are_encoded_in_halves() -> None:
    agent = PerceptionAgent.from_script(["Ok."])
    sizes = crowded(agent, 2)
    pictures = [Image.new("RGB", (56, 56), (n, 0, 0)) for n in range(5)]
    answers = agent.run_batch([("?", picture) for picture in pictures])
    assert [a.text for a in answers] == ["Ok."] * 5
    assert sizes == [5, 2, 3, 1, 2]
    assert agent.engine.features.encoder_calls == 5
    plain = PerceptionAgent.from_script(["Ok."]).run_batch([("?", p) for p in pictures])
    assert [a.trace.record().ids for a in answers] == [a.trace.record().ids for a in plain]


def test_a_picture_that_does_not_fit_alone_is_its_run_s_trouble() -> None:
    agent = PerceptionAgent.from_script(["Ok."])
    crowded(agent, 0)
    with pytest.raises(UserError, match="too little memory to encode this picture; where: image_1"):
        agent.run("?", image=RED)
    answers = agent.run_batch([("?", RED), "no picture?"])
    assert [a.status for a in answers] == ["failed", "answered"]
