"""What a person sees of ``vpt-agent ask``: output, messages and exit codes, with a fake agent."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from vpt_agent.cli import app
from vpt_agent.cli import ask as ask_module
from vpt_agent.errors import CheckpointError, InternalError
from vpt_agent.types import (
    Answer,
    Box,
    CallError,
    Limits,
    RunStatus,
    ToolCall,
    ToolResult,
    Usage,
    View,
)


def answer_with(
    status: RunStatus = "answered",
    limit: str | None = None,
    error: CallError | None = None,
    warnings: tuple[str, ...] = (),
) -> Answer:
    crop = View("view-2", Image.new("RGB", (8, 8)), "view-1", Box(10, 20, 30, 40), (99, 99))
    call = ToolCall("call-1", "crop_region", {"x_min": 1}, "sampled")
    views = () if error else (crop,)
    result = ToolResult("call-1", "crop_region", views=views, error=error)
    return Answer(
        text="K7Q",
        calls=(call,),
        results=(result,),
        views=(crop,),
        usage=Usage(sampled_tokens=4),
        warnings=warnings,
        trace=None,  # type: ignore[arg-type] # no command reads it
        status=status,
        limit=limit,
    )


@dataclass
class FakeAgent:
    """Keeps what it was asked, and gives the answer or raises the error it was made with."""

    answer: Answer = field(default_factory=answer_with)
    error: Exception | None = None
    loaded: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)

    def load(self, model: str | None, **options: Any) -> FakeAgent:
        self.loaded = {"model": model, **options}
        return self

    def run(self, question: str, **options: Any) -> Answer:
        if self.error is not None:
            raise self.error
        self.asked = {"question": question, **options}
        return self.answer


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> FakeAgent:
    fake = FakeAgent()
    monkeypatch.setattr(ask_module, "load_agent", fake.load)
    return fake


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "shelf.png"
    Image.new("RGB", (8, 8)).save(path)
    return str(path)


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["ask", *words])


def test_the_answer_alone_is_on_standard_output(agent: FakeAgent, picture: str) -> None:
    result = run(picture, "What is on the red tag?")
    assert result.exit_code == 0
    assert result.stdout == "K7Q\n"
    assert "call: crop_region view-2 = 10, 20, 30, 40 of view-1" in result.stderr


def test_defaults_are_the_librarys(agent: FakeAgent, picture: str) -> None:
    run(picture, "What?")
    assert agent.loaded["model"] is None
    assert (agent.loaded["device"], agent.loaded["dtype"]) == ("auto", "auto")
    assert agent.asked == {
        "question": "What?",
        "image": [Path(picture)],
        "tool_choice": "auto",
        "limits": Limits(),
        "seed": None,
        "trace": None,
        "temperature": 0.0,
    }


def test_every_option_arrives(agent: FakeAgent, picture: str, tmp_path: Path) -> None:
    options = (
        "--model m --tool-choice crop_region --device cpu --dtype float32 --seed 3 "
        f"--max-new-tokens 9 --temperature 0.5 --trace {tmp_path / 'run'}"
    )
    result = run(picture, "What?", *options.split())
    assert result.exit_code == 0
    assert agent.loaded["model"] == "m"
    assert (agent.loaded["device"], agent.loaded["dtype"]) == ("cpu", "float32")
    assert agent.asked["tool_choice"] == "crop_region"
    assert agent.asked["limits"] == Limits(new_tokens=9)
    assert (agent.asked["seed"], agent.asked["temperature"]) == (3, 0.5)
    assert agent.asked["trace"] == tmp_path / "run"
    assert f"vpt-agent trace show {tmp_path / 'run'}" in result.stderr


def test_several_pictures_in_either_way(agent: FakeAgent, picture: str) -> None:
    run(picture, picture, "Which?")
    assert agent.asked["image"] == [Path(picture)] * 2
    run("Which?", "--image", picture, "--image", picture)
    assert agent.asked["image"] == [Path(picture)] * 2
    assert agent.asked["question"] == "Which?"


def test_json_has_the_promised_keys(agent: FakeAgent, picture: str) -> None:
    agent.answer = answer_with(warnings=("it knows its scenes only",))
    result = run(picture, "What?", "--json")
    told = json.loads(result.stdout)
    assert told["answer"] == "K7Q"
    assert told["calls"][0]["name"] == "crop_region"
    assert told["usage"]["new_tokens"] == 4
    assert told["warnings"] == ["it knows its scenes only"]
    assert "warning: it knows its scenes only" in result.stderr


def test_a_failed_call_is_said(agent: FakeAgent, picture: str) -> None:
    agent.answer = answer_with(error=CallError("box_too_small", "the box is empty"))
    assert "call: crop_region failed: the box is empty" in run(picture, "What?").stderr


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (answer_with("limit", "new_tokens"), "error: the run stopped at the limit 'new_tokens'"),
        (answer_with("failed"), "error: the run failed"),
    ],
)
def test_a_run_that_did_not_answer_exits_1(
    agent: FakeAgent, picture: str, answer: Answer, message: str
) -> None:
    agent.answer = answer
    result = run(picture, "What?")
    assert result.exit_code == 1
    assert result.stdout == "K7Q\n"
    assert message in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CheckpointError("weights are missing", got="lm_head.weight", fix="copy them"), 2),
        (InternalError("two rows took one slot"), 1),
    ],
)
def test_errors_are_one_message_and_a_code(
    agent: FakeAgent, picture: str, error: Exception, code: int
) -> None:
    agent.error = error
    result = run(picture, "What?")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == f"error: {error}\n"


def test_a_bug_keeps_its_traceback(agent: FakeAgent, picture: str) -> None:
    agent.error = KeyError("bug")
    assert isinstance(run(picture, "What?").exception, KeyError)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["What is this?"], "a picture and a question are needed; got: What is this?"),
        (["nowhere.png", "What?"], "there is no such picture file; got: nowhere.png"),
        (["PICTURE", "  "], "the question is empty"),
        (["PICTURE", "PICTURE"], "the last argument is the question, and this is a file"),
    ],
)
def test_bad_input_exits_2_before_anything_is_loaded(
    agent: FakeAgent, picture: str, words: list[str], message: str
) -> None:
    result = run(*(picture if w == "PICTURE" else w for w in words))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")
    assert 'do: vpt-agent ask PICTURE... "QUESTION"' in result.stderr
    assert agent.loaded == {}


@pytest.mark.parametrize(
    "options",
    [["--max-new-tokens", "0"], ["--temperature", "-1"], ["--seed", "x"], ["--no-such-option"], []],
)
def test_bad_usage_exits_2(agent: FakeAgent, picture: str, options: list[str]) -> None:
    words = [picture, "What?"] if options else []
    result = run(*words, *options)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr
    assert agent.loaded == {}


def test_a_checkpoint_that_is_not_there_exits_2(picture: str, tmp_path: Path) -> None:
    """With the real loader: what transformers raises is not a UserError."""
    result = run(picture, "What?", "--model", str(tmp_path / "nowhere"))
    assert result.exit_code == 2
    assert "error: " in result.stderr
    assert str(tmp_path / "nowhere") in result.stderr


TOOL = """
from PIL import ImageOps
from vpt_agent import ToolContext, ToolOutput, perception_tool
from vpt_agent.tool import GridBoxes
from vpt_tools.crop_region import crop_region as ours

