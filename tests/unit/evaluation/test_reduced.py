"""The reduced domain of the experiments: its rows can be learnt from, its groups can be decided."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vpt_agent.data import RowEncoder, read_row, row_views
from vpt_agent.data.encode import Encoded
from vpt_agent.evaluation import iogt
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.prompt.vpt import VPTLayout

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("reduced"), importlib.import_module("ablations")
    for name in ("reduced", "reduced_base", "ablations"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("kind", "grid", "controls"), [("region", 4, 1), ("region", 32, 1), ("dino", 8, 2)]
)
def test_rows_teach_what_they_should(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path, kind: str, grid: int, controls: int
) -> None:
    reduced, _ = modules
    table = reduced.make_table(kind, grid=grid, controls=controls)
    reduced.draw_scenes(tmp_path / "scenes", 1)
    reduced.make_model(tmp_path / "model", table, seed=0)
    model = VPTForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    processor = VPTProcessor.from_pretrained(tmp_path / "model", config=model.config)
    encoder = RowEncoder(VPTLayout(processor.tokenizer, table), processor.policy)
    for disc in reduced.make_discs(0):
        row = read_row(
            reduced.row_of(table.kinds[0], disc, "scenes/0.png", controls),
            tags=("<image>", table.kinds[0].tag) if kind == "dino" else ("<image>",),
        )
        views = row_views(row, folder=tmp_path)
        encoded = encoder.encode(row, views)
        assert isinstance(encoded, Encoded)
        learnt = [i for i in encoded.labels if i >= 0]
        text = processor.tokenizer.decode(learnt, skip_special_tokens=False)
        assert disc.mark in text
        assert table.kinds[0].start in text
        if kind == "region":
            crop = views["<image>"][1]
            assert iogt(crop.box, disc.box) == 1


def test_boxes_as_text_hold_their_object(modules: tuple[ModuleType, ModuleType]) -> None:
    reduced, _ = modules
    for seed in range(40):
        for disc in reduced.make_discs(seed):
            text = reduced.box_text(disc.box)
            assert reduced.TEXT_BOX.call_text(text=text)
            assert iogt(reduced.text_box(text), disc.box) > 0.97
    assert reduced.text_box("50,50,20,60") is None
    assert reduced.text_box("nonsense") is None


def test_every_order_can_be_decided(modules: tuple[ModuleType, ModuleType]) -> None:
    _, ablations = modules
    runs = {}
    for group in ablations.groups():
        names = [label for label, _ in group["runs"]]
        assert set(group["expected"]) <= set(names)
        for _, run in group["runs"]:
            assert runs.setdefault(run.name, run) == run
    seeds = [run.seed for run in runs.values() if run.kind == "region" and run.grid == 8]
    assert seeds == [0, 1, 2]
    assert {run.grid for run in runs.values()} == {4, 8, 16, 32}
    assert {run.controls for run in runs.values()} == {1, 2, 4}


def test_the_queue_begins_with_what_decides(modules: tuple[ModuleType, ModuleType]) -> None:
    _, ablations = modules
    queue = ablations.queue()
    every = {run for group in ablations.groups() for _, run in group["runs"]}
    assert len(queue) == len(every) == 27
    assert set(queue) == every
    first = queue[:12]
    for seed in (0, 1, 2):
        four = first[4 * seed : 4 * seed + 4]
        assert {run.seed for run in four} == {seed}
        assert {(run.kind, run.grid, run.mask) for run in four} == {
            ("region", 8, "off"), ("region", 16, "off"), ("dino", 8, "off"),
            ("dino", 8, "embeddings"),
        }  # fmt: skip


def test_a_box_as_text_can_be_said(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    """The characters of its payload are tokens of the model that is made."""
    reduced, _ = modules
    table = reduced.make_table("box")
    reduced.make_model(tmp_path, table, seed=0)
    model = VPTForConditionalGeneration.from_pretrained(tmp_path)
    (row,) = model.config.table.rows
    processor = VPTProcessor.from_pretrained(tmp_path, config=model.config)
    text = reduced.box_text(reduced.make_discs(0)[0].box)
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert set(ids) <= set(row.characters)
    assert len(ids) == len(text)


def test_scenes_are_drawn_once_and_alike(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    reduced, _ = modules
    reduced.draw_scenes(tmp_path, 2)
    before = (tmp_path / "1.png").stat().st_mtime_ns
    reduced.draw_scenes(tmp_path, 3)
    assert (tmp_path / "1.png").stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]
    item = reduced.test_item(5)
    assert item.picture().tobytes() == reduced.test_item(5).picture().tobytes()
    assert item.question in reduced.COLOURS
    assert item.answer in reduced.MARKS


def test_a_mark_shows_close_up_and_not_at_first_sight(
    modules: tuple[ModuleType, ModuleType],
) -> None:
    reduced, _ = modules

    def seen(mark: str, side: int) -> np.ndarray:
        disc = reduced.Disc("R", mark, (200, 200, 260, 260))
        picture = reduced.draw([disc], 0).resize((side, side), Image.Resampling.BICUBIC)
        inner = [round(v * side / reduced.SIDE) for v in (214, 246)]
        return np.asarray(picture, float)[inner[0] : inner[1], inner[0] : inner[1]]

    for side, least, most in ((reduced.VIEW, 0, 12), (reduced.LOOK, 14, 255)):
        waves = [seen(mark, side)[..., 1].std() for mark in reduced.MARKS]
        assert least <= min(waves), side
        assert max(waves) <= most, side
    means = [seen(mark, reduced.SIDE).mean() for mark in reduced.MARKS]
    assert max(means) - min(means) < 6


@pytest.mark.slow
def test_the_base_is_learnt_goes_on_after_a_kill_and_is_taken(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reduced, _ = modules
    reduced_base = importlib.import_module("reduced_base")
    monkeypatch.setattr(reduced_base, "EVERY", 3)
    how = {"scenes": 3, "steps": 5, "rate": 1e-3}
    told: list[str] = []
    whole = reduced_base.learn_base(tmp_path, say=told.append, **how)
    assert "whole off by" in " ".join(told)
    weights = load_file(whole)
    whole.unlink()  # as if it had been killed after its third step, the last that was kept
    assert (tmp_path / "base.part").is_file()
    told.clear()
    again = load_file(reduced_base.learn_base(tmp_path, say=told.append, **how))
    assert not any("step 2" in line for line in told)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    reduced_base.learn_base(tmp_path, say=pytest.fail, **how)  # is there
    for kind in ("region", "box", "dino"):
        table = reduced.make_table(kind)
        reduced.make_model(tmp_path / kind, table, seed=1, base=tmp_path / "base.safetensors")
        model = VPTForConditionalGeneration.from_pretrained(tmp_path / kind)
        embeddings = model.get_input_embeddings().weight
        known = weights["model.embed_tokens.weight"]
        assert torch.equal(embeddings[: len(known)], known)
        assert len(embeddings) > len(known)
        assert torch.equal(model.visual.merger.ln_q.weight, weights["visual.merger.ln_q.weight"])
        assert hasattr(model, "detection_model") == (kind == "dino")


def test_a_look_at_a_folder_overwrites_no_figures(
    modules: tuple[ModuleType, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, ablations = modules
    kept = tmp_path / "ablations.json"
    kept.write_text("hard won", encoding="utf-8")
    monkeypatch.setattr(ablations, "OUT", kept)
    command = ["ablations.py", "--list", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", command)
    ablations.main()
    assert "not run: k = 8, k = 16, k = 4" in capsys.readouterr().out
    assert kept.read_text(encoding="utf-8") == "hard won"
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "asked.json")])
    ablations.main()
    assert "groups" in (tmp_path / "asked.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("part", ["3/2", "0/1", "one"])
def test_a_part_that_there_is_not_is_said(
    modules: tuple[ModuleType, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    part: str,
) -> None:
    _, ablations = modules
    monkeypatch.setattr(sys, "argv", ["ablations.py", "--work", ".", "--part", part])
    with pytest.raises(SystemExit, match="2"):
        ablations.main()
    assert f"--part is I/N with 1 <= I <= N, not {part}" in capsys.readouterr().err
