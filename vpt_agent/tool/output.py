"""What a tool may give back, and how it becomes a :class:`vpt_agent.types.ToolResult`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pydantic import JsonValue
from pydantic_core import PydanticSerializationError, to_jsonable_python

from vpt_agent.errors import ToolDefinitionError, ToolFailed
from vpt_agent.tool.text import one_line
from vpt_agent.types import Box, ToolCall, ToolResult, View, VisualFeatures

if TYPE_CHECKING:
    from PIL import Image

    from vpt_agent.tool.context import ToolContext

LONGEST_TEXT: Final = 20_000
"""Letters of a result's text that a model is told; the trace has all. Half a million took
15 seconds to become tokens, before the limit on context left them out."""


@dataclass(frozen=True, kw_only=True)
class ToolOutput:
    """A result with several parts. ``views`` may be pictures too; ``structured`` is anything that
    JSON can say; ``metadata`` is kept in the trace and never shown to the model; ``kernels`` names
    the device kernels that ran."""

    views: Sequence[View | Image.Image] = ()
    features: VisualFeatures | None = None
    text: str | None = None
    structured: object = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    kernels: Sequence[str] = ()


if TYPE_CHECKING:
    _One = str | View | Image.Image | VisualFeatures | Mapping[str, object] | ToolOutput
    ToolReturn = _One | Sequence[_One] | Exception
else:
    ToolReturn = object


def to_result(
    owner: str,
    call: ToolCall,
    output: object,
    context: ToolContext,
    seconds: float,
    metadata: Mapping[str, object] | None = None,
) -> ToolResult:
    """The result of a call. Raises :class:`ToolDefinitionError` for what no result can be.

    A picture that is no :class:`View` becomes an original of its own: nothing says which part of
    the original it shows (:meth:`ToolContext.crop` and :meth:`ToolContext.redrawn` do).
    ``metadata`` is what the call path has to say; the tool's own goes over it. A text of more than
    LONGEST_TEXT letters is cut, and stands whole in ``metadata["whole_text"]``.
    """
    merged = _Merged(owner, call, context)
    for part in output if isinstance(output, list | tuple) else [output]:
        merged.take(part)
    text = "\n".join(merged.text) if merged.text else None
    if text is None and merged.structured:
        # The model reads text; without any it would not learn the values.
        text = json.dumps(merged.plain(), ensure_ascii=False)
    if text is not None and len(text) > LONGEST_TEXT:
        merged.metadata["whole_text"] = text
        text = f"{text[:LONGEST_TEXT]}\n[cut: {len(text) - LONGEST_TEXT} more letters]"
    return ToolResult(
        call_id=call.id,
        name=call.name,
        views=tuple(merged.views),
        features=merged.features,
        text=text,
        structured=merged.plain(),
        metadata=dict(metadata or {}) | merged.metadata,
        kernels=tuple(dict.fromkeys(merged.kernels)),
        seconds=seconds,
    )


class _Merged:
    def __init__(self, owner: str, call: ToolCall, context: ToolContext) -> None:
        self.owner, self.call, self.context = owner, call, context
        self.views: list[View] = []
        self.features: VisualFeatures | None = None
        self.text: list[str] = []
        self.structured: list[JsonValue] = []
        self.metadata: dict[str, object] = {}
        self.kernels: list[str] = []

    def take(self, part: object) -> None:
        if isinstance(part, ToolOutput):
            for view in part.views:
                self.picture(view)
            if part.features is not None:
                self.visual(part.features)
            if part.text is not None:
                self.text.append(part.text)
            if part.structured is not None:
                self.structured.append(self.json(part.structured))
            self.metadata |= part.metadata
            self.kernels += part.kernels
        elif isinstance(part, str):
            self.text.append(part)
        elif isinstance(part, VisualFeatures):
            self.visual(part)
        elif isinstance(part, Mapping):
            self.structured.append(self.json(part))
        else:
            self.picture(part)

    def visual(self, features: VisualFeatures) -> None:
        if self.features is not None:
            raise ToolDefinitionError(
                "a call gives visual features once", where=self.owner, got="two of them"
            )
        self.features = features
        if features.kernel:
            self.kernels.append(features.kernel)

    def picture(self, part: object) -> None:
        if isinstance(part, View):
            self.views.append(part)
            return
        from PIL import Image

        if not isinstance(part, Image.Image):
            raise ToolDefinitionError(
                "a tool gave something that no result can be",
                where=self.owner,
                got=f"{type(part).__module__}.{type(part).__qualname__}",
                expected="text, a View, a PIL image, VisualFeatures, a dict, ToolOutput, or a list",
            )
        if 0 in part.size:
            raise ToolFailed("the tool made a picture without pixels")
        from vpt_agent.vision.images import load_image

        view_id, image = self.free_id(), load_image(part)
        parent = self.context.view.id if self.context.view is not None else None
        box = Box(0, 0, *image.size)
        self.views.append(
            View(view_id, image, view_id, box, image.size, parent, origin=self.call.name)
        )

    def free_id(self) -> str:
        taken = {view.id for view in self.views} | set(self.context.views)
        number = 1
        while f"{self.call.id}.p{number}" in taken:
            number += 1
        return f"{self.call.id}.p{number}"

    def json(self, value: object) -> JsonValue:
        try:
            return _finite(to_jsonable_python(value, fallback=_plain))
        except (PydanticSerializationError, TypeError, ValueError) as error:
            raise ToolDefinitionError(
                "a tool gave a structured result that JSON cannot say",
                where=self.owner,
                got=one_line(error),
            ) from error

    def plain(self) -> JsonValue:
        if not self.structured:
            return None
        return self.structured[0] if len(self.structured) == 1 else list(self.structured)


def _finite(value: JsonValue) -> JsonValue:
    """JSON has no word for NaN and the infinities: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def _plain(value: object) -> object:
    """numpy's and torch's numbers and arrays as Python's."""
    tolist = getattr(value, "tolist", None)
    if tolist is None:
        raise TypeError(f"a value of type {type(value).__name__}")
    return tolist()
