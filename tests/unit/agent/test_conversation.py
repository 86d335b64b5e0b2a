"""Conversations after trouble: errors, closed streams, limits, shared traces."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from PIL import Image

from vpt_agent.agent import AnswerReady, PerceptionAgent, Question, TokenDelta
from vpt_agent.errors import UserError
from vpt_agent.trace import Trace
from vpt_agent.types import Limits

REGION = "<|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>"


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (160, 240, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def in_cache(chat) -> list[int]:
    """Ids of the session, and what was chosen behind them."""
    return [*chat._state.session.ids, *chat._state.tail]


def test_a_failed_question_is_taken_back_with_its_pictures_waiting(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script(["One.", "Two."])
    agent.engine.max_positions = 300
    chat = agent.conversation(image=image)
    with pytest.raises(UserError, match="longer than the model can hold"):
        chat.ask("why? " * 100)
    first = chat.ask("And now?")
    assert first.text == "One."
    assert [v.id for v in first.views] == ["image_1"]
    assert first.usage.visual_tokens > 0
    before = in_cache(chat)
    with pytest.raises(UserError, match="longer than the model can hold"):
        chat.ask("why? " * 100, image=image.rotate(90))
    assert in_cache(chat) == before
    second = chat.ask("And then?")
    assert (second.text, second.views) == ("Two.", ())
    assert chat.trace.record().ids == in_cache(chat), "the record knows only what stands"


def test_a_closed_stream_is_taken_back(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "A cat.", "Other."])
    chat = agent.conversation(image=image)
    stream = chat.stream("What?")
    for item in stream:
        if isinstance(item, TokenDelta) and item.text == "A":
            break
    stream.close()
    assert chat.trace.events[-1].error == "stopped by the caller"
    assert len(chat._state.session) == 0
    again = chat.ask("What?")
    assert again.text == "A cat."
    assert [v.id for v in again.views] == ["image_1", "call_2.1"], "names are not used twice"
    assert chat.trace.record().ids == in_cache(chat)


def test_one_question_at_a_time(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script(["A cat."])
    chat = agent.conversation(image=image)
    stream = chat.stream("What?")
    next(stream)
    with pytest.raises(UserError, match="still being answered"):
        chat.ask("And?")
    *_, last = stream
    assert last.answer.text == "A cat."
    assert chat.ask("And?").text == "A cat."


def test_two_streams_of_one_agent_do_not_mix(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "A cat."])
    streams = [agent.run_stream(q, image=image) for q in ("One?", "Two, longer?")]
    answers: dict[int, str] = {}
    while len(answers) < 2:
        for i, stream in enumerate(streams):
            item = next(stream, None)
            if isinstance(item, AnswerReady):
                answers[i] = item.answer.text
                assert item.answer.trace.record().ids
    assert answers == {0: "A cat.", 1: "A cat."}


def test_a_closed_conversation_and_a_closed_agent_say_so(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "A cat."])
    chat = agent.conversation(image=image)
    chat.ask("What?")
    chat.close()
    with pytest.raises(UserError, match="this conversation is closed"):
        chat.ask("And?")
    agent.close()
    with pytest.raises(UserError, match="this agent is closed"):
        agent.run("What?", image=image)


@pytest.mark.parametrize("turn", ["abc<|endoftext|>def", "abcdef" + REGION])
def test_a_turn_that_did_not_end_well_is_closed_in_cache_and_record(turn: str) -> None:
    agent = PerceptionAgent.from_script([turn, "Two."])
    chat = agent.conversation()
    first = chat.ask("One?", limits=Limits(new_tokens=8))
    assert first.text.startswith("abc")
    assert chat.ask("Two?").text == "Two."
    ids = in_cache(chat)
    assert chat.trace.record().ids == ids
    text = agent.layout.raw_text(ids)
    assert "<|endoftext|>" not in text
    assert text.count("<|im_start|>") == text.count("<|im_end|>") == 5


def test_follow_up_calls_mean_the_original_and_not_a_crop(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "One.", REGION, "Two."])
    chat = agent.conversation(image=image)
    boxes = [chat.ask(q).results[0].views[0] for q in ("One?", "Two?")]
    assert boxes[0].box == boxes[1].box
    assert boxes[1].parent == "image_1"


def test_runs_that_share_a_trace_keep_their_names_apart(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "Yes."])
    trace = Trace()
    other = image.rotate(90, expand=True)
    answers = agent.run_batch(
        [Question("a?", image, trace=trace), Question("b?", other, trace=trace)]
    )
    agent.run("c?", image=image, trace=trace)
    assert trace.runs == ("run_1", "run_2", "run_3")
    assert [v.id for v in answers[1].views] == ["image_2", "call_2.1"]
    for view in answers[0].views + answers[1].views:
        assert trace.view(view.id).image.tobytes() == view.image.tobytes()
    calls = [e.call_id for e in trace.events if e.type == "tool_called"]
    assert calls == ["call_1", "call_2", "call_3"]


def test_rows_of_the_cache_come_back_whatever_happens(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "Yes."])
    cache = agent.engine.cache

    def used() -> int:
        gc.collect()
        return cache.used_rows

    agent.run("q?", image=image)
    stream = agent.run_stream("q?", image=image)
    next(stream)
    assert used() == 1
    del stream
    assert used() == 0
    agent.run_batch(["a?", " ", Question("b?", image), Question("c?", "no/such/file.png")])
    for bad in ("  ", "why? " * 9000):
        with pytest.raises(UserError, match=r"the question is empty|longer than the model"):
            agent.run(bad, image=image)
    chat = agent.conversation(image=image)
    chat.ask("q?")
    assert used() == 1
    del chat
    assert used() == 0


def test_an_agent_that_is_dropped_takes_its_cache_with_it(image: Image.Image) -> None:
    import weakref

    agent = PerceptionAgent.from_script([REGION, "Yes."])
    answer = agent.run("q?", image=image)
    cache = weakref.ref(agent.engine.cache)
    del agent
    gc.collect()
    assert cache() is None, "an answer does not keep the model alive"
    assert answer.text == "Yes."


def test_a_batch_keeps_trouble_with_traces_and_pictures_apart(image: Image.Image, tmp_path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    agent = PerceptionAgent.from_script(["Yes."])
    answers = agent.run_batch(
        [
            Question("a?", image, trace=tmp_path / "full"),
            Question("b?", []),
            Question("c?", image),
        ]
    )
    assert [a.status for a in answers] == ["failed", "failed", "answered"]
    assert "never written over" in answers[0].warnings[0]
    assert "the list of pictures is empty" in answers[1].warnings[0]
    with pytest.raises(UserError, match="a batch holds questions"):
        agent.run_batch([3])  # type: ignore[list-item]


def test_a_picture_that_cannot_be_encoded_fails_its_own_run(
    image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = PerceptionAgent.from_script(["Yes."])
    real = type(agent.engine.policy).plan

    def plan(self, size, *, crop=False):
        if size == (33, 77):
            raise UserError("no size of whole tokens fits this picture")
        return real(self, size, crop=crop)

    monkeypatch.setattr(type(agent.engine.policy), "plan", plan)
    answers = agent.run_batch(
        [("a?", image), ("b?", Image.new("RGB", (33, 77))), ("c?", image.rotate(90))]
    )
    assert [a.status for a in answers] == ["answered", "failed", "answered"]
    assert answers[1].trace.events[-1].status == "failed"


def test_streamed_text_is_whole_characters() -> None:
    agent = PerceptionAgent.from_script(["Grüße, 世界 😀"])
    items = list(agent.run_stream("q?"))
    deltas = [i.text for i in items if isinstance(i, TokenDelta)]
    assert "".join(deltas) == "Grüße, 世界 😀"
    assert not any("\N{REPLACEMENT CHARACTER}" in d for d in deltas)
