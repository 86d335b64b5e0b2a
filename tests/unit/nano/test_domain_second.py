"""The second version's fast forward and batches are the library's; its labels lie on the marks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

import torch

from vpt_agent.data import RowEncoder
from vpt_agent.engine.features import FeatureStore
from vpt_agent.engine.parts import Look
from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.nano.conversation import Encoded
from vpt_agent.nano.domain import AGAIN, MARKS, ask, make_domain_scene
from vpt_agent.nano.domain.export import row_of
from vpt_agent.nano.domain.table import TABLE, equal_size
from vpt_agent.nano.second import pool as pool_module
from vpt_agent.nano.second.batches import PLAN, SecondBatches
from vpt_agent.nano.second.labels import CELL, again_labels, spots
from vpt_agent.nano.second.model import Second, build_second, parameter_count, token_labels
from vpt_agent.nano.second.pool import DomainPool, draw_domain_shard
from vpt_agent.nano.second.stickers import Stickers
from vpt_agent.nano.second.text import (
    END,
    SecondEncoder,
    again_call,
    again_turn,
    opening,
    regions_call,
    regions_turn,
    second_tokenizer,
)
from vpt_agent.nano.second.train import load_second
from vpt_agent.nano.ship import MOST_BYTES, MOST_PARAMETERS, image_policy
from vpt_agent.nano.views import asked_cells, crop_box, fit_view
from vpt_agent.prompt.vpt import VPTLayout
from vpt_agent.training.collate import Collator
from vpt_agent.types import Box, View
from vpt_agent.vision.patches import look
from vpt_agent.vision.policy import ImagePolicy

POLICY = ImagePolicy.from_manifest(image_policy())


@pytest.fixture(scope="module")
def encoder() -> SecondEncoder:
    return SecondEncoder(second_tokenizer())


@pytest.fixture(scope="module")
def model(encoder: SecondEncoder) -> Second:
    torch.manual_seed(5)
    return Second(build_second(encoder.tokenizer)).eval()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of one small shard."""
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pool_module, "SHARD", 5)
        draw_domain_shard(folder, 0)
    return folder


def _row(tmp_path: Path, name: str, kind: str) -> tuple[Any, Any, Any]:
    seed = next(s for s in range(50) if ask(make_domain_scene(s, size=(672, 672)), name))
    scene = make_domain_scene(seed, size=(672, 896))
    asked = ask(scene, name)
    assert asked is not None
    picture = tmp_path / "scene.png"
    scene.image.save(picture)
    return scene, asked, row_of(scene, asked, kind, id="x", picture=picture, trigger=True)


def _pieces(scene: Any, asked: Any, kind: str) -> tuple[list[tuple[str, bool]], list[Any]]:
    """The conversation in the recipe's own words, and its pictures of the base tower."""
    views = [np.asarray(fit_view(scene.image, 224))]
    answer = (asked.answer + END, True)
    if kind == "direct":
        return [(opening(asked.question), False), answer], views
    pieces = [(opening(asked.question, kind), False)]
    if kind == "region":
        cells = [asked_cells(box, *scene.size) for box in asked.boxes]
        pieces += [(regions_call(cells), True), (regions_turn(len(cells)), False)]
        boxes = [crop_box(c, *scene.size) for c in cells]
        views += [np.asarray(fit_view(scene.image, 280, box)) for box in boxes]
    else:
        pieces += [(again_call(kind), True), (again_turn(kind), False)]
    return [*pieces, answer], views


