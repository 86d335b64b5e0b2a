"""The second version's scenes: marks hidden from the first look, and questions that are true."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import numpy as np
import pytest

from vpt_agent.errors import UserError
from vpt_agent.nano.alphabet import COLOURS, SHAPES, Split
from vpt_agent.nano.domain import (
    AGAIN,
    MARKS,
    TYPES,
    Asked,
    DomainScene,
    again_view,
    ask,
    make_domain_scene,
    scale_of,
    types_of,
    window_of,
)
from vpt_agent.nano.domain.ask import FAR_APART
from vpt_agent.nano.domain.check import mark_patches
from vpt_agent.nano.domain.marks import (
    AGAIN_PERIOD,
    GLOBAL_LONGEST_PERIOD,
    GLOBAL_MOST,
    draw_sticker,
    period_of,
)
from vpt_agent.nano.scene import make_scene

SEEDS = range(14)
SPLITS: tuple[Split, ...] = ("train", "unseen")


@pytest.fixture(scope="module")
def scenes() -> list[DomainScene]:
    """A few scenes of both splits."""
    return [make_domain_scene(seed, split=split) for split in SPLITS for seed in SEEDS]


@pytest.fixture(scope="module")
def asked(scenes: list[DomainScene]) -> list[tuple[DomainScene, Asked]]:
    """Every type of question about each scene, three times."""
    found = [(s, ask(s, name, seed=i)) for s in scenes for name in TYPES for i in range(3)]
    return [(s, a) for s, a in found if a is not None]


def _of(asked: list[tuple[DomainScene, Asked]], name: str) -> list[tuple[DomainScene, Asked]]:
    found = [(s, a) for s, a in asked if a.type.name == name]
    assert len(found) >= 20
    return found


def test_same_seed_same_scene_and_question() -> None:
    """Pixels and questions depend on the arguments alone."""

    def digest(seed: int, split: Split) -> str:
        scene = make_domain_scene(seed, split=split)
        questions = [ask(scene, name, seed=1) for name in TYPES]
        return hashlib.sha256(scene.image.tobytes() + repr(questions).encode()).hexdigest()

    assert digest(3, "train") == digest(3, "train")
    assert len({digest(3, "train"), digest(4, "train"), digest(3, "unseen")}) == 3


def test_scenes_are_the_first_versions_with_marks(scenes: list[DomainScene]) -> None:
    """Outside the stickers nothing differs from the first version's scene of the seed."""
    for scene in scenes[:3]:
        old = np.asarray(make_scene(scene.seed, split=scene.split).image).astype(int)
        changed = np.abs(np.asarray(scene.image) - old).max(-1) > 0
        for tag in scene.tags:
            if tag.mark_box is not None:
                left, top, right, bottom = tag.mark_box
                room = right - left
                changed[
                    int(top - room) : int(bottom + room), int(left - room) : int(right + room)
                ] = 0
        assert not changed.any()


def test_marks_are_too_small_first_and_large_enough_again(scenes: list[DomainScene]) -> None:
    """A period is at most 1.3 pixels in the first look, at least 2.4 in each other, and inside."""
    seen = 0
    for scene in scenes:
        for tag in scene.tags:
            if tag.mark_box is None:
                continue
            seen += 1
            left, top, right, bottom = tag.mark_box
            sx, sy = scale_of("global", scene.size)
            assert max((right - left) * sx, (bottom - top) * sy) <= GLOBAL_MOST + 1e-6
            period = period_of(right - left)
            assert period * max(sx, sy) <= GLOBAL_LONGEST_PERIOD
            for kind in AGAIN:
                sx, sy = scale_of(kind, scene.size)
                assert period * min(sx, sy) >= AGAIN_PERIOD
                window = window_of(kind, scene.size)
                assert window[0] <= left
                assert right <= window[2]
                assert window[1] <= top
                assert bottom <= window[3]
    assert seen > 4 * len(scenes)


