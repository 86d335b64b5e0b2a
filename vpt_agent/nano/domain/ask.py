"""Seeded questions about a scene: what is asked, the answer, and which perception it needs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from vpt_agent.errors import UserError
from vpt_agent.nano.alphabet import COLOURS, SHAPES
from vpt_agent.nano.domain.marks import MARKS
from vpt_agent.nano.domain.scene import DomainScene, MarkedTag
from vpt_agent.nano.domain.sight import AGAIN
from vpt_agent.nano.questions import every_name, every_text
from vpt_agent.nano.views import Box

Group = Literal["region", "two_looks", "none", "reencode", "either"]
GROUPS: Final[tuple[Group, ...]] = ("region", "two_looks", "none", "reencode", "either")
Needs = tuple[tuple[str, ...], ...]

FAR_APART: Final = 0.4
"""Tags to be compared lie at least this share of the picture's longer side apart."""

FORMS: Final[Mapping[str, tuple[str, ...]]] = {
    "two_looks": ("What do {} and {} say?", "Read {} and {}.", "What is written on {} and on {}?"),
    "colour_of": ("What colour is {}?", "Which colour has {}?"),
    "shape_of": ("What shape is {}?", "Which shape has {}?"),
    "count_tags": ("How many tags are there?", "Count the tags."),
    "is_there": ("Is there a tag that is {}?", "Is any tag {}?"),
    "count_marks": ("How many tags bear a {}?", "Count the tags with a {}."),
    "same_mark": ("Do {} and {} bear the same mark?", "Is the mark on {} the same as on {}?"),
    "which_tag": (
        "What colour is the tag with the {}?",
        "Which colour has the tag that bears a {}?",
    ),
    "most_mark": ("Which mark is on most tags?", "Which mark is there most often?"),
    "mark_of": ("Which mark does {} bear?", "Which mark is on {}?"),
}
"""How each type asks; {} is a tag's name, a colour or a mark. Regions are asked as before."""

_PLACES: Final = frozenset(every_name()[-8:])
_ANY: Final = tuple(AGAIN)


@dataclass(frozen=True)
class QuestionType:
    """A type of question. ``needs``: every entry names kinds of which one must be called."""

    name: str
    group: Group
    needs: Needs


@dataclass(frozen=True)
class Asked:
    """A question about a scene. ``boxes`` (scene pixels) hold what another look must show: the tags

    to be read, or the marks to be seen. ``tags`` are the numbers of the tags that decide the
    answer, in the same order where there are boxes.
    """

    type: QuestionType
    question: str
    answer: str
    boxes: tuple[Box, ...] = ()
    tags: tuple[int, ...] = ()


def _type(name: str, group: Group) -> QuestionType:
    needs: dict[Group, Needs] = {
        "region": (("region",),),
        "two_looks": (("region",), ("region",)),
        "none": (),
        "reencode": (_ANY,),
        "either": (("region", *_ANY),),
    }
    return QuestionType(name, group, needs[group])


_NAMES: Final[Mapping[Group, tuple[str, ...]]] = {
    "region": ("region",),
    "two_looks": ("two_looks",),
    "none": ("colour_of", "shape_of", "count_tags", "is_there"),
    "reencode": ("count_marks", "same_mark", "which_tag", "most_mark"),
    "either": ("mark_of",),
}
TYPES: Final[Mapping[str, QuestionType]] = {
    name: _type(name, group) for group, names in _NAMES.items() for name in names
}
"""All types by name. ``either`` can be looked at closely or encoded again."""


def types_of(names: Iterable[str]) -> tuple[QuestionType, ...]:
    """Types by their names or their groups' names, each once, in the order of the table."""
    wanted = set(names)
    unknown = sorted(wanted - set(TYPES) - set(GROUPS))
    if unknown or not wanted:
        raise UserError(
            "there is no such type of question",
            got=", ".join(unknown) or "none at all",
            expected=", ".join(dict.fromkeys((*GROUPS, *TYPES))),
        )
    return tuple(t for t in TYPES.values() if t.name in wanted or t.group in wanted)


