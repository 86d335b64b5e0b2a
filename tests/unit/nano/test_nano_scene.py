"""Generated scenes keep their promises."""

from __future__ import annotations

import hashlib

import pytest
from PIL import Image

from vpt_agent.nano.alphabet import (
    COLOURS,
    GLOBAL_LONGEST,
    SHAPES,
    SYMBOLS,
    TRAIN_BACKGROUNDS,
    TRAIN_FONTS,
    UNSEEN_BACKGROUNDS,
    UNSEEN_FONTS,
    Split,
)
from vpt_agent.nano.scene import Scene, make_scene

SEEDS = range(6)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """A few scenes of both splits."""
    splits: tuple[Split, ...] = ("train", "unseen")
    return [make_scene(seed, split=split) for split in splits for seed in SEEDS]


def _digest(scene: Scene) -> str:
    return hashlib.sha256(scene.image.tobytes() + repr(scene.to_json()).encode()).hexdigest()


def test_same_seed_same_scene() -> None:
    """Pixels and questions depend on the seed and the split alone."""
    assert _digest(make_scene(3)) == _digest(make_scene(3))
    assert _digest(make_scene(3)) != _digest(make_scene(4))
    assert _digest(make_scene(3)) != _digest(make_scene(3, split="unseen"))


def test_sizes_and_tag_count(scenes: list[Scene]) -> None:
    """Sides of 672 to 1344 pixels, six or more tags, all inside the picture."""
    for scene in scenes:
        assert scene.image.size == scene.size
        assert scene.image.mode == "RGB"
        assert all(672 <= side <= 1344 for side in scene.size)
        assert len(scene.tags) >= 6
        for tag in scene.tags:
            left, top, right, bottom = tag.box
            assert 0 <= left < right <= scene.size[0]
            assert 0 <= top < bottom <= scene.size[1]
            for quad in tag.quads:
                assert all(left <= x <= right and top <= y <= bottom for x, y in quad)


def test_glyphs_are_small_in_the_whole_view(scenes: list[Scene]) -> None:
    """Capitals are at most 5 pixels high in the model's view of the whole scene."""
    for scene in scenes:
        scale = GLOBAL_LONGEST / max(scene.size)
        assert all(3.5 <= tag.style.cap * scale <= 5.0 for tag in scene.tags)


def test_strings(scenes: list[Scene]) -> None:
    """Three to six symbols of an alphabet of at least thirty."""
    assert len(set(SYMBOLS)) == len(SYMBOLS) >= 30
    for scene in scenes:
        for tag in scene.tags:
            assert 3 <= len(tag.style.text) <= 6
            assert set(tag.style.text) <= set(SYMBOLS)


def test_tags_keep_their_distance(scenes: list[Scene]) -> None:
    """Tags lie at least 1.4 grid cells apart, so that a crop mostly shows its own."""
    for scene in scenes:
        cell = (scene.size[0] / 16, scene.size[1] / 16)
        boxes = [tag.box for tag in scene.tags]
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                apart_x = max(a[0] - b[2], b[0] - a[2]) / cell[0]
                apart_y = max(a[1] - b[3], b[1] - a[3]) / cell[1]
                assert max(apart_x, apart_y) > 1.4


def test_questions_name_one_tag(scenes: list[Scene]) -> None:
    """Every colour and shape in a question fits exactly the tag that is meant."""
    for scene in scenes:
        assert len(scene.questions) >= 4
        for question in scene.questions:
            assert question.answer == question.tag.style.text
            assert question.regions == (question.tag.box,)
            words = set(question.question.rstrip("?.").split())
            colours, shapes = words & set(COLOURS), words & set(SHAPES)
            if colours or shapes:
                fitting = [
                    tag
                    for tag in scene.tags
                    if colours <= {tag.style.colour} and shapes <= {tag.style.shape}
                ]
                assert fitting == [question.tag]


def test_questions_by_place() -> None:
    """A tag named by an edge is the outermost one, one named by a corner lies there."""
    seen = set()
    for seed in range(30):
        scene = make_scene(seed, size=(672, 672))
        for question in scene.questions:
            centres = [((t.box[0] + t.box[2]) / 2, (t.box[1] + t.box[3]) / 2) for t in scene.tags]
            own = centres[scene.tags.index(question.tag)]
            if "leftmost" in question.question:
                assert own[0] == min(x for x, _ in centres)
                seen.add("leftmost")
            elif "lowest" in question.question:
                assert own[1] == max(y for _, y in centres)
                seen.add("lowest")
            elif "top right" in question.question:
                assert own[0] > 0.6 * 672
                assert own[1] < 0.4 * 672
                seen.add("top right")
    assert seen == {"leftmost", "lowest", "top right"}


def test_given_size_and_its_bounds() -> None:
    """A size may be asked for, inside the bounds only."""
    assert make_scene(1, size=(1344, 672)).size == (1344, 672)
    with pytest.raises(ValueError, match="672"):
        make_scene(1, size=(600, 900))


def test_json_form() -> None:
    """The printed form is plain data."""
    data = make_scene(7).to_json()
    assert set(data) == {"size", "questions"}
    assert set(data["questions"][0]) == {"question", "answer", "regions"}
    assert all(isinstance(value, int) for value in data["questions"][0]["regions"][0])


def test_splits_share_nothing() -> None:
    """Held-out fonts and backgrounds are never drawn in training."""
    assert not set(TRAIN_FONTS) & set(UNSEEN_FONTS)
    assert not set(TRAIN_BACKGROUNDS) & set(UNSEEN_BACKGROUNDS)
    for scene in (make_scene(seed, split="unseen") for seed in range(3)):
        assert {tag.style.font for tag in scene.tags} <= set(UNSEEN_FONTS)


def test_tag_colours_show(scenes: list[Scene]) -> None:
    """Below its string a tag shows its colour: the picture is drawn where the box says."""
    for scene in scenes:
        for tag in scene.tags:
            if tag.style.colour not in ("red", "green", "blue"):
                continue
            crop = scene.image.crop(tag.box).resize((1, 1), Image.Resampling.BOX)
            pixel = crop.getpixel((0, 0))
            assert isinstance(pixel, tuple)
            channel = ("red", "green", "blue").index(tag.style.colour)
            assert pixel[channel] >= max(pixel) - 40
