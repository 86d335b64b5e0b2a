"""What a tool is given besides its arguments. The model never sees any of it."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from vpt_agent.errors import ModelRetry, UserError
from vpt_agent.tokens.grid import RegionPolicy
from vpt_agent.tokens.table import PerceptionKind
from vpt_agent.tool.access import NOTHING, Access
from vpt_agent.types import Box, View, VisualFeatures

if TYPE_CHECKING:
    import torch
    from PIL import Image

    Encode = Callable[[str, View], torch.Tensor]
    Project = Callable[[str, torch.Tensor, torch.Tensor | None], VisualFeatures]


@dataclass(frozen=True)
class FromContext:
    """In ``Annotated[...]``: the parameter is this attribute of the context, and no argument."""

    name: str


SourceView = Annotated[View, FromContext("view")]
"""The picture to look at: the one that the call names as its ``source``, or the latest one."""

OriginalView = Annotated[View, FromContext("original")]
"""The picture that the source view was cut from (itself, if it was not)."""

ControlState = Annotated[Any, FromContext("control")]
"""The hidden state [k, D] that a call by perception tokens carries, a tensor."""

Rng = Annotated[random.Random, FromContext("rng")]
"""Random numbers that are the same for the same seed of the run and the same call."""

Deadline = Annotated[float | None, FromContext("deadline")]
"""The ``time.monotonic()`` at which the run must be over; None for no end."""

Files = Annotated[Access, FromContext("access")]
"""What may be read besides the pictures of the run: see :class:`vpt_agent.tool.Access`."""

Cancelled = Annotated[threading.Event, FromContext("cancelled")]
"""Set when nobody waits for the result any more."""


def _no_encoder(kind: str, view: View) -> torch.Tensor:
    raise UserError("this context has no encoder", got=kind, fix="pass encode= to ToolContext")


def _no_projector(
    kind: str, features: torch.Tensor, control: torch.Tensor | None
) -> VisualFeatures:
    raise UserError("this context has no projector", got=kind, fix="pass project= to ToolContext")


def _no_crop(view: View, box: Box) -> View:
    """Stands for "not given": a context then makes its own from its views."""
    raise UserError("this context cannot crop", got=view.id)


@dataclass(frozen=True, kw_only=True)
class ToolContext:
    """The surroundings of one call; the agent fills it, a test makes its own.

    ``views`` are the pictures of the run by id; ``view`` is the one that the call names as its
    ``source`` (default: the latest original), ``original`` the picture that it was cut from.
    ``control`` is the hidden state [k, D] of a call by perception tokens, ``kind`` the row of such
    a call, ``kinds`` all rows of the model. ``regions`` says how cells of the grid become pixels.
    ``rng`` gives the same numbers for the same seed. ``deadline`` is the ``time.monotonic()`` at
    which the run must be over; ``cancelled`` is set when nobody waits for the result any more.
    ``access`` reads the files and addresses that arguments name, if the user allowed it.

    ``encode(kind, view)`` gives the features [V, D] of a view by that kind's encoder;
    ``project(kind, features, control)`` the visual tokens [V, D] conditioned on the control
    state; ``crop(view, box)`` a new view of a box in pixels of ``view``, at the resolution of the
    original (:class:`ModelRetry` for a box that is none).
    """

    views: Mapping[str, View] = field(default_factory=dict)
    view: View | None = None
    original: View | None = None
    control: torch.Tensor | None = None
    kind: PerceptionKind | None = None
    kinds: Mapping[str, PerceptionKind] = field(default_factory=dict)
    regions: RegionPolicy = "published"
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    deadline: float | None = None
    device: str = "cpu"
    cancelled: threading.Event = field(default_factory=threading.Event)
    access: Access = NOTHING
    encode: Encode = _no_encoder
    project: Project = _no_projector
    crop: Callable[[View, Box], View] = _no_crop

    def __post_init__(self) -> None:
        if self.view is None and self.views:
            object.__setattr__(self, "view", next(iter(self.views.values())))
        if self.original is None and self.view is not None:
            found = self.views.get(self.view.root, self.view)
            object.__setattr__(self, "original", found)
        if self.crop is _no_crop:
            object.__setattr__(self, "crop", _plain_crop(self.views))

    def require_view(self) -> View:
        """:attr:`view`, for tools that cannot do without. Raises :class:`ModelRetry`."""
        if self.view is None:
            raise ModelRetry("there is no picture to look at", "unknown_source")
        return self.view

    def kind_named(self, name: str) -> PerceptionKind:
        """The row of the model's table. Raises :class:`UserError` if it has none."""
        if name in self.kinds:
            return self.kinds[name]
        raise UserError(
            "this model has no such perception kind",
            got=name,
            expected=", ".join(self.kinds) or "none",
        )

    def looking_at(self, source: str) -> ToolContext:
        """The same context with the view that ``source`` names. Raises :class:`ModelRetry`."""
        if source not in self.views:
            known = ", ".join(self.views) or "none"
            raise ModelRetry(f"there is no view {source!r}; views: {known}", "unknown_source")
        return replace(self, view=self.views[source], original=None)

    def redrawn(self, view: View, image: Image.Image, *, id: str | None = None) -> View:
        """A picture of the same place as ``view`` (an overlay, an enhancement).

        Boxes on it mean the same part of the original, whatever its size in pixels.
        """
        from vpt_agent.vision.images import load_image

        return replace(view, id=id or f"{view.id}.drawn", image=load_image(image), parent=view.id)


def _plain_crop(views: Mapping[str, View]) -> Callable[[View, Box], View]:
    count = itertools.count(1)

    def crop(view: View, box: Box) -> View:
        from vpt_agent.vision.frames import crop_view

        # A resized view has lost pixels, so its original is cut; any other is cut as it is, with
        # what was drawn on it.
        resized = view.size != (view.box.width, view.box.height)
        root = views.get(view.root) if resized else None
        return crop_view(view, box, id=f"{view.id}.{next(count)}", root=root)

    return crop
