"""Sources beside files of the model's own rows: streams, tables of `datasets`, other encoders."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.unit.training import world
from tests.unit.training.test_train import Stop
from vpt_agent.data import Mixture, Row
from vpt_agent.errors import UserError
from vpt_agent.tokens import PerceptionTable, own_kind
from vpt_agent.tokens.table import PUBLISHED
from vpt_agent.training import TrainConfig, train
from vpt_agent.training.config import Dataset, Source
from vpt_agent.training.logs import METRICS, read_metrics
from vpt_agent.training.reinforce import make_reinforce_config
from vpt_agent.training.reinforce.problems import problems_of
from vpt_agent.training.sources import RowFile, RowFlow, Wanted, evaluation_rows, training_rows

CLIP, DINO, SAM = (PUBLISHED[name] for name in ("clip", "dino", "sam"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    world.save_model(folder / "model", encoders=("clip",))
    world.save_rows(folder / "rows", 12)
    rows = json.loads((folder / "rows" / "rows.json").read_text())
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "rows" / "rows.jsonl").write_text(lines)
    return folder


def config(place: Path, out: Path, source: dict[str, Any], **changes: Any) -> TrainConfig:
    data = {"sources": [source], "hold_out": 2} | changes.pop("data", {})
    return world.config(place, out=str(out), data=data, **changes)


def local(place: Path, **changes: Any) -> dict[str, Any]:
    """The rows as a table of `datasets`, made for models of any encoder."""
    rows = place / "rows"
    table = {"name": "json", "files": [str(rows / "rows.jsonl")]}
    return {"dataset": table, "images": str(rows), "retarget": True} | changes


def texts(rows: Any) -> list[str]:
    found = []
    for row in rows:
        assert isinstance(row, Row)
        found.append(row.messages[1].content)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_trained_on_and_taken_up(place: Path, tmp_path: Path, workers: int) -> None:
    pytest.importorskip("datasets")
    source = local(place, stream=True)
    changes: dict[str, Any] = {"data": {"workers": workers, "shuffle": 3}, "save_every": 2}
    train(config(place, tmp_path / "a", source, **changes))
    killed = config(place, tmp_path / "b", source, **changes)
    with pytest.raises(KeyboardInterrupt):
        train(killed, callbacks=[Stop(3)])
    train(killed, resume=True)
    assert read_metrics(killed.out / METRICS) == read_metrics(tmp_path / "a" / METRICS)


def test_files_streams_and_tables_give_the_same_rows(place: Path) -> None:
    pytest.importorskip("datasets")
    table = PerceptionTable.published(["clip"])
    file = {"path": str(place / "rows" / "rows.json"), "retarget": True}
    held, seen = [], []
    for source in (file, file | {"stream": True}, local(place), local(place, stream=True)):
        data = config(place, Path("x"), source, data={"shuffle": 1}).data
        held.append(texts(evaluation_rows(data, table)))
        mixture, count = training_rows(data, seed=0, table=table)
        assert count == (None if source.get("stream") else 10)
        seen.append(texts(islice(mixture, 20)))
    assert len(held[0]) == 2
    assert all(one == held[0] for one in held)
    assert all(one == seen[0] for one in seen)
    assert seen[0][:10] == seen[0][10:]


def test_rows_made_for_other_encoders_become_the_models_own(place: Path) -> None:
    path = place / "rows" / "rows.json"
    clip = Wanted(table=PerceptionTable.published(["clip"], controls=2))
    rows = RowFile(Source(path=path, retarget=True), wanted=clip)
    said = "".join(texts(rows))
    assert said.count(f"{CLIP.start}{CLIP.control}{CLIP.control}{CLIP.end}") == 8
    assert DINO.start not in said
    assert SAM.start not in said
    both = Wanted(table=PerceptionTable.published(["dino", "sam"]))
    with pytest.raises(UserError, match=r"several encoders: say which"):
        texts(RowFile(Source(path=path, retarget=True), wanted=both))
    named = texts(RowFile(Source(path=path, retarget="sam"), wanted=both))
    assert sum(SAM.start in text for text in named) == 6
    assert sum(DINO.start in text for text in named) == 2
    with pytest.raises(UserError, match=r"re-targeted for a model, and here there is none"):
        RowFile(Source(path=path, retarget=True))


def test_rows_of_a_kind_of_ones_own_may_name_its_pictures(tmp_path: Path) -> None:
    world.picture(tmp_path, 0)
    kind = own_kind("peer", payload="control")
    turns = [("user", "<image>q"), ("assistant", kind.call_text()), ("user", kind.tag),
             ("assistant", "ok")]  # fmt: skip
    row = {"messages": [{"role": r, "content": c} for r, c in turns],
           "images": ["p0.png"], "peer_images": ["p0.png"]}  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    source = Source(path=tmp_path / "rows.json")
    wanted = Wanted(table=PerceptionTable((kind,)))
    (read,) = RowFile(source, wanted=wanted)
    assert isinstance(read, Row)
    assert len(read.pictures[kind.tag]) == 1
    with pytest.raises(UserError, match=r"keys that nothing reads.*peer_images"):
        RowFile(source)[0]
    settings = {"out": "x", "steps": 1, "sources": [source.model_dump()]}
    mixture = problems_of(make_reinforce_config(settings), PerceptionTable((kind,)))
    assert next(iter(mixture)).question == "q"


def test_columns_are_renamed(tmp_path: Path) -> None:
    row = world.action_row(world.picture(tmp_path, 0), "clip")
    row["depth_images"] = row.pop("clip_images")
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    path = tmp_path / "rows.json"
    (read,) = RowFile(Source(path=path, columns={"depth_images": "clip_images"}))
    assert isinstance(read, Row)
    assert len(read.pictures[CLIP.tag]) == 1


def test_streams_of_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(world.direct_row(world.picture(tmp_path, 0)))
    path.write_text(f"{good}\n{{\n{good}\n")
    source = Source(path=path, stream=True)
    with pytest.raises(UserError, match=r"this is no JSON; where: rows.jsonl, line 2"):
        list(RowFlow(source))
    kinds = [isinstance(row, Row) for row in RowFlow(source, wanted=Wanted(skip=True))]
    assert kinds == [True, False, True]
    assert RowFlow(source).fingerprint() == RowFile(Source(path=path)).fingerprint()


def test_what_cannot_be_a_source(place: Path) -> None:
    pytest.importorskip("datasets")
    none = Source(dataset=Dataset(name="json", files=("none.json",)))
    with pytest.raises(UserError, match=r"`datasets` cannot open this; where: json"):
        RowFile(none)
    settings = {"out": "x", "steps": 1, "sources": [{"path": "rows.json", "stream": True}]}
    with pytest.raises(UserError, match=r"questions are taken by number.*stream: True"):
        problems_of(make_reinforce_config(settings))
    empty = Source(path=place / "rows" / "rows.json", stream=True)
    mixture: Mixture[Any] = Mixture([(RowFlow(empty, first=99), 1)], stop="never")
    with pytest.raises(UserError, match=r"a source of a mixture has no rows"):
        next(iter(mixture))
