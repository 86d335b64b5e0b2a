"""What needs a working torchvision: YOLO by ultralytics, `.pth` files by segment-anything.

Beside a CPU-only torch there is none on the registries, so these tests skip in the usual
environment; .ci/run makes one for them where it can.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.tools.world import call, context, scene, view
from vpt_agent.errors import CheckpointError, MissingExtraError
from vpt_tools._sam import OriginalSam, Prompt, TransformersSam
from vpt_tools.detect_objects import DetectObjects
from vpt_tools.segment import Segment


def _works(*names: str) -> str:
    """Why these packages cannot be imported; nothing if they can."""
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError, OSError) as error:
            return f"{name} does not work here ({type(error).__name__}: {str(error)[:80]})"
    return ""


NO_TORCHVISION = _works("torchvision")
NO_SAM = NO_TORCHVISION or _works("segment_anything")
with_sam = pytest.mark.skipif(bool(NO_SAM), reason=NO_SAM)
with_yolo = pytest.mark.skipif(
    bool(NO_TORCHVISION) or importlib.util.find_spec("ultralytics") is None,
    reason=NO_TORCHVISION or "ultralytics is not installed (extra yolo)",
)


def test_without_a_working_torchvision_the_errors_say_so(tmp_path: Path) -> None:
    """Here and now, as far as it is true here."""
    if NO_SAM and importlib.util.find_spec("segment_anything") is not None:
        file = tmp_path / "sam.pth"
        torch.save({}, file)
        with pytest.raises(MissingExtraError, match=r"working torchvision.*convert_sam"):
            OriginalSam(file, "cpu")
    elif not NO_SAM:
        assert importlib.import_module("torchvision.ops").nms is not None


@pytest.fixture(scope="module")
def sam_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.unit.tools.original_sam import tiny_sam

    path = tmp_path_factory.mktemp("sam") / "tiny.pth"
    torch.save(tiny_sam(seed=3).state_dict(), path)
    return path


@with_sam
def test_an_original_checkpoint_and_its_conversion_find_the_same(
    sam_file: Path, tmp_path: Path
) -> None:
    from vpt_agent.model.sam_checkpoint import convert_sam

    original = OriginalSam(sam_file, "cpu")
    ours = TransformersSam(convert_sam(sam_file, tmp_path / "converted"), "cpu")
    seen = view(scene((200, 100)))
    for prompt in (
        Prompt([(30.0, 40.0)], [True], None),
        Prompt([(30.0, 40.0), (150.0, 20.0)], [True, False], None),
        Prompt([], [], (20.0, 10.0, 150.0, 90.0)),
    ):
        a, b = original.find(seen, prompt), ours.find(seen, prompt)
        assert a.mask.shape == b.mask.shape == (100, 200)
        assert a.quality == pytest.approx(b.quality, abs=1e-2)
        assert (a.mask != b.mask).mean() < 0.02  # the resize of the picture differs a little
        assert 0 < np.mean(a.mask) < 1


@with_sam
def test_the_tool_takes_an_original_checkpoint(sam_file: Path, tmp_path: Path) -> None:
    tool = Segment(sam_file)
    assert tool.lacks() is None
    result = call(tool, points=[[30, 40]])
    assert result.ok, result.error
    assert tool._sam is not None
    state = torch.load(sam_file, weights_only=True)
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 3)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"do not fit each other; where: .*bad\.pth"):
        call(Segment(tmp_path / "bad.pth"), points=[[30, 40]])


@pytest.fixture(scope="module")
def yolo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLO model of random weights, saved as ultralytics saves them; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("yolo")
    os.environ.setdefault("YOLO_CONFIG_DIR", str(folder))
    from vpt_tools.detect_objects import _ultralytics

    tasks, yolo = _ultralytics()
    assert tasks.SAFE_LOAD
    torch.manual_seed(0)
    made = yolo("yolo11n.yaml")
    path = folder / "random.pt"
    made.save(str(path))
    return path


@with_yolo
def test_a_yolo_checkpoint_finds_boxes(yolo_file: Path) -> None:
    tool = DetectObjects(yolo_file)
    assert tool.lacks() is None
    around = context(view(scene((160, 120))))
    result = call(tool, around, confidence=0.0, most=5)
    assert result.ok, result.error
    things: list[dict[str, Any]] = result.structured["things"]
    assert len(things) == 5
    for thing in things:
        left, top, right, bottom = thing["box"]
        assert 0 <= left <= right <= 160
        assert 0 <= top <= bottom <= 120
        assert thing["label"] in tool._model.names.values()
    (shown,) = result.views
    assert shown.size == (160, 120)
    part = call(tool, around, confidence=0.0, most=3, box=[80, 60, 160, 120])
    assert all(thing["box"][0] >= 80 for thing in part.structured["things"])
    assert call(tool, around, confidence=1.0).text == "Nothing of that was found."
    tool.release()


@with_yolo
def test_a_checkpoint_that_holds_code_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bad:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("echo run > ran",)

    monkeypatch.chdir(tmp_path)
    for name, content in (("bad.pt", {"model": Bad()}), ("other.pt", {"a": 1})):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=r"cannot be loaded; where: .*\.pt"):
            call(DetectObjects(tmp_path / name))
    (tmp_path / "empty.pt").touch()
    with pytest.raises(CheckpointError, match=r"cannot be loaded; where: .*empty\.pt"):
        call(DetectObjects(tmp_path / "empty.pt"))
    assert not (tmp_path / "ran").exists()
