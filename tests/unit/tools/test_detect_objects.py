"""detect_objects around a model whose findings are known; what it lacks; what is wrong.

With a YOLO model of ultralytics: tests/unit/tools/test_torchvision.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.unit.tools.world import call, context, scene, told, view
from vpt_agent.errors import CheckpointError, MissingExtraError, ToolDefinitionError, ToolFailed
from vpt_agent.tool import execute_batch
from vpt_agent.types import ToolCall
from vpt_tools import detect_objects as module
from vpt_tools.detect_objects import CHECKPOINT, DetectObjects


class Yolo:
    """Finds the red and the blue square, wherever they are, and something unsure."""

    names = {0: "red thing", 1: "blue thing", 2: "ghost"}  # noqa: RUF012 - as ultralytics has it
    task = "detect"

    def __init__(self, path: str = "") -> None:
        self.passes: list[int] = []

    def predict(self, images: list[Any], *, conf: float, **_: object) -> list[Any]:
        self.passes.append(len(images))
        return [self._one(image, conf) for image in images]

    def _one(self, image: Any, conf: float) -> Any:
        rows = [(2, 0.3, (0.0, 0.0, 5.0, 5.0))]
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3)
        for number, channel, sure in ((0, 0, 0.9), (1, 2, 0.8)):
            at = (pixels[..., channel] == 255).nonzero()
            if len(at):
                (top, left), (bottom, right) = at.amin(0).tolist(), at.amax(0).tolist()
                rows.append((number, sure, (left, top, right + 1.0, bottom + 1.0)))
        rows = [row for row in rows if row[1] >= conf]
        return SimpleNamespace(
            boxes=SimpleNamespace(
                cls=torch.tensor([r[0] for r in rows]),
                conf=torch.tensor([r[1] for r in rows]),
                xyxy=torch.tensor([r[2] for r in rows]),
            )
        )


SAFE = SimpleNamespace(SAFE_LOAD=True, _SafeLoad=SimpleNamespace(SUPPORTED=True))


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DetectObjects:
    """The tool with its own way of setting up, and the known model in place of ultralytics."""
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    monkeypatch.setattr(module, "_ultralytics", lambda: (SAFE, Yolo))
    path = tmp_path / "known.pt"
    path.touch()
    return DetectObjects(path)


def test_things_with_their_boxes_and_a_picture(tool: DetectObjects) -> None:
    result = call(tool)
    assert result.structured == {
        "of": "image_1",
        "things": [
            {"label": "red thing", "confidence": 0.9, "box": [20, 30, 40, 50]},
            {"label": "blue thing", "confidence": 0.8, "box": [120, 40, 160, 80]},
            {"label": "ghost", "confidence": 0.3, "box": [0, 0, 5, 5]},
        ],
    }
    assert str(result.text).splitlines()[:2] == [
        "Found 3 things; boxes in pixels of image_1 (200 x 100):",
        "1. red thing [20, 30, 40, 50] (0.90)",
    ]
    (shown,) = result.views
    assert (shown.parent, shown.size) == ("image_1", (200, 100))
    assert shown.image.getpixel((39, 49)) == (0, 229, 255)
    assert call(tool, show=False).views == ()


def test_only_what_is_asked_for(tool: DetectObjects) -> None:
    def labels(**arguments: object) -> list[str]:
        result = call(tool, **arguments)
        assert result.ok, result.error
        return [thing["label"] for thing in result.structured["things"]]

    assert labels(confidence=0.5) == ["red thing", "blue thing"]
    assert labels(labels=["Blue Thing"]) == ["blue thing"]
    assert labels(most=1) == ["red thing"]
    nothing = call(tool, labels=["ghost"], confidence=0.9)
    assert nothing.text == "Nothing of that was found."
    assert nothing.views == ()


def test_boxes_from_a_part_are_those_of_the_view(tool: DetectObjects) -> None:
    result = call(tool, box=[100, 20, 180, 100], confidence=0.5)
    assert result.structured["things"] == [
        {"label": "blue thing", "confidence": 0.8, "box": [120, 40, 160, 80]}
    ]


def test_calls_of_a_batch_go_through_the_model_together(tool: DetectObjects) -> None:
    """A wrong call among them is told, and touches no other."""
    around = context(view(), view(scene((300, 100)), "image_2"))
    arguments: list[dict[str, object]] = [
        {"source": "image_1", "confidence": 0.5},
        {"labels": ["elephant"]},
        {"source": "image_2", "confidence": 0.25},
    ]
    calls = [ToolCall(f"c{i}", tool.name, a, "json") for i, a in enumerate(arguments)]
    first, wrong, last = execute_batch(tool, [(c, lambda: around) for c in calls])
    assert len(first.structured["things"]) == 2
    assert len(last.structured["things"]) == 3
    assert told(wrong)[1].startswith("this detector knows no 'elephant'; it knows red thing")
    assert isinstance(tool._model, Yolo)
    assert tool._model.passes == [2]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"labels": ["red thin"]}, "invalid_arguments", "it knows red thing"),
        ({"box": [300, 0, 400, 9]}, "box_outside", "outside the picture"),
        ({"box": [5, 5, 5, 9]}, "box_too_small", "no area"),
        ({"confidence": 2}, "invalid_arguments", "confidence"),
        ({"labels": {"a": 1}}, "invalid_arguments", "labels"),
        ({"source": "x"}, "unknown_source", "no view 'x'"),
    ],
)
def test_what_is_wrong_is_told(
    tool: DetectObjects, arguments: dict[str, object], kind: str, message: str
) -> None:
    found, said = told(call(tool, **arguments))
    assert found == kind
    assert message in said


def test_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CHECKPOINT, raising=False)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"extra yolo; .*AGPL-3.0.*vpt-agent\[yolo\]"):
        call(DetectObjects("x.pt"))
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    with pytest.raises(CheckpointError, match=r"no YOLO checkpoint.*VPT_YOLO_CHECKPOINT"):
        call(DetectObjects())
    with pytest.raises(CheckpointError, match=r"no such YOLO checkpoint; where: yolo11n\.pt"):
        call(DetectObjects("yolo11n.pt"))
    (tmp_path / "x.onnx").touch()
    monkeypatch.setenv(CHECKPOINT, str(tmp_path / "x.onnx"))
    with pytest.raises(CheckpointError, match=r"is a .pt file; got: .*x\.onnx"):
        call(DetectObjects())


def test_checkpoints_that_cannot_be_used(
    tool: DetectObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Classifier(Yolo):
        task = "classify"

    class Broken:
        def __init__(self, path: str) -> None:
            raise TypeError("references types outside the supported format")

    unsafe = SimpleNamespace(SAFE_LOAD=False, _SafeLoad=SimpleNamespace(SUPPORTED=True))
    old = SimpleNamespace(SAFE_LOAD=True)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (SAFE, Classifier, CheckpointError, "finds no boxes; .*its task is 'classify'"),
        (SAFE, Broken, CheckpointError, "cannot be loaded; .*outside the supported format"),
        (unsafe, Yolo, ToolDefinitionError, "would run code that a checkpoint holds"),
        (old, Yolo, ToolDefinitionError, "would run code; |this version has none"),
    ]
    for tasks, made, error, message in cases:
        monkeypatch.setattr(module, "_ultralytics", lambda t=tasks, m=made: (t, m))
        with pytest.raises(error, match=message):
            tool.setup("cpu")


def test_run_by_hand_without_setup_is_told(tool: DetectObjects) -> None:
    with pytest.raises(ToolFailed, match="detect_objects is not set up"):
        tool.run_batch([(tool.arguments(), context())])  # type: ignore[operator]
