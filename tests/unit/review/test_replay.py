"""Contract X5: a trace replays to the same tokens, or names the first difference."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from vpt_agent.agent import PerceptionAgent
from vpt_agent.errors import TraceError, UserError
from vpt_agent.review import replay
from vpt_agent.trace import Trace
from vpt_agent.types import Limits

REGION = "<|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>"


@pytest.fixture
def image() -> Image.Image:
    return Image.new("RGB", (120, 80), "red")


def test_a_run_read_from_disk_replays(image: Image.Image, tmp_path: Path) -> None:
    agent = PerceptionAgent.from_script([REGION, "Yes."])
    agent.run("Is it?", image=image, trace=tmp_path / "run", tool_choice="crop_region")
    result = replay(Trace.read(tmp_path / "run"), agent)
    assert result.same
    assert len(result.trace.runs) == 1


def test_a_conversation_replays_in_one_session(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "Yes.", "And no."])
    chat = agent.conversation(image=image)
    chat.ask("Is it?")
    chat.ask("Is it still?")
    assert replay(chat.trace, agent).same


def test_the_first_difference_is_named(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "Yes."])
    trace = agent.run("Is it?", image=image).trace
    other = PerceptionAgent.from_script([REGION, "Yet."])
    difference = replay(trace, other).difference
    assert difference is not None
    record = trace.record().ids
    assert record[difference.position] == difference.recorded == agent.tokenizer.encode("s")[0]
    assert difference.replayed == agent.tokenizer.encode("t")[0]
    assert "Ye" in str(difference)


def test_sampled_runs_replay_by_their_seed(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "Yes."])
    trace = agent.run("Is it?", image=image, temperature=3.0, seed=4).trace
    assert replay(trace, agent).same
    unseeded = agent.run("Is it?", image=image, temperature=1.0).trace
    with pytest.raises(TraceError, match="sampled without a seed"):
        replay(unseeded, agent)


def test_an_empty_trace_cannot_be_replayed() -> None:
    agent = PerceptionAgent.from_script(["Yes."])
    with pytest.raises(TraceError, match="there is no run to replay"):
        replay(Trace(), agent)


def test_conversations_that_share_a_trace_replay_apart(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "Yes.", "And no.", "Well."])
    trace = Trace()
    one, two = agent.conversation(image=image, trace=trace), agent.conversation(trace=trace)
    one.ask("Is it?")
    two.ask("Something else, and longer?")
    one.ask("Is it still?")
    two.ask("And that?")
    result = replay(trace, agent)
    assert result.same
    assert len(result.trace.runs) == 4


def test_a_run_that_the_clock_ended_replays(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script(["A long story.", "Next."])
    ticks = iter(range(1000))
    chat = agent.conversation(image=image)
    # The clock is read once a token: it is over after the fifth.
    from vpt_agent.agent.recorder import Recorder

    real = Recorder.seconds
    try:
        Recorder.seconds = lambda self: float(next(ticks))  # type: ignore[method-assign]
        first = chat.ask("Tell?", limits=Limits(seconds=5.0))
    finally:
        Recorder.seconds = real  # type: ignore[method-assign]
    assert (first.limit, first.text) == ("seconds", "A lon")
    assert chat.ask("And?").text == "Next."
    assert replay(chat.trace, agent).same


def test_runs_that_failed_or_were_stopped_replay_up_to_there(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([REGION, "Yes.", "And no."])
    agent.engine.max_positions = 600
    chat = agent.conversation(image=image)
    chat.ask("Is it?")
    with pytest.raises(UserError, match="longer than the model can hold"):
        chat.ask("why? " * 200)
    stream = chat.stream("And?")
    for item in stream:
        if getattr(item, "text", "") == "A":
            break
    stream.close()
    assert chat.ask("Is it still?").text == "And no."
    result = replay(chat.trace, agent)
    assert result.same
    assert len(result.trace.runs) == 4
