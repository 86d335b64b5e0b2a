"""The script for a machine with a GPU, run dry: every step does its work and writes its file."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # for its dataclass
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_step_runs_dry(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "run_tests", lambda plan, paths, *_: {"paths": paths, "passed": True})
    assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    found = {p.stem: json.loads(p.read_text()) for p in tmp_path.iterdir()}
    assert set(found) == set(gpu.STEPS) == set(gpu.LIMITS)
    assert len(found) <= 8, "no more files come back"
    for figures in found.values():
        assert figures["dry_run"]
        assert figures["machine"]["device"] == "cpu"
        assert "failed" not in figures
    for path in found["parity"]["tests"]["paths"] + found["kernels"]["tests"]["paths"]:
        assert (SCRIPT.parents[1] / path).exists()
    host, device = found["one"]["decode"]
    assert (host["chosen_on_device"], host["bare_step"]) == (0, None)
    assert device["chosen_on_device"] > 0.9
    assert device["bare_step"] > 0
    assert [f["rows"] for f in found["many"]["decode"]] == [2, 3]
    assert all(f["tokens_a_second"] > 0 for f in found["many"]["decode"])
    assert found["answer"]["tokens_equal"]
    assert found["answer"]["spoken"]["chosen_on_device"] > 0.7
    assert found["throughput"]["answers_equal"]


def test_a_step_that_fails_loses_no_other(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(plan: object) -> dict[str, object]:
        raise RuntimeError("the device fell off")

    monkeypatch.setitem(gpu.STEPS, "one", broken)
    monkeypatch.setitem(gpu.STEPS, "many", lambda plan: {"fine": True})
    steps = ["--step", "one", "--step", "many"]
    assert gpu.main(["--dry-run", "--out", str(tmp_path), *steps]) == 1
    assert "the device fell off" in json.loads((tmp_path / "one.json").read_text())["failed"]
    assert json.loads((tmp_path / "many.json").read_text())["fine"]


def test_a_machine_without_a_gpu_is_told_at_once(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path / "none")])
    assert "no CUDA device; try --dry-run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_step_that_hangs_is_stopped(gpu: ModuleType, tmp_path: Path) -> None:
    assert not gpu.run_apart("many", tmp_path, "cpu", 0.1)
    assert "took longer" in json.loads((tmp_path / "many.json").read_text())["failed"]


@pytest.mark.slow
def test_the_tests_that_it_names_can_be_collected(gpu: ModuleType, tmp_path: Path) -> None:
    plan = gpu.Plan(gpu.torch.device("cpu"), True)
    found = gpu.run_tests(plan, ["tests/unit/tokens/test_automaton.py"])
    assert found["passed"]
    assert any("test_automaton" in line for line in found["output"])
    late = gpu.run_tests(plan, ["tests/unit/tokens/test_automaton.py"], 0.01)
    assert (late["passed"], late["stopped_after"]) == (False, 0.01)