CASES = [
    ("region", "region"),
    ("two_looks", "region"),
    ("count_tags", "direct"),
    ("same_mark", "clip"),
    ("count_marks", "dino"),
    ("most_mark", "sam"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_conversations_are_the_librarys(
    tmp_path: Path, encoder: SecondEncoder, name: str, kind: str
) -> None:
    """Ids, labels and positions equal those that `vpt-agent train` makes of the exported row."""
    scene, asked, row = _row(tmp_path, name, kind)
    collator = Collator(RowEncoder(VPTLayout(encoder.tokenizer, TABLE), POLICY))
    item = collator.item(row)
    assert item is not None
    batch = collator.batch([item])
    pieces, views = _pieces(scene, asked, kind)
    grids = [(v.shape[0] // 28, v.shape[1] // 28) for v in views]
    again = 18 * 14 if kind == "clip" else 256
    made: Encoded = encoder.encode_again(pieces, grids, again)
    n = len(made.ids)
    assert n == len(item)
    assert made.ids.tolist() == batch["input_ids"][0, :n].tolist()
    assert made.labels.tolist() == batch["labels"][0, :n].tolist()
    assert made.positions.tolist() == batch["position_ids"][:, 0, :n].tolist()


@pytest.mark.parametrize("kind", ["clip", "dino", "sam"])
def test_fast_loss_is_the_librarys(
    tmp_path: Path,
    encoder: SecondEncoder,
    model: Second,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """The batched forward's loss of a re-encoding row equals that of the model's own `forward`."""
    scene = make_domain_scene(3, size=(672, 896))
    asked = ask(scene, "count_marks")
    assert asked is not None
    monkeypatch.setattr("vpt_agent.nano.second.batches.HIDE", 0.0)
    monkeypatch.setattr(pool_module, "SHARD", 1)
    monkeypatch.setattr(pool_module, "make_domain_scene", lambda *_, **__: scene)
    draw_domain_shard(tmp_path, 0)
    pool = DomainPool(tmp_path)
    record = pool.records[0][1]
    record.asked = [r for r in record.asked if r.question == asked.question]
    fast = SecondBatches("talk", tmp_path, encoder, 1, plan=[kind]).batch(pool, 0)
    trigger = TABLE[kind].trigger in encoder.tokenizer.decode(fast["input_ids"][0])
    picture = tmp_path / "scene.png"
    scene.image.save(picture)
    row = row_of(scene, asked, kind, id="x", picture=picture, trigger=trigger)
    collator = Collator(RowEncoder(VPTLayout(encoder.tokenizer, TABLE), POLICY))
    item = collator.item(row)
    assert item is not None
    slow = collator.batch([item])
    del slow["rows"]
    with torch.no_grad():
        _, metrics = model(fast)
        output = model.vpt(**slow)
    assert fast["input_ids"][0].tolist() == slow["input_ids"][0, : len(item)].tolist()
    # bfloat16 on one side; PIL and torch resize alike, not equally.
    assert metrics[f"{kind}_said"] == pytest.approx(float(output.loss), rel=0.02)


def test_a_pool_without_questions_ends_in_an_error(drawn: Path, encoder: SecondEncoder) -> None:
    """Not in an endless search."""
    pool = DomainPool(drawn)
    for _, record in pool.records:
        record.asked = [r for r in record.asked if r.type == "count_marks"]
    for kind in ("none", "two_looks"):
        batches = SecondBatches("talk", drawn, encoder, 2, plan=[kind])
        with pytest.raises(UserError, match="no scene of this pool has such a question"):
            batches.batch(pool, 0)


def test_labels_lie_on_the_marks(drawn: Path) -> None:
    """Each mark has one cell and one visual token, where its middle is in that kind's view."""
    pool = DomainPool(drawn)
    assert len(pool.records) == 5
    for shard, record in pool.records:
        marked = [i for i, m in enumerate(record.marks) if m.mark]
        for kind in AGAIN:
            view = pool.view(shard, record.again[kind])
            grid = again_labels(record, kind, *view.shape[:2])
            assert grid.shape[:2] == (view.shape[0] // CELL[kind], view.shape[1] // CELL[kind])
            assert (grid[..., 0] > 0).sum() == len(marked)
            for i in marked:
                x, y = record.marks[i].at[kind]
                cell = grid[int(y) // CELL[kind], int(x) // CELL[kind]]
                assert MARKS[cell[0] - 1] == record.marks[i].mark
                # The mark's middle is darker or lighter than the rest of its sticker.
                near = view[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4].mean(-1)
                assert np.ptp(near) > 60
            assert spots(record, kind, view, marked).sum() == len(marked)
            if kind != "clip":
                tokens = token_labels(
                    torch.from_numpy(grid.reshape(-1, 3)), kind, AGAIN[kind] // CELL[kind]
                )
                assert tokens.shape == (256, 3)
                assert int((tokens[:, 0] > 0).sum()) == len(marked)


@pytest.mark.parametrize("stage", ["see", "talk"])
def test_every_batch_has_a_finite_loss_and_gradients(
    drawn: Path, encoder: SecondEncoder, model: Second, stage: Any
) -> None:
    """All kinds of batches run; over all of them every part of the model gets a gradient."""
    batches, pool = SecondBatches(stage, drawn, encoder, 2), DomainPool(drawn)
    model.zero_grad()
    for number, _ in enumerate(PLAN[stage]):
        batch = batches.batch(pool, number)
        again = batches.batch(pool, number)
        assert all(
            torch.equal(v, again[k]) for k, v in batch.items() if isinstance(v, torch.Tensor)
        )
        loss, _ = model(batch)
        assert torch.isfinite(loss)
        loss.backward()
    parts = ["visual.blocks", "detection_model", "seg_model"]
    if stage == "talk":
        parts += ["model.layers", "clip_projector.linear_condition"]
        parts += [f"{p}_projector.{n}" for p, n in (("detection", "linear_f"), ("seg", "conv"))]
    for part in parts:
        grads = [p.grad for n, p in model.vpt.named_parameters() if n.startswith(part)]
        assert any(g is not None and float(g.abs().sum()) > 0 for g in grads), part


def test_sizes(model: Second, encoder: SecondEncoder) -> None:
    """At most 7 million parameters and 15 MB in bfloat16; rows declare inputs above 224."""
    count = parameter_count(model.vpt)
    assert count <= MOST_PARAMETERS
    assert 2 * count < MOST_BYTES
    assert all(TABLE[k].input_size == size > 224 for k, size in AGAIN.items())
    assert all(len(encoder.ids_of(f" {mark}")) == 1 for mark in MARKS)


def test_the_engine_looks_again_at_the_declared_size(model: Second) -> None:
    """Features of a kind of the base tower are those of its own input, not of the first look."""
    view = View("image_1", (scene := make_domain_scene(3)).image, "image_1", Box(0, 0, 844, 844),
                scene.size)  # fmt: skip
    store = FeatureStore(model.vpt, POLICY, torch.device("cpu"), capacity=8)
    looks = [Look(kind, (view,)) for kind in ("base", *AGAIN)]
    with torch.no_grad():
        base, clip, dino, sam = (done[0] for done in store.look_all(looks))
        patches = look([view], POLICY.at_input(504))
        (own,) = model.vpt.encode_images(patches.pixel_values, patches.grid_thw)
    assert [len(x.tokens) for x in (base, clip, dino, sam)] == [64, 324, 256, 256]
    assert clip.grid == (1, 36, 36)
    torch.testing.assert_close(clip.tokens, own)
    assert store.encoder_calls == 4
    assert POLICY.at_input(None) is POLICY
    assert ImagePolicy().at_input(504).plan((840, 420), crop=True).size == (504, 252)


def test_equal_size_is_a_variant(encoder: SecondEncoder) -> None:
    """The variant without larger second looks builds, and looks at 224 pixels."""
    table, shapes = equal_size()
    vpt = build_second(encoder.tokenizer, table, shapes)
    assert vpt.table["clip"].kind.input_size is None
    for kind in ("dino", "sam"):
        with torch.no_grad():
            (features,) = vpt.encode(kind, pixels=torch.zeros(1, 3, 224, 224))
        assert features.shape == (256, 192)


def test_stickers_are_labelled() -> None:
    """Every mark put into a view has its label, and lies where the label says."""
    for kind in AGAIN:
        view = np.full((168, 168, 3), 128, dtype=np.uint8)
        labels = np.zeros((168 // CELL[kind], 168 // CELL[kind], 3), dtype=np.int64)
        stickers = Stickers(kind, count=60)
        made = stickers.add(random.Random(1), view, labels, 12)
        found = np.argwhere(labels[..., 0] > 0)
        assert 3 <= len(found) <= 12
        for row, column in found:
            cell = CELL[kind]
            part = made[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            assert np.ptp(part.mean(-1)) > 40
        # What differs from the plain view has a label, or none at all; never the label "no mark".
        changed = np.abs(made.astype(int) - 128).max(-1) > 60
        grid = changed[: len(labels) * CELL[kind], : labels.shape[1] * CELL[kind]]
        cells = grid.reshape(len(labels), CELL[kind], labels.shape[1], CELL[kind]).any((1, 3))
        assert not (cells & (labels[..., 0] == 0)).any()
    again = Stickers("dino", count=3).add(random.Random(2), view, labels * 0, 2)
    assert (again == Stickers("dino", count=3).add(random.Random(2), view, labels * 0, 2)).all()


def test_weights_that_do_not_fit(tmp_path: Path, model: Second) -> None:
    """A stage without the one before it, or with other weights, is refused."""
    with pytest.raises(CheckpointError, match="the stage before this one has left nothing"):
        load_second(tmp_path, "talk")
    with pytest.raises(CheckpointError, match="not of the second version"):
        model.load_weights({"x": torch.zeros(1)})
    model.load_weights(model.state_dict())
