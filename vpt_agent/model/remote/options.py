"""What is said of a model behind a server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from vpt_agent.errors import UserError
from vpt_agent.tool.habits import Coordinates, check_coordinates

ToolImages = Literal["auto", "tool", "user"]
"""Where pictures of a tool's result stand: in the tool's message (``tool``), in a user message
behind it (``user``), or in the tool's message until the server refuses that (``auto``)."""
CallForm = Literal["native", "text"]
"""How calls are made: by the server's own tool calls, or written in the text, for servers that
read none (the tools are then told in the system message)."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """For a million tokens, in any currency: of the prompt, of what of it was ``cached`` (None: as
    the prompt), and of what the model says."""

    prompt: float
    completion: float
    cached: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError("a price is a number, 0 or more", where=name, got=repr(value))

    def cost(self, prompt: int, completion: int, cached: int = 0) -> float:
        """What these tokens cost; ``cached`` of the prompt's were at hand."""
        known = min(cached, prompt)
        reduced = self.prompt if self.cached is None else self.cached
        full = (prompt - known) * self.prompt + known * reduced + completion * self.completion
        return full / 1_000_000


@dataclass(frozen=True, kw_only=True)
class RemoteOptions:
    """How a server is talked to.

    ``coordinates`` is the frame in which its model writes boxes. Pictures are sent as data URLs in
    ``image_format`` (``png`` or ``jpeg``), the longer side at most ``longest`` pixels. ``stream``
    takes the answer piece by piece. A request may take ``timeout`` seconds; one that failed in a
    way that may pass is tried ``retries`` times again, after ``backoff`` seconds, twice that, and
    so on up to ``longest_wait``, or after what the server asks for. ``extra`` are fields of the
    request's body, as the server knows them. ``context`` is the longest conversation in tokens, if
    it is known. ``token_limit`` is the name of the field that bounds what the model may say.
    """

    coordinates: Coordinates = "norm1000"
    calls: CallForm = "native"
    tool_images: ToolImages = "auto"
    image_format: str = "png"
    longest: int = 2048
    stream: bool = True
    timeout: float = 600.0
    retries: int = 3
    backoff: float = 1.0
    longest_wait: float = 60.0
    system: str | None = None
    prices: Prices | None = None
    context: int | None = None
    token_limit: str = "max_completion_tokens"
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_coordinates(self.coordinates)
        for name, value, known in (
            ("calls", self.calls, get_args(CallForm)),
            ("tool_images", self.tool_images, get_args(ToolImages)),
            ("image_format", self.image_format, ("png", "jpeg")),
            ("token_limit", self.token_limit, ("max_completion_tokens", "max_tokens")),
        ):
            if value not in known:
                raise UserError(
                    "unknown option of a server",
                    where=name,
                    got=repr(value),
                    expected=", ".join(known),
                )
        for name, number, least in (
            ("longest", self.longest, 28),
            ("timeout", self.timeout, 0.001),
            ("retries", self.retries, 0),
            ("backoff", self.backoff, 0),
            ("longest_wait", self.longest_wait, 0),
            ("context", self.context, 1),
        ):
            if number is not None and not (math.isfinite(number) and number >= least):
                raise UserError(
                    "an option of a server is out of range",
                    where=name,
                    got=repr(number),
                    expected=f"{least} or more",
                )