@perception_tool(name="crop_region", version=3)
def crop_inverted(context: ToolContext, region: GridBoxes, source: str | None = None) -> ToolOutput:
    '''Look closer, at the negative.'''
    crops = ours(context, region=region)
    views = [context.redrawn(view, ImageOps.invert(view.image)) for view in crops]
    return ToolOutput(views=views, metadata={"negative": True})
"""


def test_tools_are_mounted_by_name_file_or_module(
    agent: FakeAgent, picture: str, tmp_path: Path
) -> None:
    file = tmp_path / "negative.py"
    file.write_text(TOOL)
    result = run(picture, "What?", "--tool", str(file), "--tool", "measure")
    assert result.exit_code == 0, result.stderr
    assert [t.full_name for t in agent.loaded["tools"]] == ["crop_region@3", "measure@1"]
    run(picture, "What?")
    assert agent.loaded["tools"] == []


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("nowhere.py", "error: there is no such file of tools; got: nowhere.py"),
        (
            "no_such_tool",
            "error: there is no such tool; got: no_such_tool; expected: compare_views",
        ),
        ("json", "error: this module defines no tool; where: json"),
        ("segment", "error: segment has no SAM checkpoint"),
    ],
)
def test_a_tool_that_cannot_be_mounted_exits_2_before_anything_is_loaded(
    agent: FakeAgent, picture: str, tool: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VPT_SAM_CHECKPOINT", raising=False)
    result = run(picture, "What?", "--tool", tool)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert agent.loaded == {}


def test_the_model_that_ships_calls_a_mounted_tool(tmp_path: Path) -> None:
    """With the real loader: a newer version of the tool that it was trained with."""
    from vpt_agent.nano.scene import make_scene

    file, picture, trace = tmp_path / "negative.py", tmp_path / "scene.png", tmp_path / "run"
    file.write_text(TOOL)
    make_scene(7).image.save(picture)
    words = [str(picture), "What is written on the red tag?", "--tool", str(file)]
    result = run(*words, "--tool-choice", "crop_region", "--trace", str(trace), "--device", "cpu")
    assert "call: crop_region" in result.stderr
    events = (trace / "events.jsonl").read_text(encoding="utf-8")
    assert '"negative": true' in events or '"negative":true' in events


def test_how_fast_it_is_goes_to_loading(agent: FakeAgent, picture: str) -> None:
    options = ["--weights", "int8", "--decoding", "host", "--compiled"]
    result = run(picture, "What?", *options)
    assert result.exit_code == 0, result.stderr
    assert agent.loaded["weights"] == "int8"
    assert agent.loaded["decoding"] == "host"
    assert agent.loaded["compiled"] is True


@pytest.mark.parametrize(("option", "value"), [("--weights", "int3"), ("--decoding", "sideways")])
def test_what_no_model_can_do_is_bad_input(option: str, value: str, picture: str) -> None:
    result = run(picture, "What?", option, value)
    assert result.exit_code == 2
    assert value in result.stderr
    assert "Traceback" not in result.stderr