def test_marks_lie_off_the_text(scenes: list[DomainScene]) -> None:
    """A sticker never covers a character: what must be read stays readable."""
    for scene in scenes:
        for tag in scene.tags:
            if tag.mark_box is not None:
                _, top, _, bottom = tag.mark_box
                ys = [y for quad in tag.tag.quads for _, y in quad]
                assert bottom <= min(ys) or top >= max(ys)


def _readable(kind: str) -> float:
    """Share of marks that a nearest-centroid reader, shown their places, tells apart."""
    data: list[tuple[str, np.ndarray]] = []
    for seed in range(40):
        for mark, values in mark_patches(make_domain_scene(seed, size=(672, 672)), kind):
            side = round((len(values) // 3) ** 0.5)
            grey = values[:-2].reshape(side, side, 3).mean(-1)
            inner = grey[side // 2 - 2 : side // 2 + 3, side // 2 - 2 : side // 2 + 3]
            # Bars change along one axis, checks along both.
            change = [float((np.diff(inner, axis=axis) ** 2).mean()) for axis in (0, 1)]
            data.append((mark, np.array(change) / sum(change)))
    learnt, tried = data[::2], data[1::2]
    centres = {m: np.mean([p for own, p in learnt if own == m], axis=0) for m in MARKS}
    right = [
        min(centres, key=lambda m: float(((centres[m] - p) ** 2).sum())) == mark
        for mark, p in tried
    ]
    return sum(right) / len(right)


def test_the_first_look_cannot_tell_marks_apart_and_the_others_can() -> None:
    """A simple reader that is shown each mark's place: near chance (1/3) first, far above again."""
    assert _readable("global") < 0.55
    assert all(_readable(kind) > 0.8 for kind in AGAIN)


def test_views_are_the_librarys() -> None:
    """The encoders' inputs as the library makes them, to two grey levels of 255 on the mean."""
    pytest.importorskip("torch")
    from vpt_agent.types import Box, View
    from vpt_agent.vision.encoders import IMAGENET_MEAN, IMAGENET_STD, dino_pixels, sam_pixels

    for seed, size in ((0, (672, 896)), (1, (900, 700))):
        scene = make_domain_scene(seed, size=size)
        view = View("image_1", scene.image, "image_1", Box(0, 0, *size), size)
        for kind, make in (("dino", dino_pixels), ("sam", sam_pixels)):
            made = make(view, size=AGAIN[kind]).numpy()
            mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
            own = np.asarray(again_view(scene.image, kind)) / 255
            got = made.transpose(1, 2, 0) * std + mean
            assert got.shape == own.shape
            assert np.abs(got - own).mean() < 2 / 255


def test_answers_about_marks_are_true(asked: list[tuple[DomainScene, Asked]]) -> None:
    """Counted, compared and named as the scene has them."""
    for scene, a in _of(asked, "count_marks"):
        mark = next(m for m in MARKS if m in a.question)
        assert int(a.answer) == sum(t.mark == mark for t in scene.tags) == len(a.boxes)
    for scene, a in _of(asked, "same_mark"):
        first, second = (scene.tags[i] for i in a.tags)
        assert (a.answer == "yes") == (first.mark == second.mark)
        apart = [abs(p - q) for p, q in zip(first.centre, second.centre, strict=True)]
        assert max(apart) >= FAR_APART * max(scene.size)
    for scene, a in _of(asked, "which_tag"):
        mark = next(m for m in MARKS if m in a.question)
        bearers = [t for t in scene.tags if t.mark == mark]
        assert [t.tag.style.colour for t in bearers] == [a.answer]
    for scene, a in _of(asked, "most_mark"):
        counts = scene.counts()
        assert all(counts[a.answer] > n for m, n in counts.items() if m != a.answer)
    for scene, a in _of(asked, "mark_of"):
        assert scene.tags[a.tags[0]].mark == a.answer


def test_answers_without_another_look_are_true(asked: list[tuple[DomainScene, Asked]]) -> None:
    """Colours, shapes and numbers of tags as the scene has them; nothing is needed."""
    for scene, a in _of(asked, "count_tags"):
        assert a.answer == str(len(scene.tags))
        assert a.type.needs == ()
    for scene, a in _of(asked, "is_there"):
        colour = next(c for c in COLOURS if c in a.question)
        assert (a.answer == "yes") == any(t.tag.style.colour == colour for t in scene.tags)
    for _, a in _of(asked, "colour_of"):
        assert a.answer in COLOURS
        assert not any(c in a.question.split() for c in COLOURS)
    for _, a in _of(asked, "shape_of"):
        assert a.answer in SHAPES
        assert a.answer not in a.question


def test_two_looks_read_two_tags(asked: list[tuple[DomainScene, Asked]]) -> None:
    """Both texts in the order asked; two boxes; two looks needed."""
    for scene, a in _of(asked, "two_looks"):
        first, second = (scene.tags[i].tag for i in a.tags)
        assert first is not second
        assert a.answer == f"{first.style.text} {second.style.text}"
        assert a.boxes == (first.box, second.box)
        assert a.type.needs == (("region",), ("region",))


def test_marks_asked_for_are_spread_over_the_picture(
    asked: list[tuple[DomainScene, Asked]],
) -> None:
    """What a re-encoding question about several marks needs does not fit a quarter of the area."""
    wide = []
    for scene, a in asked:
        if a.type.group == "reencode" and len(a.boxes) > 1:
            left, top = min(b[0] for b in a.boxes), min(b[1] for b in a.boxes)
            right, bottom = max(b[2] for b in a.boxes), max(b[3] for b in a.boxes)
            longest = max((right - left) / scene.size[0], (bottom - top) / scene.size[1])
            wide.append(longest > 0.35)
    assert sum(wide) / len(wide) > 0.9


def test_answers_are_balanced() -> None:
    """No type can be answered by always saying the same (small pictures, to be quick)."""
    counts: dict[str, Counter[str]] = {n: Counter() for n in TYPES}
    for seed in range(70):
        scene = make_domain_scene(1000 + seed, size=(672, 672))
        for name in TYPES:
            for i in range(3):
                found = ask(scene, name, seed=i)
                if found is not None:
                    counts[name][found.answer] += 1
    majority = {n: max(c.values()) / sum(c.values()) for n, c in counts.items()}
    limits = {"is_there": 0.62, "same_mark": 0.62, "most_mark": 0.5, "mark_of": 0.5}
    limits |= {"count_tags": 0.45, "count_marks": 0.4, "shape_of": 0.35}
    limits |= {"colour_of": 0.25, "which_tag": 0.25, "region": 0.05, "two_looks": 0.05}
    assert {n for n in TYPES if majority[n] > limits[n]} == set()


def test_types_by_name_and_group() -> None:
    """Names and groups, each type once; anything else is said to be unknown."""
    assert [t.name for t in types_of(["none", "is_there"])] == [
        "colour_of", "shape_of", "count_tags", "is_there",
    ]  # fmt: skip
    assert types_of(["count_marks"])[0].needs == (("clip", "dino", "sam"),)
    with pytest.raises(UserError, match="no such type of question"):
        types_of(["regoin"])
    with pytest.raises(UserError, match="nothing looks at whole pictures under this name"):
        scale_of("yolo", (700, 700))


@pytest.mark.parametrize("mark", MARKS)
def test_patterns_end_in_the_same_grey(mark: str) -> None:
    """Half ink, half paper: no pattern is darker than another in the first look."""
    means = []
    for seed in range(60):
        sticker = draw_sticker(random.Random(seed), mark, 24.0).image
        rng = random.Random(seed)
        dark, light = rng.randint(0, 45), rng.randint(205, 250)
        grey = np.asarray(sticker, dtype=float)
        inside = grey[..., 3] > 250
        means.append(grey[..., :3].mean(-1)[inside].mean() - (dark + light) / 2)
    assert abs(float(np.mean(means))) < 4
