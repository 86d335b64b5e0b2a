"""Rows of data as items."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.evaluation.kit import picture
from vpt_agent.data import read_row
from vpt_agent.errors import UserError
from vpt_agent.evaluation import items_of_rows
from vpt_agent.tokens.table import CLIP, IMAGE_TAG, REENCODE_TRIGGER, REGION, REGION_TRIGGER
from vpt_agent.types import Box


def row(folder: Path, **changes: object) -> dict[str, object]:
    path = folder / "a.png"
    picture(1).save(path)
    said = [
        f"{IMAGE_TAG}\nWhat is it?\n{REGION_TRIGGER}",
        REGION.call_text(region=(0, 0, 1, 1)),
        IMAGE_TAG,
        f"{REGION.answer_prefix}A cat",
    ]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    return {"messages": messages, "images": [str(path), f"{path}_0,0,21,14"], **changes}


def test_a_region_row(tmp_path: Path) -> None:
    (item,) = items_of_rows([read_row(row(tmp_path))])
    assert item.question == "What is it?"
    assert item.answer == "A cat"
    assert item.needs == (("region",),)
    assert item.boxes == item.shown == (Box(0, 0, 21, 14),)
    assert item.picture().tobytes() == picture(1).tobytes()


def test_what_the_row_says_of_itself_counts(tmp_path: Path) -> None:
    meta = {"id": 7, "type": "colour", "tools": [], "answer": "cat", "regions": [[1, 1, 1, 1]]}
    (item,) = items_of_rows([read_row(row(tmp_path, meta={**meta, "grid": 4}))], policy="cover")
    assert (item.id, item.type, item.answer, item.needs) == ("7", "colour", "cat", ())
    assert item.boxes == (Box(21, 14, 42, 28),)


def test_a_re_encoding_row(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(1).save(path)
    said = [f"{IMAGE_TAG}\nWhat?\n{REENCODE_TRIGGER}", CLIP.call_text(), CLIP.tag, "A dog"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
    data = {"messages": messages, "images": [str(path)], "clip_images": [str(path)]}
    (item,) = items_of_rows([read_row(data)])
    assert (item.question, item.answer, item.needs) == ("What?", "A dog", (("clip",),))
    assert item.boxes == ()


def test_rows_about_several_pictures_are_refused(tmp_path: Path) -> None:
    data = row(tmp_path)
    data["images"] = list(reversed(data["images"]))  # type: ignore[call-overload]
    with pytest.raises(UserError, match="ask about one whole picture"):
        list(items_of_rows([read_row(data)]))
