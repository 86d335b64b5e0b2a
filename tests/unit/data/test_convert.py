"""Rows for other trainers, as figures, and as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vpt_agent.data import Row, RowError, load_rows, read_row
from vpt_agent.data.convert import convert_rows, dataset_info
from vpt_agent.data.draw import draw_row, html_page, show_rows
from vpt_agent.data.stats import row_stats, spread
from vpt_agent.errors import ImageError, UserError
from vpt_agent.tokens.table import REGION_TRIGGER

REGION = "<|region_token_start|><|x_1|><|y_2|><|x_3|><|y_4|><|region_token_end|>"
CLIP = "<|clip_action_start|><|clip_action|><|clip_action_end|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    image = Image.new("RGB", (160, 80), "white")
    image.paste("blue", (20, 10, 80, 50))
    image.save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture
def rows(folder: Path) -> list[Row]:
    def row(*texts: str, **lists: Any) -> dict[str, Any]:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]
        return {"messages": messages, "meta": {"type": "colour"}} | lists

    data = [
        row(f"<image>\nq\n{REGION_TRIGGER}", REGION, "<image>", "Now answer the question.\nblue",
            images=["a.png", "a.png_20,10,80,50"]),
        row("<image>\nq", CLIP, "<clip_image>", "blue", images=["a.png"], clip_images=["a.png"]),
        row("<image>\nq", "blue", images=["a.png"]),
    ]  # fmt: skip
    return list(load_rows(data, folder=folder))


def test_the_released_fork_reads_what_we_read(rows: list[Row]) -> None:
    got = list(convert_rows(rows, "llamafactory-vpt"))
    assert [read_row(g).messages for g in got] == [r.messages for r in rows]
    assert [read_row(g).pictures for g in got] == [r.pictures for r in rows]
    assert all("meta" not in g for g in got)
    columns = dataset_info("mine", "mine.json", "llamafactory-vpt")["mine"]["columns"]
    assert columns["clip_images"] == "clip_images"
    assert "depth_images" not in columns
    assert set(dataset_info("mine", "mine.json", "llamafactory")["mine"]["columns"]) == {
        "messages", "images",
    }  # fmt: skip


def test_stock_llamafactory_gets_whole_pictures(rows: list[Row], folder: Path) -> None:
    (got,) = convert_rows(rows[:1], "llamafactory", pictures=folder / "crops")
    assert set(got) == {"messages", "images"}
    whole, crop = got["images"]
    assert whole == str(folder / "a.png")
    assert Image.open(crop).size == (60, 40)
    assert Image.open(crop).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(UserError, match=r"knows no crops.*name a folder for them: pictures="):
        list(convert_rows(rows[:1], "llamafactory"))
    with pytest.raises(RowError, match=r"knows no encoders.*row 1; got: clip_images; do: show the"):
        list(convert_rows(rows[1:], "llamafactory"))
    (again,) = convert_rows(rows[1:2], "llamafactory", reencoded="picture")
    assert again["images"] == [str(folder / "a.png")] * 2
    assert again["messages"][2]["content"] == "<image>"


def test_trl_gets_parts(rows: list[Row], folder: Path) -> None:
    options: Any = {"pictures": folder / "crops", "reencoded": "picture"}
    (got, *_) = convert_rows(rows, "trl", **options)
    assert got["messages"][0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": f"\nq\n{REGION_TRIGGER}"},
    ]
    assert got["messages"][1]["content"] == [{"type": "text", "text": REGION}]
    assert got["messages"][2]["content"] == [{"type": "image"}]
    pairs = list(convert_rows(rows, "trl-prompt", **options))
    assert len(pairs) == 5
    first, second = pairs[:2]
    assert first["completion"] == [got["messages"][1]]
    assert (len(first["images"]), len(second["images"])) == (1, 2)
    assert second["prompt"] == got["messages"][:3]
    assert json.loads(json.dumps(pairs)) == pairs
    for pair in pairs:
        parts = [p for m in pair["prompt"] for p in m["content"]]
        assert sum(p["type"] == "image" for p in parts) == len(pair["images"])


def test_paths_become_absolute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ask = {"role": "user", "content": "<image><image>"}
    data = {"messages": [ask, {"role": "assistant", "content": "x"}],
            "images": ["a.png", "a.png_0,0,9,9"]}  # fmt: skip
    (fork,) = convert_rows([read_row(data)], "llamafactory-vpt")
    assert fork["images"] == [f"{folder}/a.png", f"{folder}/a.png_0,0,9,9"]
    (trl,) = convert_rows([read_row(data)], "trl", pictures="crops")
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in trl["images"])


def test_layouts_that_are_none(rows: list[Row]) -> None:
    with pytest.raises(UserError, match=r"unknown layout; got: alpaca; expected: llamafactory, "):
        list(convert_rows(rows, "alpaca"))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"unknown reencoded; got: drop; expected: refuse or pict"):
        list(convert_rows(rows, "trl", reencoded="drop"))  # type: ignore[arg-type]


def test_figures(rows: list[Row]) -> None:
    got = row_stats(rows).to_dict()
    assert got["rows"] == 3
    assert got["kinds"] == {"region": 1, "clip": 1, "direct": 1}
    assert got["calls"] == {"region": 1, "clip": 1}
    assert got["types"] == {"colour": 3}
    assert (got["triggers"], got["pictures"]) == (1, 1)
    assert got["longest_side"]["max"] == 160
    assert got["crop_share"]["median"] == round(60 * 40 / (160 * 80), 4)
    assert got["tokens"] == {}
    assert spread([4, 1, 2, 3, 5]) == {"min": 1, "25%": 2, "median": 3, "75%": 4, "max": 5}


def test_rows_are_drawn(rows: list[Row], folder: Path) -> None:
    page = draw_row(rows[0])
    assert page.width > 560 + 260
    red = (230, 25, 75)
    counts = {colour: n for n, colour in page.getcolors(1 << 24) or []}
    assert counts[red] > 500  # the crop's edge, and its label
    assert draw_row(rows[2]).width < 600
    files = show_rows(dict(enumerate(rows)), folder / "out")
    assert [f.name for f in files] == ["row_0.png", "row_1.png", "row_2.png", "index.html"]
    text = files[-1].read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 3
    assert "&lt;|region_token_start|&gt;" in text
    assert "<script" not in html_page(rows)
    with pytest.raises(UserError, match=r"the pictures cannot be written; where: .*a\.png"):
        show_rows({0: rows[0]}, folder / "a.png" / "x")
    (folder / "a.png").unlink()
    with pytest.raises(ImageError, match=r"there is no such file"):
        draw_row(rows[0])
