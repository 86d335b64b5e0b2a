"""Generated scenes: tags too small to read in the whole view, easy to read after a crop."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vpt_agent.nano.alphabet import GLOBAL_LONGEST, MAX_CAP, MIN_CAP, Split
from vpt_agent.nano.backgrounds import paint
from vpt_agent.nano.questions import BoxPx, describe, phrase
from vpt_agent.nano.tags import Quad, TagPatch, TagStyle, draw_tag, random_style

MIN_SIDE = 672
MAX_SIDE = 1344
MIN_TAGS = 6
MAX_TAGS = 9


@dataclass(frozen=True)
class PlacedTag:
    """A tag in a scene: its style, its box (left, top, right, bottom; right and bottom

    exclusive) and its characters' corners, all in scene pixels.
    """

    style: TagStyle
    box: BoxPx
    quads: tuple[Quad, ...]


@dataclass(frozen=True)
class SceneQuestion:
    """A question about one tag, its answer, and the tag's pixel boxes in the scene."""

    question: str
    answer: str
    regions: tuple[BoxPx, ...]
    tag: PlacedTag


@dataclass(frozen=True)
class Scene:
    """A picture (RGB), its size (width, height) in pixels, its tags and questions."""

    image: Image.Image
    size: tuple[int, int]
    tags: tuple[PlacedTag, ...]
    questions: tuple[SceneQuestion, ...]

    def to_json(self) -> dict[str, Any]:
        """What the command prints: size, and question, answer and pixel regions of each."""
        return {
            "size": list(self.size),
            "questions": [
                {
                    "question": q.question,
                    "answer": q.answer,
                    "regions": [list(region) for region in q.regions],
                }
                for q in self.questions
            ],
        }


def _random_size(rng: random.Random) -> tuple[int, int]:
    """Sides of 672 to 1344 pixels, at most 4:3 apart, half of them square."""
    longest = rng.randint(MIN_SIDE // 4, MAX_SIDE // 4) * 4
    if rng.random() < 0.5:
        return longest, longest
    other = max(MIN_SIDE, int(longest * rng.uniform(0.75, 1.0)) // 4 * 4)
    return (longest, other) if rng.random() < 0.5 else (other, longest)


def _spot(
    rng: random.Random, patch: TagPatch, size: tuple[int, int], taken: list[BoxPx]
) -> BoxPx | None:
    """A free place for a patch: at least 1.5 grid cells from every other tag, or None."""
    w, h = patch.image.size
    gap_x, gap_y = int(1.5 * size[0] / 16), int(1.5 * size[1] / 16)
    edge = max(size) // 112
    for _ in range(60):
        x = rng.randint(edge, size[0] - w - edge)
        y = rng.randint(edge, size[1] - h - edge)
        box = (x, y, x + w, y + h)
        if all(
            box[0] >= b[2] + gap_x
            or b[0] >= box[2] + gap_x
            or box[1] >= b[3] + gap_y
            or b[1] >= box[3] + gap_y
            for b in taken
        ):
            return box
    return None


def _moved(quads: tuple[Quad, ...], x: int, y: int) -> tuple[Quad, ...]:
    return tuple(tuple((px + x, py + y) for px, py in quad) for quad in quads)


def _place_tags(
    rng: random.Random, split: Split, size: tuple[int, int]
) -> list[tuple[TagPatch, PlacedTag]]:
    """Six or more drawn tags at free places of a scene of `size` (width, height) pixels."""
    unit = max(size) / GLOBAL_LONGEST
    count = rng.randint(MIN_TAGS, MAX_TAGS)
    placed: list[tuple[TagPatch, PlacedTag]] = []
    while len(placed) < count:
        style = random_style(rng, split, rng.uniform(MIN_CAP, MAX_CAP) * unit)
        patch = draw_tag(rng, style)
        box = _spot(rng, patch, size, [tag.box for _, tag in placed])
        if box is not None:
            quads = _moved(patch.quads, box[0], box[1])
            placed.append((patch, PlacedTag(style, box, quads)))
        elif len(placed) < MIN_TAGS:
            # A crowded start: begin again rather than fall short of six.
            placed = []
        else:
            break
    return placed


def _questions(
    rng: random.Random, tags: list[PlacedTag], size: tuple[int, int]
) -> tuple[SceneQuestion, ...]:
    names = describe([t.style for t in tags], [t.box for t in tags], size)
    questions = [
        SceneQuestion(phrase(rng, rng.choice(own)), tag.style.text, (tag.box,), tag)
        for own, tag in zip(names, tags, strict=True)
        if own
    ]
    rng.shuffle(questions)
    return tuple(questions)


def make_scene(seed: int, *, split: Split = "train", size: tuple[int, int] | None = None) -> Scene:
    """Draw the scene of a seed; the same arguments give the same pixels and questions.

    `size` is (width, height) in pixels, each side 672 to 1344; chosen by the seed if None.
    """
    rng = random.Random(f"{split}-{seed}")
    size = _random_size(rng) if size is None else size
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise ValueError(f"scene sides must lie in {MIN_SIDE}..{MAX_SIDE} pixels, not {size}")
    while True:
        placed = _place_tags(rng, split, size)
        tags = [tag for _, tag in placed]
        questions = _questions(rng, tags, size)
        if len(questions) >= 4:
            break
    image = paint(rng, size, split, MAX_CAP * max(size) / GLOBAL_LONGEST)
    for patch, tag in placed:
        image.paste(patch.image, (tag.box[0], tag.box[1]), patch.image)
    return Scene(image, size, tuple(tags), questions)
