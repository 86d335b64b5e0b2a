"""Scenes of :mod:`vpt_agent.nano.scene` whose tags bear marks."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from PIL import Image

from vpt_agent.nano.alphabet import Split
from vpt_agent.nano.domain.marks import GLOBAL_LEAST, GLOBAL_MOST, MARKS, draw_sticker
from vpt_agent.nano.domain.sight import AGAIN, scale_of, window_of
from vpt_agent.nano.questions import BoxPx, describe
from vpt_agent.nano.scene import PlacedTag, SceneQuestion, make_scene
from vpt_agent.nano.views import Box

MOST_ALIKE = 5
"""At most so many tags of a scene bear the same mark."""


@dataclass(frozen=True)
class MarkedTag:
    """A tag; its mark, if any, and the mark's box in scene pixels; names that fit it alone.

    A name is (adjectives, suffix) around a noun, as :func:`vpt_agent.nano.questions.describe`
    gives it.
    """

    tag: PlacedTag
    mark: str | None
    mark_box: tuple[float, float, float, float] | None
    names: tuple[tuple[str, str], ...]

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the tag's box in scene pixels."""
        left, top, right, bottom = self.tag.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class DomainScene:
    """A picture (RGB) of ``size`` (width, height) pixels, its tags, and what can be read."""

    seed: int
    split: Split
    image: Image.Image
    size: tuple[int, int]
    tags: tuple[MarkedTag, ...]
    texts: tuple[SceneQuestion, ...]

    def counts(self) -> Counter[str]:
        """How many tags bear each mark; a mark that is not there counts 0."""
        found = Counter(dict.fromkeys(MARKS, 0))
        found.update(t.mark for t in self.tags if t.mark is not None)
        return found


def _common_window(size: tuple[int, int]) -> Box:
    """The part of a picture that every encoder sees."""
    boxes = [window_of(kind, size) for kind in AGAIN]
    lows = (max(b[i] for b in boxes) for i in (0, 1))
    highs = (min(b[i] for b in boxes) for i in (2, 3))
    left, top, right, bottom = (*lows, *highs)
    return left, top, right, bottom


def _text_box(tag: PlacedTag) -> tuple[float, float, float, float]:
    x, y = zip(*(point for quad in tag.quads for point in quad), strict=True)
    return min(x), min(y), max(x), max(y)


def _spot(rng: random.Random, tag: PlacedTag, side: int, window: Box) -> BoxPx | None:
    """Where a sticker of ``side`` pixels goes: over the tag's edge, off its text, in the window."""
    left, top, right, bottom = tag.box
    text = _text_box(tag)
    places: list[tuple[float, float]] = []
    for share in (0.5, 0.4, 0.6, 0.3, 0.7):
        x = left + (right - left) * share - side / 2
        # Half on the tag where its text leaves room, else further out.
        places += [(x, min(top - side / 3, text[1] - side - 1))]
        places += [(x, max(bottom - side * 2 / 3, text[3] + 1))]
    rng.shuffle(places)
    for x, y in places:
        box = (int(x), int(y), int(x) + side, int(y) + side)
        inside = window[0] <= box[0] and window[1] <= box[1]
        if inside and box[2] <= window[2] and box[3] <= window[3]:
            return box
    return None


def _marks(rng: random.Random, count: int) -> list[str]:
    """A mark for each of ``count`` tags, unevenly shared out so that all numbers occur."""
    order = rng.sample(MARKS, len(MARKS))
    first = rng.randint(0, min(count, MOST_ALIKE))
    rest = count - first
    second = rng.randint(max(0, rest - MOST_ALIKE), min(rest, MOST_ALIKE))
    marks = [order[0]] * first + [order[1]] * second + [order[2]] * (rest - second)
    rng.shuffle(marks)
    return marks


def make_domain_scene(
    seed: int, *, split: Split = "train", size: tuple[int, int] | None = None
) -> DomainScene:
    """The scene of a seed as :func:`make_scene` draws it, with a mark on every tag that can have

    one: only where all encoders see it (:func:`window_of`). Same arguments, same pixels.
    """
    scene = make_scene(seed, split=split, size=size)
    rng = random.Random(f"marks-{split}-{seed}")
    window = _common_window(scene.size)
    unit = 1 / max(scale_of("global", scene.size))
    extents = [rng.uniform(GLOBAL_LEAST, GLOBAL_MOST) * unit for _ in scene.tags]
    sides = [draw_sticker(random.Random(0), MARKS[0], e).image.width for e in extents]
    spots = [_spot(rng, t, s, window) for t, s in zip(scene.tags, sides, strict=True)]
    marks = iter(_marks(rng, sum(spot is not None for spot in spots)))
    names = describe([t.style for t in scene.tags], [t.box for t in scene.tags], scene.size)
    image = scene.image.copy()
    tags = []
    for tag, spot, extent, own in zip(scene.tags, spots, extents, names, strict=True):
        mark = None if spot is None else next(marks)
        box = None
        if spot is not None and mark is not None:
            sticker = draw_sticker(rng, mark, extent)
            image.paste(sticker.image, spot[:2], sticker.image)
            x, y, half = (spot[0] + spot[2]) / 2, (spot[1] + spot[3]) / 2, sticker.extent / 2
            box = (x - half, y - half, x + half, y + half)
        tags.append(MarkedTag(tag, mark, box, tuple(dict.fromkeys(own))))
    return DomainScene(seed, split, image, scene.size, tuple(tags), scene.questions)
