"""Reading rows: files, lists and streams; paths and columns put right; faults told, not hidden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import IterableDataset

from vpt_agent.data import (
    ImageRef,
    RowError,
    RowStream,
    load_rows,
    open_dataset,
    retarget,
    stream_rows,
)
from vpt_agent.data import files as files_module
from vpt_agent.errors import MissingExtraError, UserError
from vpt_agent.tokens import PerceptionTable
from vpt_agent.tokens.table import PUBLISHED

CLIP, DINO = PUBLISHED["clip"], PUBLISHED["dino"]
CALL = CLIP.start + str(CLIP.control) + CLIP.end
REGION = "<|region_token_start|><|x_1|><|y_0|><|x_2|><|y_3|><|region_token_end|>"


def row(*texts: str, **lists: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]} | lists


PLAIN = row("<image>\nWhat is it?", "Ein Kätzchen.", images=["a.png"])
ACTION = row("<image>\nq", CALL, "<clip_image>", "ok", images=["a.png"], clip_images=["a.png"])
CROP = row("<image>\nq", REGION, "<image>", "ok", images=["a.png", "a.png_0,0,20,20"])


def write(path: Path, *rows: object) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        lines = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
        path.write_text(lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_files_are_read_in_pieces_and_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    monkeypatch.setattr(files_module, "CHUNK", chunk)
    path = write(tmp_path / name, PLAIN, ACTION, CROP, PLAIN)
    rows = load_rows(path)
    assert len(rows) == 4
    assert list(rows) == [rows[i] for i in range(4)]
    assert rows[-1].messages[1].content == "Ein Kätzchen."
    assert rows[1:3] == [rows[1], rows[2]]
    assert rows[2].pictures["<image>"][1] == ImageRef(str(tmp_path / "a.png"), (0, 0, 20, 20))
    assert rows[1].where == ("rows.json, row 1" if name == "rows.json" else "rows.jsonl, line 3")
    with pytest.raises(IndexError):
        rows[4]
    assert len(load_rows(write(tmp_path / "empty.json"))) == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"\.json or \.jsonl files; where: .*a\.txt"),
        ("a.json", '{"messages": []}', r"no JSON array.*does not begin with \[.*name it \.jsonl"),
        ("a.json", "", r"no JSON array.*does not begin with"),
        ("a.json", '[{"a": 1}, {"b"', r"no JSON array.*after 11 bytes"),
        ("a.json", '[{"a": 1} {"b": 1}]', r"after 10 bytes: no comma between two items"),
        ("a.json", '[{"a": "\udc80"}]', r"the file cannot be read.*utf-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        len(load_rows(path))


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no such file; where: .*none\.json"):
        load_rows(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"rows come from a file, a list or a table.*got: dict"):
        load_rows({"messages": []})
    with pytest.raises(UserError, match=r"a stream of rows must be able to begin again"):
        stream_rows(iter([PLAIN]))
    with pytest.raises(UserError, match=r"can only be streamed; got: _Endless"):
        load_rows(_Endless())
    with pytest.raises(UserError, match=r"unknown on_error; got: stop; expected: raise or skip"):
        load_rows([PLAIN], on_error="stop")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"unknown depth of checking; got: deep"):
        load_rows([PLAIN], pictures="deep")  # type: ignore[arg-type]


class _Endless:
    def __iter__(self) -> Any:
        while True:
            yield PLAIN


def test_bad_rows_are_raised_or_left_out_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", PLAIN, {"messages": 3}, ACTION, row("<image>", "x"))
    path.write_text(path.read_text(encoding="utf-8") + "\n{not json", encoding="utf-8")
    with pytest.raises(RowError, match=r"messages in pairs.*where: rows\.jsonl, line 3"):
        list(load_rows(path))
    rows = load_rows(path, on_error="skip")
    assert [r.where for r in rows] == ["rows.jsonl, line 1", "rows.jsonl, line 5"]
    assert len(rows) == 2
    assert rows[1].where == "rows.jsonl, line 5"
    assert rows.report.counts == {"not_a_row": 1, "counts": 1, "not_json": 1}
    stream = stream_rows(path, on_error="skip")
    assert len(list(stream)) == len(list(stream)) == 2
    assert (stream.report.rows, stream.report.good) == (5, 2)


def test_the_report_counts_every_fault_and_stops_at_none(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[:50])
    faults = [
        row("<image>\nq", "x", images=["none.png"]),
        row("<image>\nq", "x", images=["b.png"]),
        row("<image>\nq", REGION, "<image>", "x", images=["a.png", "a.png_0,0,41,30"]),
        row("<image>\nq", REGION[:-20], images=["a.png"]),
        row("<image>\nq", CALL, "well?", "x", images=["a.png"]),
        row("<image>\nq", REGION, "Region 0: <image>\nRegion 1: <image>", "x",
            images=["a.png", "a.png_0,0,9,9", "a.png_0,0,9,9"]),
        row("q", "x", images=["a.png"]),
        row("q", "x", deep=1),
        row("<image>", "x", images=["a.png_1,2"]),
    ]  # fmt: skip
    rows = load_rows(write(tmp_path / "rows.json", PLAIN, ACTION, CROP, *faults))
    report = rows.check()
    assert report.counts == {
        "missing_pictures": 1,
        "unreadable_pictures": 1,
        "crops_outside": 1,
        "calls": 1,
        "results": 1,
        "counts": 1,
        "unknown_keys": 1,
        "paths": 1,
    }
    assert (report.rows, report.good, report.pictures, report.ok) == (12, 4, 3, False)
    text = str(report)
    assert "rows.json: 12 rows, 4 good, 3 pictures seen" in text
    assert "crops outside: 1" in text
    assert report.to_dict()["problems"]["calls"]["count"] == 1
    torn = load_rows([row("<image>", "x", images=["torn.png"])], folder=tmp_path)
    assert torn.check().ok
    assert torn.check(pictures="pixels").counts == {"unreadable_pictures": 1}
    assert load_rows([PLAIN]).check(pictures="none").ok
    assert rows.check(limit=3).ok
    many = load_rows([faults[7]] * 9).check()
    assert len(many.examples["unknown_keys"]) == 5
    assert "... and 4 more" in str(many)


def test_pictures_can_be_checked_on_reading(tmp_path: Path) -> None:
    rows = load_rows([PLAIN], folder=tmp_path, pictures="headers")
    with pytest.raises(RowError, match=r"no such file; where: rows, row 0, .*a\.png; do: remap"):
        rows[0]
    assert len(load_rows([PLAIN], folder=tmp_path, pictures="headers", on_error="skip")) == 0


def test_prefixes_are_remapped_as_whole_folders(tmp_path: Path) -> None:
    paths = ["/old/coco/a.jpg_1,2,3,4", "/old/b.jpg", "/older/c.jpg", "d.jpg"]
    data = row("<image>" * 4, "x", images=paths)
    remap = {"/old": "/new", "/old/coco/": "coco", "/unused": "/x"}
    rows = load_rows([data], remap=remap, folder="/base")
    got = [ref.path for ref in rows[0].pictures["<image>"]]
    assert got == ["/base/coco/a.jpg", "/new/b.jpg", "/older/c.jpg", "/base/d.jpg"]
    assert rows[0].pictures["<image>"][0].crop == (1, 2, 3, 4)
    report = rows.check(pictures="none")
    assert report.unused_remaps == ("/unused",)
    assert "no path begins with /unused" in str(report)


def test_the_column_that_the_release_loses() -> None:
    lost = {**ACTION, "depth_images": ["a.png"]}
    del lost["clip_images"]
    for rules in ("strict", "published"):
        with pytest.raises(RowError, match=r"depth_images.*read with the column depth_images as"):
            load_rows([lost], rules=rules)[0]  # type: ignore[arg-type]
    columns = {"depth_images": "clip_images"}
    assert load_rows([lost], columns=columns)[0] == load_rows([ACTION])[0]
    with pytest.raises(RowError, match=r"two keys of a row would become one.*depth_images and"):
        load_rows([ACTION | lost], columns=columns)[0]
    filled = ACTION | {"depth_images": None, "seg_images": None, "meta": None}
    assert load_rows([filled])[0] == load_rows([ACTION])[0]


def test_rows_become_those_of_the_model() -> None:
    table = PerceptionTable.published(["dino"], controls=2)
    got = load_rows([ACTION | {"meta": {"kind": "clip", "tools": ["clip"], "id": 7}}], table=table)[
        0
    ]
    assert got.messages[1].content == f"{DINO.start}{DINO.control}{DINO.control}{DINO.end}"
    assert got.messages[2].content == "<detection_image>"
    assert got.pictures["<detection_image>"] == (ImageRef("a.png"),)
    assert got.pictures["<clip_image>"] == ()
    assert got.meta == {"kind": "dino", "tools": ["dino"], "id": 7}
    both = PerceptionTable.published(["dino", "sam"])
    with pytest.raises(UserError, match=r"several encoders.*got: clip; expected: dino, sam"):
        load_rows([ACTION], table=both)[0]
    assert "<seg_image>" in load_rows([ACTION], table=both, encoder="sam")[0].messages[2].content
    with pytest.raises(UserError, match=r"unknown encoder; got: clip; expected: dino, sam"):
        load_rows([ACTION], table=both, encoder="clip")[0]
    same = load_rows([ACTION], table=PerceptionTable.published(["clip"]))[0]
    assert same == load_rows([ACTION])[0]
    none = load_rows([ACTION, CROP], table=PerceptionTable.published(), on_error="skip")
    assert [r.where for r in none] == ["rows, row 1"]
    assert none.report.counts == {"kinds": 1}


def test_two_encoders_cannot_become_one() -> None:
    data = row("<image>", CALL, "<clip_image><seg_image>", "x",
               images=["a"], clip_images=["a"], seg_images=["a"])  # fmt: skip
    with pytest.raises(RowError, match=r"several encoders, which cannot become one.*clip, sam"):
        retarget(load_rows([data])[0], PerceptionTable.published(["dino"]))


def test_kinds_that_the_model_lacks_are_told_by_the_check() -> None:
    rows = load_rows([row("<image><clip_image>", "x", images=["a"], clip_images=["a"])])
    from vpt_agent.data import problems

    found = list(problems(rows[0], pictures="none", table=PerceptionTable.published(["dino"])))
    assert [e.problem for e in found] == ["kinds"]
    assert "got: <clip_image>; expected: region, dino" in str(found[0])


def test_tables_of_datasets_are_read_and_streamed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    path = write(tmp_path / "rows.jsonl", PLAIN, ACTION)
    options = {"split": "train", "files": str(path)}
    stream = stream_rows(open_dataset("json", **options), folder=tmp_path)  # type: ignore[arg-type]
    assert [r.messages for r in stream] == [r.messages for r in load_rows(path)]
    assert [r.pictures for r in stream] == [r.pictures for r in load_rows(path)]
    with pytest.raises(UserError, match=r"`datasets` cannot open this; where: json"):
        open_dataset("json", split="test", files=str(path), streaming=False)


def test_datasets_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"got: datasets; do: pip install 'vpt-agent\[data"):
        open_dataset("json")


def test_a_misspelt_option_is_told() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'foldr'"):
        load_rows([PLAIN], foldr="x")  # type: ignore[call-arg]


def test_rows_of_a_streamed_table_are_all_read_in_a_worker(tmp_path: Path) -> None:
    """By itself a streamed table would give each worker of torch a part of its rows only."""
    pytest.importorskip("datasets")
    from torch.utils.data import DataLoader

    path = write(tmp_path / "rows.jsonl", PLAIN, ACTION, CROP)
    table = open_dataset("json", files=str(path))
    rows = stream_rows(table, folder=tmp_path, name="mine")
    loader = DataLoader(_Torch(rows), batch_size=None, num_workers=2)
    assert sorted(loader) == sorted(2 * [f"mine, row {i}" for i in range(3)])
    assert [r.messages for r in rows] == [r.messages for r in load_rows(path)]


class _Torch(IterableDataset[str]):
    def __init__(self, rows: RowStream) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return (row.where for row in self.rows)


def test_fingerprints_tell_that_rows_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", PLAIN)
    before = load_rows(path).fingerprint()
    assert load_rows(path).fingerprint() == before
    assert load_rows(write(path, ACTION)).fingerprint() != before
    assert load_rows([PLAIN]).fingerprint() is None
    gone = load_rows(path)
    path.unlink()
    with pytest.raises(UserError, match=r"the file cannot be read; where: .*rows.jsonl"):
        gone.fingerprint()
    pytest.importorskip("datasets")
    write(path, PLAIN)
    local = {"split": "train", "files": str(path)}
    table = open_dataset("json", streaming=False, **local)  # type: ignore[arg-type]
    again = open_dataset("json", streaming=False, **local)  # type: ignore[arg-type]
    assert load_rows(table).fingerprint() == load_rows(again).fingerprint() is not None
    assert stream_rows(open_dataset("json", **local)).fingerprint() is None  # type: ignore[arg-type]