def ask(scene: DomainScene, kind: QuestionType | str, *, seed: int = 0) -> Asked | None:
    """A question of a type about a scene, or None where the scene has none.

    The answer is drawn before the question, from all that the scene allows, so that answers are
    as even as they can be. The same arguments give the same question.
    """
    found = types_of([kind])[0] if isinstance(kind, str) else kind
    rng = random.Random(f"ask-{found.name}-{scene.split}-{scene.seed}-{seed}")
    return _ASK[found.name](scene, found, rng)


def every_question() -> list[str]:
    """Every word of every question and answer, for training the tokenizer."""
    names = [f"the {word} tag" for word in every_name()[:-8]]
    names += [text.removeprefix("Read ").rstrip(".") for text in every_text() if " tag" in text]
    names = [name for name in dict.fromkeys(names) if name.startswith("the ")]
    found = []
    for form in (f for forms in FORMS.values() for f in forms):
        by_word = "a {}" in form or "the {}" in form or "{}" not in form
        # As often as forms that are filled with names, or their words would not become tokens.
        fills = names if not by_word else [*MARKS, *COLOURS] * 12
        found += [form.format(*([fill] * form.count("{}"))) for fill in fills]
    # Answers stand alone, so they have no space before them. Names are to be one token each.
    words = [*COLOURS, *SHAPES, *MARKS, "yes", "no"]
    return [*every_text(), *found, *words * 60, *[f" {word}" for word in words] * 60]


# --- naming ---------------------------------------------------------------------------------------


def _named(rng: random.Random, tag: MarkedTag) -> str:
    adjectives, suffix = rng.choice(tag.names)
    return f"the {adjectives}tag{suffix}"


def _by_place(tag: MarkedTag) -> list[str]:
    names = [f"the {a}tag{s}" for a, s in tag.names]
    return [n for n in names if _PLACES & set(n.split())]


def _mark_boxes(tags: Iterable[MarkedTag]) -> tuple[Box, ...]:
    boxes = [t.mark_box for t in tags if t.mark_box is not None]
    return tuple((int(a), int(b), int(c + 1), int(d + 1)) for a, b, c, d in boxes)


def _of(
    scene: DomainScene, kind: QuestionType, text: str, answer: str, tags: Iterable[int]
) -> Asked:
    chosen = tuple(tags)
    boxes = _mark_boxes(scene.tags[i] for i in chosen)
    return Asked(kind, text, answer, boxes, chosen)


# --- reading --------------------------------------------------------------------------------------


