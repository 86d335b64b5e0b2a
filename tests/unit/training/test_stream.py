"""Batches go on where they were left, with and without workers, on several processes."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.unit.training import world
from vpt_agent.data import Mixture, Row
from vpt_agent.errors import UserError
from vpt_agent.model.testing import tiny_model
from vpt_agent.training.config import Source, make_config
from vpt_agent.training.run import make_collator
from vpt_agent.training.sources import RowFile, Taken, evaluation_rows, training_rows
from vpt_agent.training.stream import Batches, Cursor, Fixed, Shape

SHAPE = Shape(rows=2, tokens=None, window=6, seed=5)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.save_rows(tmp_path_factory.mktemp("rows"), 24)


def stream(file: Path, **options: Any) -> Batches:
    config = world.config(file.parent.parent)
    collator = make_collator(config, tiny_model()[1])
    rows: Mixture[Taken] = Mixture([(RowFile(Source(path=file)), 1)], seed=3, buffer=9,
                                    stop="never")  # fmt: skip
    return Batches(rows, collator, SHAPE, **options)


def names(batches: Any) -> list[tuple[str, ...]]:
    return [tuple(batch["rows"]) for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_with_the_very_next_batch(file: Path, workers: int) -> None:
    whole = names(islice(_loader(stream(file), workers), 14))
    for stop in (1, 3, 4, 7):
        cursors: dict[int, Cursor] = {}
        for batch in islice(_loader(stream(file), workers), stop):
            cursors[batch["cursor"][0]] = Cursor(*batch["cursor"])
        rest = stream(file, cursors=cursors, given=stop)
        assert names(islice(_loader(rest, workers), 14 - stop)) == whole[stop:]


def where(row: Taken) -> str:
    assert isinstance(row, Row)
    return row.where


def pictures(row: Taken) -> Any:
    assert isinstance(row, Row)
    return row.pictures


def _loader(batches: Batches, workers: int) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None, num_workers=workers)


def test_processes_share_the_rows(file: Path) -> None:
    seen = [
        {row for batch in names(islice(stream(file, rank=rank, world=2), 3)) for row in batch}
        for rank in range(2)
    ]
    assert len(seen[0]) == len(seen[1]) == 6
    assert not seen[0] & seen[1]


def test_evaluation_rows_come_once(file: Path) -> None:
    config = world.config(file.parent.parent, data={"sources": [{"path": str(file)}]})
    kept = evaluation_rows(config.data)
    assert len(kept) == 4
    mixture, count = training_rows(config.data, seed=0)
    assert count == 20
    held = {where(row) for row in kept}
    assert not held & {where(row) for row in islice(mixture, 60)}
    collator = make_collator(config, tiny_model()[1])
    parts = [names(Fixed(kept, collator, Shape(1, None, 2, 0), rank=r, world=2)) for r in (0, 1)]
    assert sorted(row for part in parts for (row,) in part) == sorted(held)
    assert all(len(part) == 2 for part in parts)


def test_rows_that_are_all_too_long_end_the_run(file: Path) -> None:
    batches = stream(file)
    batches.collator.encoder.max_length = 8
    with pytest.raises(UserError, match=r"no row can be trained on.*dropped: prompt: \d+"):
        next(iter(batches))


def test_files_that_hold_no_rows(tmp_path: Path) -> None:
    def data(path: Path, **more: Any) -> Any:
        made = {"sources": [{"path": str(path)}], **more}
        return make_config(
            {"out": "x", "stage": "instruction", "steps": 1, "model": {"path": "x"}, "data": made}
        ).data

    path = tmp_path / "rows.json"
    with pytest.raises(UserError, match=r"there is no such file"):
        training_rows(data(path), seed=0)
    path.write_text("{")
    with pytest.raises(UserError, match=r"no JSON array.*does not begin with"):
        training_rows(data(path), seed=0)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"no JSON array"):
        training_rows(data(path), seed=0)
    path.write_text("[{}, {}]")
    with pytest.raises(UserError, match=r"no rows left for training.*hold_out: 2"):
        training_rows(data(path, hold_out=2), seed=0)
    none = data(path).model_copy(update={"sources": (Source(path=path, weight=0),)})
    with pytest.raises(UserError, match=r"sum to nothing"):
        training_rows(none, seed=0)
    scenes = data(path, sources=[{"scenes": {"count": 1}}])
    with pytest.raises(UserError, match=r"scenes are drawn by the command"):
        training_rows(scenes, seed=0)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("{\n")
    with pytest.raises(UserError, match=r"this is no JSON; where: rows.jsonl, line 1"):
        RowFile(Source(path=lines))[0]


def test_paths_are_remapped(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "It."}]
    paths = ["/old/p0.png", "/older/p1.png", "p2.png"]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"messages": turns, "images": [p]} for p in paths]))
    rows = RowFile(Source(path=file, remap={"/old": "/new"}), first=1)
    assert [pictures(row)["<image>"][0].path for row in rows] == [
        "/older/p1.png",  # whole folders only
        str(tmp_path / "p2.png"),
    ]
    assert (
        pictures(RowFile(Source(path=file, remap={"/old": "/new"}))[0])["<image>"][0].path
        == "/new/p0.png"
    )
    assert where(rows[0:2][1]).endswith("row 2")


def test_pictures_of_a_relative_folder_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.save_rows(tmp_path / "below", 3)
    monkeypatch.chdir(tmp_path)
    relative = next(Path("below").rglob("*.json"))
    collator = make_collator(world.config(tmp_path), tiny_model()[1])
    for row in RowFile(Source(path=relative)):
        assert collator.item(row) is not None


def test_a_pass_takes_each_row_once(file: Path) -> None:
    config = world.config(file.parent.parent)
    data = config.data.model_copy(update={"sources": (Source(path=file),), "hold_out": 0})
    mixture, count = training_rows(data, seed=5)
    taken = [where(row) for row in islice(mixture, 2 * count)]
    assert len(set(taken[:count])) == len(set(taken[count:])) == count
    assert taken[:count] != taken[count:]
