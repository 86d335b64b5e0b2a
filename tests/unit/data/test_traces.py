"""Runs to rows and labels: the same ids again, and no loss on what the user demanded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vpt_agent.agent import PerceptionAgent
from vpt_agent.data import IGNORED, Encoded, Row, RowEncoder, RowError, row_views
from vpt_agent.data.builder import (
    encoded_from_trace,
    rows_from_trace,
    run_folders,
    traced_calls,
    write_rows,
)
from vpt_agent.errors import UserError
from vpt_agent.tokens.table import REGION_TRIGGER, PerceptionTable
from vpt_agent.trace import Trace
from vpt_agent.types import Limits

REGION = "<|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>"
CLIP = "<|clip_action_start|><|clip_action|><|clip_action_end|>"


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (160, 240, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row_of(trace: Any, **options: Any) -> Row:
    (row,) = rows_from_trace(trace, **options)
    assert isinstance(row, Row), row
    return row


def encoded(agent: PerceptionAgent, row: Row) -> Encoded:
    encoder = RowEncoder(agent.layout, agent.engine.policy)
    got = encoder.encode(row, row_views(row))
    assert isinstance(got, Encoded)
    return got


@pytest.mark.parametrize(
    "script",
    [
        ["Yes."],
        [REGION, "Now answer the question.\nA cat."],
        [CLIP, "A cät."],
        [f"I look {REGION}{CLIP}{REGION}", CLIP, "Ok."],
    ],
)
def test_a_row_gives_the_runs_own_ids_and_labels(
    image: Image.Image, tmp_path: Path, script: list[str]
) -> None:
    agent = PerceptionAgent.from_script(script)
    trace = agent.run("What is there?", image=image, trace=tmp_path / "run").trace
    row = row_of(tmp_path / "run")
    got = encoded(agent, row)
    direct = encoded_from_trace(trace, agent.engine.table)
    assert got.record.ids == direct.record.ids == trace.record().ids
    assert got.labels == direct.labels
    assert any(label != IGNORED for label in got.labels)
    paths = {ref.path for refs in row.pictures.values() for ref in refs}
    assert len(paths) == 1  # crops are crops of the original
    assert "forced_calls" not in row.meta


def test_what_the_row_says(image: Image.Image, tmp_path: Path) -> None:
    agent = PerceptionAgent.from_script([REGION + CLIP, "Now answer the question.\nA cat."])
    agent.run(f"What?\n{REGION_TRIGGER}", image=image, trace=tmp_path / "run")
    row = row_of(tmp_path / "run")
    texts = [m.content for m in row.messages]
    assert texts == [
        f"<image>\nWhat?\n{REGION_TRIGGER}",
        REGION + CLIP,
        "<image>\n<clip_image>",
        "Now answer the question.\nA cat.",
    ]
    whole, crop = row.pictures["<image>"]
    assert crop.crop == (0, 20, 150, 120)
    assert row.pictures["<clip_image>"] == (whole,)
    assert row.meta == {"id": "run_1", "kind": "region", "tools": ["region", "clip"],
                        "answer": "A cat.", "trigger": True}  # fmt: skip
    write_rows([row], tmp_path / "rows.json")
    assert (tmp_path / "rows.json").read_text(encoding="utf-8").count("run/blobs/") == 3


@pytest.mark.parametrize("choice", ["crop_region", "required"])
def test_a_call_that_the_user_demanded_carries_no_loss(
    image: Image.Image, tmp_path: Path, choice: str
) -> None:
    agent = PerceptionAgent.from_script([REGION + CLIP, "Ok."])
    trace = agent.run("What?", image=image, trace=tmp_path / "run", tool_choice=choice).trace
    assert [(c.kind, c.outside) for c in traced_calls(trace)] == [("region", True), ("clip", False)]
    row = row_of(trace)
    assert row.meta["forced_calls"] == [1]
    got, direct = encoded(agent, row), encoded_from_trace(trace, agent.engine.table)
    assert got.labels == direct.labels
    learnt = agent.layout.raw_text([i for i in got.labels if i != IGNORED])
    # The model's own call is learnt whole, its grammar-forced end too, but for the control token.
    assert learnt == "<|clip_action_start|><|clip_action_end|><|im_end|>Ok.<|im_end|>"


def test_conversations_are_one_row(image: Image.Image, tmp_path: Path) -> None:
    agent = PerceptionAgent.from_script([REGION, "Yes.", "And no."])
    chat = agent.conversation(image=image, trace=tmp_path / "chat")
    chat.ask("Is it?")
    chat.ask("Is it still?", tool_choice="none")
    row = row_of(tmp_path / "chat")
    assert [m.role for m in row.messages] == ["user", "assistant"] * 3
    assert row.messages[4].content == "Is it still?"
    assert encoded(agent, row).record.ids == chat.trace.record().ids


def test_torn_calls_carry_no_loss(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script([CLIP, "Ok."])
    trace = agent.run("What?", image=image, limits=Limits(new_tokens=2)).trace
    assert set(encoded_from_trace(trace, agent.engine.table).labels) == {IGNORED}
    (error,) = rows_from_trace(trace, pictures="unused")
    assert isinstance(error, RowError)
    assert "a run was not answered; where: trace, run_1; got: new_tokens" in str(error)


def test_what_makes_no_row(image: Image.Image, tmp_path: Path) -> None:
    def refused(question: str = "q", script: str = "Yes.", **options: Any) -> str:
        agent = PerceptionAgent.from_script([script, "Ok."])
        trace = agent.run(question, image=image).trace
        (error,) = rows_from_trace(trace, pictures=tmp_path, **options)
        assert isinstance(error, RowError)
        return str(error)

    assert "spells the tag of a picture" in refused("where is <image>?")
    assert "spells tokens of the layout" in refused("say <|vision_start|>")
    assert "not in the layout of rows" in refused("say <|im_end|>")
    table = PerceptionTable.published(["dino"])
    assert "kind that is not in the table" in refused(script=CLIP, table=table)
    agent = PerceptionAgent.from_script(["Yes."])
    trace = agent.run("q", image=image).trace
    with pytest.raises(UserError, match=r"in memory only.*name a folder for them: pictures="):
        rows_from_trace(trace)
    row = row_of(trace, pictures=tmp_path / "pictures")
    assert encoded(agent, row).record.ids == trace.record().ids


def test_failed_calls_are_left_out_unless_asked_for(image: Image.Image, tmp_path: Path) -> None:
    agent = PerceptionAgent.from_script([REGION, "Ok."])
    limits = Limits(visual_tokens=0)
    trace = agent.run("q", image=image, trace=tmp_path / "run", limits=limits).trace
    (error,) = rows_from_trace(trace)
    assert isinstance(error, RowError)
    assert error.problem == "results"
    assert "a call of the run failed" in str(error)
    row = row_of(trace, failed_calls="keep")
    assert row.messages[2].content.startswith("Error: ")
    assert encoded(agent, row).record.ids == trace.record().ids


def test_pictures_that_are_no_crops_are_pictures_of_their_own(
    image: Image.Image, tmp_path: Path
) -> None:
    agent = PerceptionAgent.from_script([REGION, "Ok."])
    trace = agent.run("q", image=image, trace=tmp_path / "run").trace
    crop = next(v for v in trace.views.values() if v.parent)
    # Somebody drew on it: another picture in its place.
    Image.new("RGB", crop.size).save(tmp_path / "run" / "blobs" / crop.blob)
    row = row_of(Trace.read(tmp_path / "run"))
    assert [ref.crop for ref in row.pictures["<image>"]] == [None, None]
    assert row.pictures["<image>"][1].path.endswith(crop.blob)


def test_a_run_that_did_not_end_makes_no_row(image: Image.Image, tmp_path: Path) -> None:
    agent = PerceptionAgent.from_script(["Yes."])
    agent.run("q", image=image, trace=tmp_path / "run")
    events = tmp_path / "run" / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join(lines[:-1]))
    (error,) = rows_from_trace(tmp_path / "run")
    assert "a run did not end" in str(error)


def test_run_folders_are_found(image: Image.Image, tmp_path: Path) -> None:
    agent = PerceptionAgent.from_script(["Yes."])
    for name in ("b", "a"):
        agent.run("q", image=image, trace=tmp_path / name)
    assert run_folders(tmp_path) == (tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match=r"no recorded runs here; where: .*; do: record with"):
        run_folders(tmp_path / "none")


def test_results_inside_a_turn_make_no_row(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script(["Yes."])
    trace = agent.run("q", image=image).trace
    changed = Trace()
    for event in trace.events:
        inline = event.type == "decoded"
        changed.emit(event.model_copy(update={"stop": "inline"}) if inline else event)
    (error,) = rows_from_trace(changed)
    assert "a result stands inside a turn" in str(error)


def test_a_trace_without_its_picture_makes_no_row(image: Image.Image) -> None:
    agent = PerceptionAgent.from_script(["Yes."])
    changed = Trace()
    for event in agent.run("q", image=image).trace.events:
        first = event.type == "run_started"
        changed.emit(event.model_copy(update={"views": ()}) if first else event)
    (error,) = rows_from_trace(changed)
    assert "a run shows a picture that its trace does not hold" in str(error)
    assert "got: image_1" in str(error)
