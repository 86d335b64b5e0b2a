"""The commands of ``bench`` as a user types them (``bench train``: test_train_command.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vpt_agent.bench.timeline import stages
from vpt_agent.cli import app
from vpt_agent.model.testing import tiny_model
from vpt_agent.trace import Trace

runner = CliRunner()
SMALL = ["--image", "84", "--new-tokens", "4", "--repeats", "1"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    model, processor = tiny_model(("clip",))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_answer_of_any_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    out, drawn = tmp_path / "answer.json", tmp_path / "answer.png"
    command = ["bench", "answer", "--model", str(checkpoint), *SMALL, "--out", str(out)]
    result = runner.invoke(app, [*command, "--picture", str(drawn)])
    assert result.exit_code == 0, result.stderr
    figures = json.loads(out.read_text())
    assert figures["model"] == "tiny"
    assert figures["settings"]["image"] == 84
    assert [row["name"] for row in figures["timeline"]] == [
        "look", "prefill", "decode", "tool", "append", "decode",
    ]  # fmt: skip
    assert all(row["end"] >= row["start"] >= 0 for row in figures["timeline"])
    for aim in figures["aims"]:
        assert f"{'met' if aim['met'] else 'missed'}: {aim['aim']}: " in result.stdout
    assert "limit / time: vision " in result.stdout
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_throughput_of_any_checkpoint(checkpoint: Path) -> None:
    command = ["bench", "throughput", "--model", str(checkpoint), *SMALL, "--questions", "2"]
    for way, least in (("host", 0.0), ("device", 0.6)):
        result = runner.invoke(app, [*command, "--json", "--decoding", way])
        assert result.exit_code == 0, result.stderr
        figures = json.loads(result.stdout)
        assert figures["settings"]["questions"] == 2
        assert figures["answers_equal"]
        assert (figures["chosen_on_device"] > least) == (way == "device")


def test_answer_with_weights_of_eight_bits(checkpoint: Path) -> None:
    pytest.importorskip("torchao")
    command = ["bench", "answer", "--model", str(checkpoint), *SMALL, "--weights", "int8"]
    result = runner.invoke(app, [*command, "--decoding", "device", "--json"])
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["model"] == "tiny, int8"
    assert figures["spoken"]["chosen_on_device"] > 0.6


def test_overlap_of_any_checkpoint(checkpoint: Path) -> None:
    command = ["bench", "overlap", "--model", str(checkpoint), *SMALL, "--force", "clip"]
    result = runner.invoke(app, [*command, "--questions", "2", "--large", "84", "--json"])
    assert result.exit_code == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["features"]["hidden_share"] == 0  # clip sees what the first look saw
    for what in ("features", "pictures"):
        assert figures[what]["ratio"]["wall"]["median"] > 0
        assert {"when_needed", "ahead"} <= set(figures[what])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "7b"], "unknown shape"),
        (["--dtype", "int4"], "unknown dtype"),
        (["--device", "abacus"], "unknown device"),
        (["--weights", "int3"], "unknown weights"),
        (["--decoding", "gpu"], "unknown way of decoding"),
        (["--force", "lookup"], "random weights have no such perception kind"),
        (["--compiled", "--threads", "2"], "the routines in C compute on one CPU thread"),
        (["--compiled", "--device", "cuda"], "the routines in C compute on one CPU thread"),
        (["--compiled", "--dtype", "float16"], "in float32 or bfloat16; where: --compiled"),
        (["--out", "no/such/folder/a.json"], "the file cannot be written; where: no/such/folder"),
        (["--out", "."], "the file cannot be written; where: .; got: a folder"),
        (["--picture", "no/such/folder/a.png"], "got: its folder does not exist"),
    ],
)
def test_what_cannot_be_measured_is_bad_input(options: list[str], message: str) -> None:
    result = runner.invoke(app, ["bench", "answer", *options])
    assert result.exit_code == 2
    assert message in result.stderr
    assert "timing" not in result.stderr  # said before anything is measured


def test_a_compiler_that_is_missing_is_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpt_agent.model import compiled

    monkeypatch.setattr(compiled, "_library", None)
    monkeypatch.setenv("CC", "/nonexistent")
    command = ["bench", "answer", "--model", str(checkpoint), *SMALL, "--compiled"]
    result = runner.invoke(app, command)
    assert result.exit_code == 1
    assert "there is no C compiler" in result.stderr
    assert "install gcc or clang" in result.stderr


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = runner.invoke(app, ["bench", "kernels", "--device", "cuda"])
    assert result.exit_code == 2
    assert "no CUDA device" in result.stderr


def test_kernels_and_import_print_their_aims() -> None:
    result = runner.invoke(app, ["bench", "kernels", "--repeats", "1"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("times faster than Pillow") == 2
    result = runner.invoke(app, ["bench", "import", "--repeats", "1", "--no-answer"])
    assert result.exit_code == 0, result.stderr
    assert "import vpt_agent, seconds" in result.stdout


def test_a_trace_without_events_has_no_stages() -> None:
    assert stages(Trace()) == []


def test_drawing_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from vpt_agent.bench.timeline import draw
    from vpt_agent.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"plots need matplotlib"):
        draw({}, tmp_path / "none.png")
    result = runner.invoke(app, ["bench", "answer", "--picture", str(tmp_path / "none.png")])
    assert result.exit_code == 1
    assert "plots need matplotlib" in result.stderr
    assert "timing" not in result.stderr