def _region(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    asked = rng.choice(scene.texts)
    number = next(i for i, t in enumerate(scene.tags) if t.tag is asked.tag)
    return Asked(kind, asked.question, asked.answer, asked.regions, (number,))


def _two_looks(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    named = [i for i, t in enumerate(scene.tags) if t.names]
    a, b = rng.sample(named, 2)
    form = rng.choice(FORMS[kind.name])
    first, second = (_named(rng, scene.tags[i]) for i in (a, b))
    both = scene.tags[a].tag, scene.tags[b].tag
    return Asked(
        kind,
        form.format(first, second),
        " ".join(t.style.text for t in both),
        tuple(t.box for t in both),
        (a, b),
    )


# --- without another look -------------------------------------------------------------------------


def _colour_of(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    able = [(i, names) for i, t in enumerate(scene.tags) if (names := _by_place(t))]
    if not able:
        return None
    number, names = rng.choice(able)
    form = rng.choice(FORMS[kind.name])
    answer = scene.tags[number].tag.style.colour
    return Asked(kind, form.format(rng.choice(names)), answer, tags=(number,))


def _shape_of(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    able: dict[str, list[tuple[int, list[str]]]] = {}
    for number, tag in enumerate(scene.tags):
        shape = tag.tag.style.shape
        # A name that says the shape would say the answer.
        names = [f"the {a}tag{s}" for a, s in tag.names if shape not in a]
        if names:
            able.setdefault(shape, []).append((number, names))
    if not able:
        return None
    shape = rng.choice(sorted(able))
    number, names = rng.choice(able[shape])
    form = rng.choice(FORMS[kind.name])
    return Asked(kind, form.format(rng.choice(names)), shape, tags=(number,))


def _count_tags(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    form = rng.choice(FORMS[kind.name])
    return Asked(kind, form, str(len(scene.tags)), tags=tuple(range(len(scene.tags))))


def _is_there(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    there = sorted({t.tag.style.colour for t in scene.tags})
    yes = rng.random() < 0.5
    colour = rng.choice(there if yes else sorted(set(COLOURS) - set(there)))
    form = rng.choice(FORMS[kind.name])
    bearing = tuple(i for i, t in enumerate(scene.tags) if t.tag.style.colour == colour)
    return Asked(kind, form.format(colour), "yes" if yes else "no", tags=bearing)


# --- looking at all of it again -------------------------------------------------------------------


def _count_marks(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    by_count: dict[int, list[str]] = {}
    for mark, count in scene.counts().items():
        by_count.setdefault(count, []).append(mark)
    count = rng.choice(sorted(by_count))
    mark = rng.choice(by_count[count])
    form = rng.choice(FORMS[kind.name])
    bearing = [i for i, t in enumerate(scene.tags) if t.mark == mark]
    return _of(scene, kind, form.format(mark), str(count), bearing)


def _far(scene: DomainScene, a: MarkedTag, b: MarkedTag) -> bool:
    (ax, ay), (bx, by) = a.centre, b.centre
    return max(abs(ax - bx), abs(ay - by)) >= FAR_APART * max(scene.size)


def _same_mark(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    able = [i for i, t in enumerate(scene.tags) if t.mark and t.names]
    pairs: dict[bool, list[tuple[int, int]]] = {}
    for a in able:
        for b in able:
            if a != b and _far(scene, scene.tags[a], scene.tags[b]):
                same = scene.tags[a].mark == scene.tags[b].mark
                pairs.setdefault(same, []).append((a, b))
    # Both answers must have been possible, or scenes with few marks would tell.
    if len(pairs) < 2:
        return None
    same = rng.random() < 0.5
    a, b = rng.choice(pairs[same])
    form = rng.choice(FORMS[kind.name])
    text = form.format(_named(rng, scene.tags[a]), _named(rng, scene.tags[b]))
    return _of(scene, kind, text, "yes" if same else "no", (a, b))


def _which_tag(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    single = [mark for mark, count in scene.counts().items() if count == 1]
    if not single:
        return None
    mark = rng.choice(single)
    number = next(i for i, t in enumerate(scene.tags) if t.mark == mark)
    form = rng.choice(FORMS[kind.name])
    answer = scene.tags[number].tag.style.colour
    return _of(scene, kind, form.format(mark), answer, (number,))


def _most_mark(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    (first, most), (_, second), *_ = scene.counts().most_common()
    if most == second:
        return None
    form = rng.choice(FORMS[kind.name])
    every = [i for i, t in enumerate(scene.tags) if t.mark]
    return _of(scene, kind, form, first, every)


def _mark_of(scene: DomainScene, kind: QuestionType, rng: random.Random) -> Asked | None:
    by_mark: dict[str, list[int]] = {}
    for i, tag in enumerate(scene.tags):
        if tag.mark and tag.names:
            by_mark.setdefault(tag.mark, []).append(i)
    if not by_mark:
        return None
    mark = rng.choice(sorted(by_mark))
    number = rng.choice(by_mark[mark])
    form = rng.choice(FORMS[kind.name])
    return _of(scene, kind, form.format(_named(rng, scene.tags[number])), mark, (number,))


_ASK: Final[Mapping[str, Callable[[DomainScene, QuestionType, random.Random], Asked | None]]] = {
    "region": _region,
    "two_looks": _two_looks,
    "colour_of": _colour_of,
    "shape_of": _shape_of,
    "count_tags": _count_tags,
    "is_there": _is_there,
    "count_marks": _count_marks,
    "same_mark": _same_mark,
    "which_tag": _which_tag,
    "most_mark": _most_mark,
    "mark_of": _mark_of,
}
