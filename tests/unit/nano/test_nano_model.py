"""Views and the batched forward pass agree with transformers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("transformers")

import torch
from transformers import Qwen2VLImageProcessorPil

from vpt_agent.nano.alphabet import COLOURS, SHAPES
from vpt_agent.nano.batches import asked_tags, frame_patches
from vpt_agent.nano.conversation import END, Encoder, question_text, region_text
from vpt_agent.nano.model import build_model, image_features, naming, text_states
from vpt_agent.nano.pool import SceneRecord, TagRecord, jittered
from vpt_agent.nano.tokenizer import KIND, build_tokenizer
from vpt_agent.nano.views import asked_cells, cells_of, crop_box, fit_size, fit_view, patches


def _picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8), "RGB")


@pytest.mark.parametrize(("size", "longest"), [((900, 700), 224), ((500, 731), 308)])
def test_view_is_the_processors(size: tuple[int, int], longest: int) -> None:
    """Same patches as transformers' processor, when it is given the resized view."""
    view = fit_view(_picture(*size), longest)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 10**7})
    expected = processor(view, return_tensors="np")
    rows, columns = view.height // 14, view.width // 14
    assert expected["image_grid_thw"].tolist() == [[1, rows, columns]]
    np.testing.assert_allclose(patches(np.asarray(view)), expected["pixel_values"], atol=2e-6)


def test_fit_size() -> None:
    """Multiples of 28, the longest side as asked, never less than one token."""
    assert fit_size(1000, 1000, 224) == (224, 224)
    assert fit_size(1344, 672, 224) == (224, 112)
    assert fit_size(2000, 10, 224) == (224, 28)
    assert fit_size(50, 40, 224) == (224, 168)


def test_cells_and_crop() -> None:
    """Cells cover the box, and the crop is these cells and nothing around them."""
    assert cells_of((100, 50, 201, 100), 1600, 800) == (1, 1, 2, 1)
    assert crop_box((1, 1, 2, 1), 1600, 800) == (100, 50, 300, 100)
    assert crop_box((0, 0, 15, 15), 1600, 800) == (0, 0, 1600, 800)
    assert crop_box((14, 15, 15, 15), 1000, 1000) == (875, 937, 1000, 1000)


def test_asked_cells_leave_room() -> None:
    """A quarter of a cell lies around the tag, but for the picture's own edge."""
    assert asked_cells((130, 60, 180, 90), 1600, 800) == (1, 0, 2, 2)
    assert asked_cells((126, 63, 174, 87), 1600, 800) == (1, 1, 1, 1)
    assert asked_cells((0, 0, 1600, 800), 1600, 800) == (0, 0, 15, 15)


@pytest.mark.parametrize("seed", range(40))
def test_jitter_keeps_the_text(seed: int) -> None:
    """A region moved for training still holds every cell of the string."""
    cells, text = (3, 4, 6, 6), (4, 5, 6, 5)
    x0, y0, x1, y1 = jittered(random.Random(seed), cells, text)
    assert (min(x0, text[0]), min(y0, text[1])) == (x0, y0)
    assert (max(x1, text[2]), max(y1, text[3])) == (x1, y1)
    assert max(abs(a - b) for a, b in zip((x0, y0, x1, y1), cells, strict=True)) <= 1


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Read the green tag.", " green"),
        ("What does the green arrow-shaped sign say?", "-shaped"),
        ("What is written on the label at the bottom left?", " left"),
    ],
)
def test_asking_begins_at_the_name(question: str, word: str) -> None:
    """The token that says which tag is meant looks, and so do all up to the coordinates."""
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    view = np.zeros((224, 224, 3), dtype=np.uint8)
    tag = TagRecord(question, "AB3", "green", "oval", (112, 56, 168, 84), (8, 4, 12, 6), [], [])
    record = SceneRecord(0, (448, 448), [], [])
    pieces = [(question_text(question, True), False), (region_text(tag.cells) + END, True)]
    encoded = encoder.encode(pieces, [(8, 8)])
    batch = {
        "input_ids": torch.from_numpy(encoded.ids)[None],
        "labels": torch.from_numpy(encoded.labels)[None],
    }
    found = asked_tags(batch, [(tag, record, view)], encoder)
    asking = found["asking"][0].nonzero()[:, 0].tolist()
    assert asking == list(range(asking[0], asking[-1] + 1))
    assert tokenizer.decode([int(encoded.ids[asking[0]])]) == word
    assert encoded.ids[asking[-1]] == encoder.ids_of(KIND.x_token(12))[0]
    # The tag lies on columns 2 and row 1 of the 8 x 8 visual tokens.
    start = encoded.ids.tolist().index(encoder.image)
    assert (found["spot"][0].nonzero()[:, 0] - start).tolist() == [10]
    assert found["names"].tolist()[0] == encoder.ids_of(" red")[0]


def test_batched_forward_is_qwen2vl() -> None:
    """The training pass gives the plain model's features and states."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model: Any = build_model(tokenizer).eval()
    assert sum(p.numel() for p in model.parameters()) <= 6_000_000
    views = [np.asarray(fit_view(_picture(*s), 224)) for s in ((300, 300), (320, 320), (400, 300))]
    flat = torch.from_numpy(np.concatenate([frame_patches(view) for view in views]))
    grids = [(view.shape[0] // 14, view.shape[1] // 14) for view in views]
    pixels = torch.from_numpy(np.concatenate([patches(view) for view in views]))
    with torch.no_grad():
        ours = image_features(model.model.visual, flat, torch.tensor(grids))
        theirs = model.model.visual(pixels, torch.tensor([[1, *g] for g in grids])).pooler_output
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)
        text = question_text("Read the red tag.", False)
        encoded = Encoder(tokenizer).encode([(text, False)], [(8, 8)])
        embeds = torch.randn(1, len(encoded.ids), 192)
        positions = torch.from_numpy(encoded.positions)[:, None]
        mine, *_ = text_states(model.model.language_model, embeds, positions)
        plain = model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False
        ).last_hidden_state
        torch.testing.assert_close(mine, plain, atol=1e-3, rtol=1e-3)


def test_naming_wants_the_words() -> None:
    """A visual token on a tag that holds its colour's and shape's words costs little."""
    tokenizer = build_tokenizer()
    encoder = Encoder(tokenizer)
    torch.manual_seed(0)
    model: Any = build_model(tokenizer)
    words = model.model.language_model.embed_tokens.weight
    names = torch.tensor([encoder.ids_of(f" {w}")[-1] for w in (*COLOURS, *SHAPES)])
    labels = torch.full((16, 6), -100)
    labels[:, :2] = 0
    # One patch of the third visual token lies on a tag of the fourth colour and second shape.
    labels[9, :2] = torch.tensor([4, 2])
    batch = {
        "input_ids": torch.full((1, 4), encoder.image),
        "whole_labels": labels,
        "image_index": torch.arange(4),
        "names": names,
    }
    seen = torch.zeros(1, 4, 192)
    seen[0, 2] = 20 * (words[names[3]] + words[names[10 + 1]]).detach()
    near, found = naming(model, seen, batch)
    assert found == {"says_colour": 1.0, "says_shape": 1.0}
    far, found = naming(model, -seen, batch)
    assert found == {"says_colour": 0.0, "says_shape": 0.0}
    assert near.item() < 0.1 < far.item()
