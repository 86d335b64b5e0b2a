"""Original SAM checkpoints: the same function by transformers' names, and nothing else is read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SamModel

from tests.unit.model.directories import plain_qwen
from tests.unit.tools.original_sam import tiny_sam
from vpt_agent.errors import CheckpointError
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.model.sam_checkpoint import convert_sam, original_encoder, original_sam
from vpt_agent.vision.sam_checkpoint import SamSizes, is_original, read_sam, sam_sizes

PIXELS = torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny_sam()


@pytest.fixture(scope="module")
def file(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "sam_tiny.pth"
    torch.save(original.state_dict(), path)
    return path


def test_the_sizes_are_read_from_the_tensors(file: Path) -> None:
    sizes = sam_sizes(read_sam(file))
    assert isinstance(sizes, SamSizes)
    wanted = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 32,
        "image_size": 64, "patch_size": 8, "output_channels": 16, "window_size": 3,
        "global_attn_indexes": [1],
    }  # fmt: skip
    assert {k: sizes.vision[k] for k in wanted} == wanted
    assert sizes.prompt["mask_input_channels"] == 8
    assert (sizes.decoder["mlp_dim"], sizes.decoder["iou_head_hidden_dim"]) == (24, 12)


def test_the_encoder_gives_the_same_features(original: Any, file: Path) -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=PIXELS)
    with torch.no_grad():
        wanted = original.image_encoder(pixels)
        found = original_encoder(file)(pixel_values=pixels).last_hidden_state
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_whole_model_gives_the_same_masks(original: Any, file: Path, tmp_path: Path) -> None:
    """After a round through transformers' own format, too."""
    pixels = torch.randn(1, 3, 64, 64, generator=PIXELS)
    points, labels = torch.tensor([[[20.0, 30.0], [40.0, 9.0]]]), torch.tensor([[1, 0]])
    with torch.no_grad():
        features = original.image_encoder(pixels)
        sparse, dense = original.prompt_encoder(points=(points, labels), boxes=None, masks=None)
        wanted, quality = original.mask_decoder(
            image_embeddings=features, image_pe=original.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse, dense_prompt_embeddings=dense, multimask_output=True,
        )  # fmt: skip
        folder = convert_sam(file, tmp_path / "converted")
        for model in (original_sam(file), SamModel.from_pretrained(folder).eval()):
            found = model(pixel_values=pixels, input_points=points[None], input_labels=labels[None])
            torch.testing.assert_close(found.pred_masks[0], wanted, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.iou_scores[0], quality, rtol=0, atol=1e-5)


def test_it_feeds_the_sam_encoder_of_a_vpt_model(tmp_path: Path) -> None:
    """By the library's own path: from the file's name to the encoder's features."""
    original = tiny_sam(side=1024, patch=64)
    file = tmp_path / "sam.pth"
    torch.save(original.state_dict(), file)
    model = VPTForConditionalGeneration.from_pretrained(
        plain_qwen(tmp_path / "plain"),
        encoders=["sam"],
        encoder_weights={"sam": file},
        dtype=torch.float32,
    )
    assert model.config.encoders["seg"]["patch_size"] == 64
    assert model.config.encoders["seg"]["window_size"] == 3
    encoder = model.encoder("sam")
    assert encoder is not None
    pixels = torch.randn(1, 3, 1024, 1024, generator=PIXELS)
    with torch.no_grad():
        found = encoder(pixel_values=pixels).last_hidden_state
        torch.testing.assert_close(found, original.image_encoder(pixels), rtol=0, atol=1e-5)


class _Bad:
    """What a hostile file would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo run > ran",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"not a checkpoint at all", "cannot be read"),
        ({"image_encoder.patch_embed.proj.weight": _Bad()}, "cannot be read"),
        ({"a": torch.zeros(1)}, "no checkpoint of the original SAM; .*; got: a; expected: tensors"),
        ([1, 2], "no checkpoint of the original SAM; .*; got: list"),
    ],
)
def test_what_is_no_checkpoint(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        read_sam(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(
        CheckpointError, match=rf"no such SAM checkpoint; where: {re.escape(str(tmp_path))}"
    ):
        read_sam(tmp_path / "nowhere.pth")


def test_a_file_that_lacks_tensors_or_has_wrong_ones(file: Path, tmp_path: Path) -> None:
    state = read_sam(file)
    part = tmp_path / "part.pth"
    torch.save({k: v for k, v in state.items() if k.startswith("image_encoder")}, part)
    with pytest.raises(CheckpointError, match=r"tensors are missing .*where: .*part\.pth"):
        sam_sizes(read_sam(part), part)
    torch.save({**state, "image_encoder.blocks.1.norm1.bias": torch.zeros(9)}, part)
    with pytest.raises(CheckpointError, match=r"do not fit each other.*layers\.1\.layer_norm1"):
        original_encoder(part)


def test_what_counts_as_original(tmp_path: Path) -> None:
    assert is_original(Path("sam_vit_b_01ec64.pth"))
    assert not is_original(tmp_path)
    assert not is_original(Path("facebook/sam-vit-base"))
