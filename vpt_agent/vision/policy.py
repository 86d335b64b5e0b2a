"""How large a picture is looked at: from its size to the sizes of resizing, patches and tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

from vpt_agent.errors import UserError

Size = tuple[int, int]
PolicyKind = Literal["published", "fit", "native"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SHORTEST_SIDE = 28  # published: shorter sides are raised to it
MAX_ASPECT, ASPECT_LIMIT = (
    200,
    180,
)  # published: above the first, a picture is squeezed to the second


class ResizePlan(NamedTuple):
    """What happens to one picture. Sizes are (width, height) in pixels.

    ``pre_sizes`` are NEAREST stages in order, before the antialiased resize to ``size``.
    ``grid_thw`` counts patches in time, height and width; ``visual_tokens`` what the language model
    sees of them.
    """

    pre_sizes: tuple[Size, ...]
    size: Size
    grid_thw: tuple[int, int, int]
    visual_tokens: int


def check_size(size: Size) -> None:
    """Refuse a picture without pixels."""
    if min(size) < 1:
        raise UserError("a picture has at least one pixel", got=size, expected="(width, height)")


def limit_aspect(size: Size) -> Size:
    """Sides at most 200 : 1; beyond that the longer side becomes 180 times the shorter."""
    width, height = size
    if width > MAX_ASPECT * height:
        return height * ASPECT_LIMIT, height
    if height > MAX_ASPECT * width:
        return width, width * ASPECT_LIMIT
    return size


def published_stages(size: Size, longest: int) -> tuple[Size, ...]:
    """The released loader's NEAREST stages; empty where it leaves a picture as it is.

    Longest side at most ``longest`` (floors), sides of at least 28, aspect at most 200. Where the
    floor gives 0 pixels the release fails; here one pixel is left.
    """
    check_size(size)
    stages = [size]
    if max(size) > longest:
        factor = longest / max(size)
        stages.append((max(1, int(size[0] * factor)), max(1, int(size[1] * factor))))
    width, height = stages[-1]
    stages.append((max(width, SHORTEST_SIDE), max(height, SHORTEST_SIDE)))
    stages.append(limit_aspect(stages[-1]))
    return tuple(b for a, b in itertools.pairwise(stages) if a != b)


@dataclass(frozen=True, kw_only=True)
class ImagePolicy:
    """How pictures become patches; carried by a checkpoint's manifest.

    ``published``: longest side at most ``longest`` by NEAREST, sides of at least 28, aspect at most
    200, then sides rounded to whole tokens (``patch * merge`` pixels) with ``min_pixels`` and
    ``max_pixels`` on the area, bicubic. As the released model was trained; crops likewise.

    ``fit``: the longer side becomes ``longest`` (``crop_longest`` for crops) and both are rounded
    to whole tokens, in one antialiased resize from the original pixels. ``upscale`` lets smaller
    pictures grow, ``crop_upscale`` crops (None: as ``upscale``). ``min_pixels`` and ``max_pixels``
    bound the area here too.

    ``native``: as the image processors of Qwen-VL models of transformers: sides rounded to whole
    tokens, ``min_pixels`` and ``max_pixels`` on the area, in one antialiased resize from the
    original pixels; ``longest`` means nothing. An aspect above 200, which those refuse, is squeezed
    as published.

    ``mean`` and ``std`` normalise RGB in 0..1; ``temporal`` repeats a picture in time.
    """

    kind: PolicyKind = "published"
    longest: int = 512
    crop_longest: int | None = None
    upscale: bool = True
    crop_upscale: bool | None = None
    min_pixels: int = 3136
    max_pixels: int = 12845056
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    patch: int = 14
    merge: int = 2
    temporal: int = 2

    def __post_init__(self) -> None:
        if self.kind not in get_args(PolicyKind):
            known = ", ".join(get_args(PolicyKind))
            raise UserError("unknown image policy", got=self.kind, expected=known)
        sides = {"longest": self.longest, "crop_longest": self.crop_longest or self.longest}
        for name, side in sides.items():
            if side < self.step:
                raise UserError(
                    "the longest side holds no visual token",
                    where=f"ImagePolicy.{name}",
                    got=side,
                    expected=f"{self.step} pixels or more",
                )
        if not self.step**2 <= self.max_pixels >= self.min_pixels > 0:
            raise UserError(
                "no size fits the limits of area",
                where="ImagePolicy",
                got=f"min_pixels {self.min_pixels}, max_pixels {self.max_pixels}",
                expected=f"0 < min_pixels <= max_pixels, max_pixels at least {self.step**2}",
            )

    @property
    def step(self) -> int:
        """Pixels a side of one visual token."""
        return self.patch * self.merge

    def at_input(self, input_size: int | None) -> ImagePolicy:
        """The policy of a kind that looks again through the base tower at its own ``input_size``.

        That is ``fit`` with the longer side so long, larger pictures and crops alike. None gives
        this policy itself: such a kind looks at what the first look saw.
        """
        if input_size is None:
            return self
        return replace(self, kind="fit", longest=input_size, crop_longest=input_size, upscale=True)

    def plan(self, size: Size, *, crop: bool = False) -> ResizePlan:
        """What happens to a picture of ``size`` (width, height); ``crop`` says that it is one.

        A picture that no size of whole tokens can hold is a :class:`UserError`.
        """
        check_size(size)
        if self.kind == "published":
            pre_sizes = published_stages(size, self.longest)
            before = pre_sizes[-1] if pre_sizes else size
            target = self._round(before[0], before[1])
        elif self.kind == "native":
            before = limit_aspect(size)
            pre_sizes = () if before == size else (before,)
            step = self.step
            # No side is raised to one token here: the bound on the area does that, as theirs.
            sides = (round(before[0] / step) * step, round(before[1] / step) * step)
            target = self._bound(before[0], before[1], sides)
        else:
            pre_sizes = ()
            longest = self.crop_longest or self.longest if crop else self.longest
            grow = self.crop_upscale if crop and self.crop_upscale is not None else self.upscale
            scale = longest / max(size)
            if scale > 1 and not grow:
                scale = 1.0
            target = self._fit(size[0] * scale, size[1] * scale)
        width, height = target
        grid = (1, height // self.patch, width // self.patch)
        return ResizePlan(pre_sizes, target, grid, grid[1] * grid[2] // self.merge**2)

    def _fit(self, width: float, height: float) -> Size:
        step = self.step
        sides = [max(step, int(side / step + 0.5) * step) for side in (width, height)]
        return self._bound(width, height, (sides[0], sides[1]))

    def _round(self, width: int, height: int) -> Size:
        step = self.step
        sides = [max(step, round(side / step) * step) for side in (width, height)]
        return self._bound(width, height, (sides[0], sides[1]))

    def _bound(self, width: float, height: float, target: Size) -> Size:
        # As transformers' smart_resize: too large shrinks by floors, too small grows by ceilings.
        step, area = self.step, target[0] * target[1]
        if area > self.max_pixels:
            beta = math.sqrt((width * height) / self.max_pixels)
            sides = [max(step, math.floor(s / beta / step) * step) for s in (width, height)]
        elif area < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (width * height))
            sides = [math.ceil(s * beta / step) * step for s in (width, height)]
        else:
            return target
        if sides[0] * sides[1] > self.max_pixels:
            raise UserError(
                "no size of whole tokens fits this picture",
                where=f"ImagePolicy(kind={self.kind!r})",
                got=f"{width:g} x {height:g} gives {sides[0]} x {sides[1]}",
                expected=f"at most {self.max_pixels} pixels",
                fix="crop the picture to a less extreme shape, or raise max_pixels",
            )
        return sides[0], sides[1]

    def to_manifest(self) -> dict[str, Any]:
        """JSON form: what a checkpoint carries."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_manifest(cls, data: Mapping[str, Any]) -> ImagePolicy:
        """Read :meth:`to_manifest` back. Unknown fields are a :class:`UserError`."""
        extra = sorted(set(data) - {f.name for f in fields(cls)})
        if extra:
            raise UserError(
                "an image policy has unknown fields",
                got=extra,
                fix="this checkpoint was written by a newer vpt_agent; upgrade",
            )
        values = dict(data)
        for name in ("mean", "std"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)


PUBLISHED_POLICY = ImagePolicy()
"""The policy of the released checkpoints."""

DEFAULT_POLICY = ImagePolicy(
    kind="fit", longest=896, crop_longest=672, upscale=False, crop_upscale=True
)
"""For new models. 896 pixels are 32 tokens a side, so a cell of a grid of 4, 8, 16 or 32 on a
square picture is a whole number of tokens and a picture costs at most 1024 of them; a crop gets 24
a side, and grows to that, because a small region is looked at in order to see more of it."""
