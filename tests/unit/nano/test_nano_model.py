"""Views and the batched forward pass agree with transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("transformers")

import torch
from transformers import Qwen2VLImageProcessorPil

from vpt_agent.nano.batches import frame_patches
from vpt_agent.nano.conversation import Encoder, question_text
from vpt_agent.nano.model import build_model, image_features, text_states
from vpt_agent.nano.tokenizer import build_tokenizer
from vpt_agent.nano.views import cells_of, crop_box, fit_size, fit_view, patches


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
    """Cells cover the box, and the crop adds one cell on each side inside the picture."""
    assert cells_of((100, 50, 201, 100), 1600, 800) == (1, 1, 2, 1)
    assert crop_box((1, 1, 2, 1), 1600, 800) == (0, 0, 400, 150)
    assert crop_box((0, 0, 15, 15), 1600, 800) == (0, 0, 1600, 800)
    assert crop_box((14, 15, 15, 15), 1000, 1000) == (812, 875, 1000, 1000)


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
        mine, _ = text_states(model.model.language_model, embeds, positions)
        plain = model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, use_cache=False
        ).last_hidden_state
        torch.testing.assert_close(mine, plain, atol=1e-3, rtol=1e-3)
