"""Rows: what is read, and what is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vpt_agent.data import ImageRef, RowError, parse_image_path, read_row, row_json, row_views
from vpt_agent.errors import ImageError, UserError
from vpt_agent.types import Box

ASK = {"role": "user", "content": "<image>\nWhat is it?"}
SAY = {"role": "assistant", "content": "A cat."}


def row(**changes: Any) -> dict[str, Any]:
    return {"messages": [ASK, SAY], "images": ["a.png"]} | changes


def test_a_row_is_read() -> None:
    got = read_row(row(clip_images=None, detection_images=[]), where="line 3")
    assert [m.role for m in got.messages] == ["user", "assistant"]
    assert got.pictures["<image>"] == (ImageRef("a.png"),)
    assert got.pictures["<clip_image>"] == got.pictures["<seg_image>"] == ()
    assert got.where == "line 3"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], r"a row is a JSON object.*got: list"),
        (row(depth_images=["a.png"]), r"keys that nothing reads.*got: depth_images"),
        ({"images": []}, r"messages in pairs.*got: NoneType"),
        (row(messages=[]), r"messages in pairs.*got: 0 messages"),
        (row(messages=[ASK, SAY, ASK]), r"messages in pairs.*got: 3 messages"),
        (row(messages=[SAY, ASK]), r"roles do not alternate.*message 0.*'assistant'"),
        (row(messages=[{"role": "system", "content": "x"}, SAY]), r"'system'; expected: user"),
        (row(messages=[ASK, {"role": "assistant"}]), r"a role and a text; where: row, message 1"),
        (row(messages=[ASK, "A cat."]), r"a role and a text; where: row, message 1"),
        (row(images="a.png"), r"a list of pictures holds paths; where: row, images"),
        (row(images=[3]), r"a list of pictures holds paths"),
        (row(images=[]), r"too few pictures.*where: row, images; got: 0 pictures; expected: 1"),
        (row(images=["a", "b"]), r"too many pictures.*got: 2 pictures"),
        (row(clip_images=["a"]), r"too many pictures.*where: row, clip_images"),
        (row(images=["a.png_1,2,3"]), r"not four whole numbers; where: row, images\[0\]"),
        (
            row(messages=[ASK, {"role": "assistant", "content": "<clip_image>"}]),
            r"a picture stands in an assistant's message.*got: <clip_image>",
        ),
        (
            row(messages=[{"role": "user", "content": "<image><video>"}, SAY]),
            r"videos cannot be used",
        ),
    ],
)
def test_what_is_refused(data: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_row(data)


def test_other_keys_and_spare_pictures_may_be_allowed() -> None:
    assert read_row(row(id=7), ignore=["id"]) == read_row(row())
    loose = read_row(row(depth_images=["a"], clip_images=["b"]), rules="published")
    assert loose.pictures["<clip_image>"] == (ImageRef("b"),)
    with pytest.raises(UserError, match=r"too many pictures"):
        read_row(row(images=["a", "b"]), rules="published")


def test_a_kind_of_ones_own_has_its_own_list() -> None:
    ask = {"role": "user", "content": "<depth_image>"}
    got = read_row(
        {"messages": [ask, SAY], "depth_images": ["a"]}, tags=("<image>", "<depth_image>")
    )
    assert got.pictures == {"<image>": (), "<depth_image>": (ImageRef("a"),)}


@pytest.mark.parametrize("path", ["a", "a_b", "a_1", "x_1,2.jpg", "d_1,2/b.png", "b.png_12", ""])
def test_what_is_no_crop_is_a_path(path: str) -> None:
    assert parse_image_path(path) == ImageRef(path)


@pytest.mark.parametrize("path", ["a.png_1, 2, 30, 40", "a.png_1,2,30,40"])
def test_a_crop(path: str) -> None:
    assert parse_image_path(path) == ImageRef("a.png", (1, 2, 30, 40))


@pytest.mark.parametrize("tail", ["1,2", "1,2,3,4,5", "1.0,2,3,4", ",,,", "1,2,3,"])
def test_not_four_numbers(tail: str) -> None:
    with pytest.raises(UserError, match=r"not four whole numbers; where: here; got: a.png_"):
        parse_image_path(f"a.png_{tail}", where="here")


@pytest.mark.parametrize("tail", ["-1,0,5,5", "0,-1,5,5", "5,0,5,9", "0,9,5,3"])
def test_no_area(tail: str) -> None:
    with pytest.raises(UserError, match=r"no area inside the picture.*0 <= left < right"):
        parse_image_path(f"a.png_{tail}")


def test_pictures_are_opened_once_and_crops_know_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "a.png")
    messages = [
        {"role": "user", "content": "<image><image><clip_image><image>"},
        SAY,
    ]
    crop = "a.png_10,5,30,25"
    data = {"messages": messages, "images": ["a.png", crop, crop], "clip_images": ["a.png"]}
    opened: list[Path] = []
    reads = Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **k: opened.append(p) or reads(p, *a, **k))
    views = row_views(read_row(data), folder=tmp_path)
    whole, part, again = views["<image>"]
    assert part is again
    assert views["<clip_image>"] == (whole,)
    assert (part.id, part.parent, part.root, part.box) == (
        "crop_1", "image_1", "image_1", Box(10, 5, 30, 25)
    )  # fmt: skip
    assert part.image.tobytes() == whole.image.crop((10, 5, 30, 25)).tobytes()
    assert opened == [tmp_path / "a.png"]


def test_a_crop_must_lie_inside_its_picture(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a crop leaves its picture.*expected: inside 40 x 30"):
        row_views(read_row(row(images=[f"{tmp_path}/a.png_0,0,41,30"])))
    with pytest.raises(ImageError, match=r"there is no such file"):
        row_views(read_row(row(images=["b.png"])), folder=tmp_path)


def test_what_else_is_known_travels_with_the_row() -> None:
    known = {"type": "colour", "regions": [[0, 1, 2, 3]], "tools": ["region"], "answer": "a cat"}
    got = read_row(row(meta=known | {"id": None}))
    assert got.meta == known
    assert row_json(got) == row(meta=known)
    assert read_row(row_json(got)) == got
    assert "meta" not in row_json(read_row(row()))
    for wrong in ("colour", {1: 2}):
        with pytest.raises(RowError, match=r"known of a row is a JSON object; where: row, meta"):
            read_row(row(meta=wrong))


def test_crops_and_lists_are_written_as_they_are_read() -> None:
    ask = {"role": "user", "content": "<image><image><clip_image>"}
    data = row(messages=[ask, SAY], images=["a.png", "a.png_1,2,3,4"], clip_images=["b.png"])
    assert row_json(read_row(data)) == data
    assert row_json(read_row(row(messages=[{"role": "user", "content": "q"}, SAY], images=[]))) == {
        "messages": [{"role": "user", "content": "q"}, SAY],
        "images": [],
    }


def test_errors_say_of_what_kind_they_are() -> None:
    problems = {}
    for data in ([1], row(depth=1), row(images=[]), row(images=["a_1,2"])):
        with pytest.raises(RowError) as caught:
            read_row(data)
        problems[caught.value.problem] = caught.value.what
    assert list(problems) == ["not_a_row", "unknown_keys", "counts", "paths"]
