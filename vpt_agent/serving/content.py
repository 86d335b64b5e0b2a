"""Results of calls as MCP carries them: text, pictures, structured content; or an error."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from mcp_types import CallToolResult, ContentBlock, ImageContent, TextContent

from vpt_agent.types import CallError, ToolResult, View

OUTPUT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "views": {
            "type": "array",
            "description": "the pictures of the result, in order",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "string", "description": "names it as a later call's source"},
                    "size": {"type": "array", "items": {"type": "integer"}},
                    "box": {
                        "type": "array",
                        "items": {"type": "number"},
                        "description": "left, top, right, bottom in pixels of the view `of`",
                    },
                    "of": {"type": "string"},
                },
                "required": ["id", "size", "box", "of"],
            },
        },
        "result": {"description": "what the tool says, as data"},
    },
    "required": ["views"],
}
"""JSON Schema of the structured content of every result that is no error."""


def said(result: ToolResult, views: Sequence[View], *, longest: int) -> CallToolResult:
    """A result; ``views`` are its pictures as they can be named later, sent with at most
    ``longest`` pixels a side."""
    if result.error is not None:
        return failed(result.error)
    blocks: list[ContentBlock] = []
    if result.text is not None:
        blocks.append(TextContent(text=result.text))
    for view in views:
        blocks += picture(view, longest=longest)
    structured: dict[str, Any] = {"views": [_told(view) for view in views]}
    if result.structured is not None:
        structured["result"] = result.structured
    if not blocks:
        blocks.append(TextContent(text=f"{result.name} is done"))
    return CallToolResult(content=blocks, structured_content=structured)


def failed(error: CallError) -> CallToolResult:
    """An error: its kind and the one line for a model. The detail stays here."""
    return CallToolResult(
        content=[TextContent(text=f"{error.kind}: {error.message}")],
        structured_content={"error": {"kind": error.kind, "message": error.message}},
        is_error=True,
    )


def picture(view: View, *, longest: int) -> list[ContentBlock]:
    """A view as a line that names it and a PNG."""
    image, (width, height) = view.image, view.size
    line = f"{view.id}: {width} x {height} pixels"
    if view.id != view.root:
        line += f", box {', '.join(f'{value:g}' for value in view.box)} of {view.root}"
    if max(width, height) > longest:
        image = image.copy()
        image.thumbnail((longest, longest))
        line += f"; shown as {image.width} x {image.height}"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return [TextContent(text=line), ImageContent(data=data, mime_type="image/png")]


def _told(view: View) -> dict[str, Any]:
    return {"id": view.id, "size": list(view.size), "box": list(view.box), "of": view.root}
