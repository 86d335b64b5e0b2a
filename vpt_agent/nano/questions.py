"""Unambiguous questions about the tags of one scene."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Final

from vpt_agent.nano.tags import TagStyle

BoxPx = tuple[int, int, int, int]

_NOUNS: Final = ("tag", "sign", "label")
_FORMS: Final = (
    "What does {} say?",
    "What is written on {}?",
    "Read {}.",
    "What is the text on {}?",
    "Which text is on {}?",
)
_EDGES: Final = (("leftmost", 0, -1), ("rightmost", 0, 1), ("topmost", 1, -1), ("lowest", 1, 1))
_CORNERS: Final = (
    ("top left", 0.0, 0.0),
    ("top right", 1.0, 0.0),
    ("bottom left", 0.0, 1.0),
    ("bottom right", 1.0, 1.0),
)


def _places(boxes: Sequence[BoxPx], size: tuple[int, int]) -> dict[int, list[tuple[str, str]]]:
    """Per tag index, (adjective, suffix) pairs that name it by place and nothing else."""
    centres = [((b[0] + b[2]) / 2 / size[0], (b[1] + b[3]) / 2 / size[1]) for b in boxes]
    found: dict[int, list[tuple[str, str]]] = {}
    for word, axis, sign in _EDGES:
        order = sorted(range(len(boxes)), key=lambda i: -sign * centres[i][axis])
        first, second = order[0], order[1]
        # A tag counts as outermost only when it is so by a clear distance.
        if abs(centres[first][axis] - centres[second][axis]) > 0.07:
            found.setdefault(first, []).append((word + " ", ""))
    for word, cx, cy in _CORNERS:
        away = [max(abs(x - cx), abs(y - cy)) for x, y in centres]
        inside = [i for i, d in enumerate(away) if d < 0.33]
        near = [i for i, d in enumerate(away) if d < 0.45]
        if len(inside) == 1 and near == inside:
            found.setdefault(inside[0], []).append(("", f" at the {word}"))
    middle = [max(abs(x - 0.5), abs(y - 0.5)) for x, y in centres]
    inside = [i for i, d in enumerate(middle) if d < 0.15]
    near = [i for i, d in enumerate(middle) if d < 0.25]
    if len(inside) == 1 and near == inside:
        found.setdefault(inside[0], []).append(("", " in the middle"))
    return found


def describe(
    styles: Sequence[TagStyle], boxes: Sequence[BoxPx], size: tuple[int, int]
) -> list[list[tuple[str, str]]]:
    """For every tag the (adjectives, suffix) pairs that fit it alone; maybe none.

    `boxes` are pixel boxes (left, top, right, bottom) in a scene of `size` (width, height).
    """
    colours = Counter(s.colour for s in styles)
    shapes = Counter(s.shape for s in styles)
    pairs = Counter((s.colour, s.shape) for s in styles)
    places = _places(boxes, size)
    result: list[list[tuple[str, str]]] = []
    for i, style in enumerate(styles):
        names: list[tuple[str, str]] = []
        if colours[style.colour] == 1:
            names += [(style.colour + " ", "")] * 2
        if shapes[style.shape] == 1:
            names += [(style.shape + " ", "")] * 2
        if pairs[style.colour, style.shape] == 1:
            names.append((f"{style.colour} {style.shape} ", ""))
        names += places.get(i, []) * 2
        result.append(names)
    return result


def phrase(rng: random.Random, name: tuple[str, str]) -> str:
    """One question that uses an (adjectives, suffix) pair."""
    adjectives, suffix = name
    return rng.choice(_FORMS).format(f"the {adjectives}{rng.choice(_NOUNS)}{suffix}")


def every_name() -> list[str]:
    """Every word that can be the last one to say which tag is meant."""
    from vpt_agent.nano.alphabet import COLOURS, SHAPES

    edges = [word for word, _, _ in _EDGES]
    corners = [word.split()[-1] for word, _, _ in _CORNERS]
    return [*COLOURS, *SHAPES, *edges, *corners, "middle"]


def every_text() -> list[str]:
    """Every word of every question, for training the tokenizer."""
    from vpt_agent.nano.alphabet import COLOURS, SHAPES

    adjectives = [*COLOURS, *SHAPES, *(word for word, _, _ in _EDGES)]
    suffixes = ["", " in the middle", *(f" at the {word}" for word, _, _ in _CORNERS)]
    return [
        form.format(f"the {adjective} {noun}{suffix}")
        for form in _FORMS
        for adjective in adjectives
        for noun in _NOUNS
        for suffix in suffixes
    ]
