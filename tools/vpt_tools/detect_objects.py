"""Find things with a YOLO model of ultralytics, whose licence is the AGPL."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from vpt_agent.errors import (
    CheckpointError,
    MissingExtraError,
    ModelRetry,
    ToolDefinitionError,
    ToolFailed,
    VPTError,
)
from vpt_agent.tool import PerceptionTool, PixelBox, ToolArguments, ToolContext, ToolOutput
from vpt_agent.tool.output import ToolReturn
from vpt_agent.types import Box, View
from vpt_tools import _draw

CHECKPOINT = "VPT_YOLO_CHECKPOINT"
"""Environment variable that names the checkpoint of the installed tool."""

AGPL = "ultralytics is under the AGPL-3.0: what you build on it must be, too, without its licence"

# Nothing is looked up, sent or installed, and no file may run code; read when it is imported.
_QUIET = {
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "ULTRALYTICS_SAFE_LOAD": "true",
    "YOLO_VERBOSE": "false",
}
_TASKS = ("detect", "segment", "pose")


class DetectArguments(ToolArguments):
    """What to find, where, and how sure."""

    labels: list[str] | None = Field(
        default=None, max_length=64, description="names of the things to find; all by default"
    )
    box: PixelBox | None = None
    confidence: float = Field(default=0.25, ge=0, le=1, description="least sureness, 0 to 1")
    most: int = Field(default=50, ge=1, le=300, description="how many things to tell at most")
    show: bool = Field(default=True, description="show the picture with the boxes, too")
    source: str | None = Field(
        default=None, description="id of the picture to look at; the latest one by default"
    )


class DetectObjects(PerceptionTool):
    """Find things in a picture or in a part of it: name, box and sureness of each."""

    name = "detect_objects"
    arguments = DetectArguments
    needs = frozenset({"view"})
    timeout = 120.0
    batch_size = 8
    extra = "yolo"
    licence = "Apache-2.0; ultralytics, which it calls: AGPL-3.0"

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        """``checkpoint``: a YOLO model's ``.pt`` file that finds boxes (or outlines, or poses).
        Without it, what VPT_YOLO_CHECKPOINT names."""
        self._given = checkpoint
        self._model: Any = None
        self._device = "cpu"

    @property
    def checkpoint(self) -> str:
        """The checkpoint in use, or an empty text."""
        return str(self._given or os.environ.get(CHECKPOINT, ""))

    def lacks(self) -> VPTError | None:
        """ultralytics, or a checkpoint."""
        if find_spec("ultralytics") is None:
            return MissingExtraError(
                "detect_objects needs the extra yolo",
                got=f"ultralytics is not installed ({AGPL})",
                fix="pip install 'vpt-agent[yolo]', with a torchvision that belongs to this torch",
            )
        name = self.checkpoint
        if not name:
            return CheckpointError(
                "detect_objects has no YOLO checkpoint",
                expected="a .pt file",
                fix=f"make one with DetectObjects('yolo.pt') of vpt_tools.detect_objects, or set "
                f"{CHECKPOINT}",
            )
        if not Path(name).is_file():
            # Else ultralytics would look for it on the network.
            return CheckpointError("there is no such YOLO checkpoint", where=name)
        if not name.endswith(".pt"):
            return CheckpointError("a YOLO checkpoint is a .pt file", got=name)
        return None

    def setup(self, device: str) -> None:
        """Load the model: weights and known classes only, never code."""
        error = self.lacks()
        if error is not None:
            raise error
        tasks, yolo = _ultralytics()
        if not getattr(tasks, "SAFE_LOAD", False) or not _can_load_safely(tasks):
            raise ToolDefinitionError(
                "ultralytics would run code that a checkpoint holds",
                where="detect_objects",
                got="its restricted loading is off, or this version has none",
                fix="set ULTRALYTICS_SAFE_LOAD=true before anything imports ultralytics, and use "
                "ultralytics 8.4 or newer",
            )
        try:
            model = yolo(self.checkpoint)
        except (TypeError, RuntimeError, OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                "this YOLO checkpoint cannot be loaded",
                where=self.checkpoint,
                got=(str(error).splitlines() or [type(error).__name__])[0],
                expected="a .pt file of ultralytics; files that hold other classes are not loaded",
            ) from error
        if model.task not in _TASKS:
            raise CheckpointError(
                "this YOLO model finds no boxes",
                where=self.checkpoint,
                got=f"its task is {model.task!r}",
                expected=" or ".join(_TASKS),
            )
        self._model, self._device = model, device

    def close(self) -> None:
        """Let go of the model."""
        self._model = None

    def run_batch(self, items: Sequence[tuple[DetectArguments, ToolContext]]) -> list[ToolReturn]:
        """All pictures in one pass through the model."""
        if self._model is None:
            raise ToolFailed("detect_objects is not set up")
        parts: list[View | ModelRetry] = [self._part(*item) for item in items]
        found = iter(self._found([p for p in parts if isinstance(p, View)], items))
        return [
            part
            if isinstance(part, ModelRetry)
            else self._told(arguments, context, part, next(found))
            for part, (arguments, context) in zip(parts, items, strict=True)
        ]

    def _part(self, arguments: DetectArguments, context: ToolContext) -> View | ModelRetry:
        """The part of the view to look at; or why there is none, for this call alone."""
        view = context.require_view()
        try:
            for label in arguments.labels or ():
                self._class(label)
            return view if arguments.box is None else context.crop(view, Box(*arguments.box))
        except ModelRetry as error:
            return error

    def _class(self, label: str) -> str:
        names = {str(n).lower(): str(n) for n in self._model.names.values()}
        if label.strip().lower() in names:
            return names[label.strip().lower()]
        close = difflib.get_close_matches(label.lower(), names, n=3) or list(names)[:12]
        raise ModelRetry(f"this detector knows no {label[:40]!r}; it knows {', '.join(close)}")

    def _found(
        self, parts: Sequence[View], items: Sequence[tuple[DetectArguments, ToolContext]]
    ) -> list[list[tuple[str, float, list[float]]]]:
        """Name, sureness and box (pixels of the part) of all that the model finds."""
        if not parts:
            return []
        least = min(arguments.confidence for arguments, _ in items)
        results = self._model.predict(
            [part.image for part in parts],
            conf=least,
            max_det=300,
            device=self._device,
            verbose=False,
        )
        names = self._model.names
        return [
            [
                (str(names[int(number)]), float(sure), [float(v) for v in box])
                for number, sure, box in zip(
                    r.boxes.cls.tolist(), r.boxes.conf.tolist(), r.boxes.xyxy.tolist(), strict=True
                )
            ]
            for r in results
        ]

    def _told(
        self,
        arguments: DetectArguments,
        context: ToolContext,
        part: View,
        found: Sequence[tuple[str, float, list[float]]],
    ) -> ToolOutput:
        """The result of one call, in pixels of its view."""
        from vpt_agent.vision.frames import to_original, to_view

        view = context.require_view()
        wanted = None if arguments.labels is None else {self._class(x) for x in arguments.labels}
        kept = [
            (name, sure, list(to_view(to_original(box, part), view)))
            for name, sure, box in sorted(found, key=lambda item: -item[1])
            if sure >= arguments.confidence and (wanted is None or name in wanted)
        ][: arguments.most]
        things = [
            {"label": name, "confidence": round(sure, 4), "box": [round(v, 1) for v in box]}
            for name, sure, box in kept
        ]
        lines = [
            f"{i}. {name} [{', '.join(f'{v:.0f}' for v in box)}] ({sure:.2f})"
            for i, (name, sure, box) in enumerate(kept, 1)
        ]
        width, height = view.size
        many = "thing" if len(kept) == 1 else "things"
        head = f"Found {len(kept)} {many}; boxes in pixels of {view.id} ({width} x {height}):"
        drawn = []
        if arguments.show and kept:
            named = [(box, f"{i} {name}") for i, (name, _, box) in enumerate(kept, 1)]
            drawn = [context.redrawn(view, _draw.boxes(view.image, named))]
        return ToolOutput(
            views=drawn,
            text="\n".join([head, *lines]) if kept else "Nothing of that was found.",
            structured={"of": view.id, "things": things},
        )


def _ultralytics() -> tuple[Any, Any]:
    """The module that loads checkpoints, and the class ``YOLO``."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        from ultralytics import YOLO
        from ultralytics.nn import tasks
    except (ImportError, RuntimeError, OSError) as error:
        raise MissingExtraError(
            "ultralytics cannot be imported: it needs a working torchvision",
            got=f"{type(error).__name__}: {error}",
            fix="install the torchvision that belongs to this torch",
        ) from error
    return tasks, YOLO


def _can_load_safely(tasks: Any) -> bool:
    return bool(getattr(getattr(tasks, "_SafeLoad", None), "SUPPORTED", False))


detect_objects = DetectObjects()
