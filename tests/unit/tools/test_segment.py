"""segment: prompts in, area and outline out; a tiny SAM of transformers; everything that is wrong.

Original checkpoints through segment-anything: tests/unit/tools/test_torchvision.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SamConfig, SamModel
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from tests.unit.tools.world import call, context, scene, told, view
from vpt_agent.errors import CheckpointError, MissingExtraError
from vpt_agent.types import View
from vpt_tools import _sam
from vpt_tools._sam import Found, Prompt, TransformersSam
from vpt_tools.segment import CHECKPOINT, Segment


class Squares:
    """Finds what has the colour of the first point, or of the box's middle."""

    def __init__(self) -> None:
        self.asked: list[Prompt] = []

    def find(self, seen: View, prompt: Prompt) -> Found:
        self.asked.append(prompt)
        box = prompt.box or (0, 0, 0, 0)
        x, y = prompt.points[0] if prompt.points else ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        pixels = np.asarray(seen.image)
        return Found((pixels == pixels[int(y), int(x)]).all(-1) & (pixels[..., 1] != 128), 0.75)


class Known(Segment):
    """The tool around a model whose masks are known."""

    name = "segment"

    def lacks(self) -> None:
        return None

    def setup(self, device: str) -> None:
        self._sam = Squares()


def test_the_area_and_the_outline_of_what_is_pointed_at() -> None:
    result = call(Known(), points=[[130, 60]])
    found = result.structured
    assert (found["pixels"], found["share"], found["box"]) == (1600, 0.08, [120, 40, 160, 80])
    assert sorted(found["outlines"][0]) == [[120, 40], [120, 80], [160, 40], [160, 80]]
    assert "It covers 1600 pixels of image_1, 8.00% of it" in str(result.text)
    (shown,) = result.views
    assert (shown.parent, shown.box, shown.size) == ("image_1", view().box, (200, 100))
    assert shown.image.getpixel((140, 60)) != (0, 0, 255)  # coloured
    assert shown.image.getpixel((30, 40)) == (255, 0, 0)  # as it was
    assert call(Known(), box=[20, 30, 40, 50], show=False).structured["pixels"] == 400
    assert call(Known(), box=[20, 30, 40, 50], show=False).views == ()


def test_points_that_do_not_belong_to_it_reach_the_model() -> None:
    tool = Known()
    call(tool, points=[[30, 40]], not_points=[[1, 1], [2, 2]], box=[0, 0, 60, 60])
    assert isinstance(tool._sam, Squares)
    (asked,) = tool._sam.asked
    assert asked == Prompt([(30, 40), (1, 1), (2, 2)], [True, False, False], (0, 0, 60, 60))


def test_nothing_found_is_no_error() -> None:
    result = call(Known(), points=[[5, 5]])
    assert result.text == "Nothing was found there."
    assert result.views == ()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({}, "invalid_arguments", "give a box, or one or more points"),
        ({"not_points": [[1, 1]]}, "invalid_arguments", "give a box, or one or more points"),
        ({"points": [[201, 1]]}, "box_outside", "point [201, 1] lies outside"),
        ({"points": [[1, 1]], "not_points": [[1, -1]]}, "box_outside", "[1, -1] lies outside"),
        ({"box": [300, 0, 400, 9]}, "box_outside", "outside the picture"),
        ({"box": [5, 5, 5, 9]}, "box_too_small", "no area"),
        ({"points": "there"}, "invalid_arguments", "points"),
        ({"points": [[1, 1]], "source": "x"}, "unknown_source", "no view 'x'"),
    ],
)
def test_what_is_wrong_is_told(arguments: dict[str, object], kind: str, message: str) -> None:
    found, said = told(call(Known(), **arguments))
    assert found == kind
    assert message in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SAM with random weights."""
    torch.manual_seed(1)
    model = SamModel(
        SamConfig(
            vision_config={
                "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 64, "patch_size": 8, "mlp_dim": 32,
                "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 8,
                "initializer_range": 0.2,
            },
            prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8},
            mask_decoder_config={
                "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 8,
                "iou_head_hidden_dim": 8,
            },
        )
    )  # fmt: skip
    path = tmp_path_factory.mktemp("sam") / "tiny"
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt([(30, 40)], [True], None),
        Prompt([(30, 40), (150, 20)], [True, False], None),
        Prompt([], [], (20, 10, 150, 90)),
        Prompt([(30, 40)], [True], (20, 10, 150, 90)),
    ],
)
def test_the_mask_is_that_of_transformers_own_way(folder: Path, prompt: Prompt) -> None:
    """Its processor prepares the picture and brings the mask back to its size."""
    seen = view(scene((200, 100)))
    found = TransformersSam(folder, "cpu").find(seen, prompt)
    processor = SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}
    )
    inputs = processor(seen.image, return_tensors="pt")
    scale = 64 / 200
    values: dict[str, Any] = {"pixel_values": inputs["pixel_values"]}
    if prompt.points:
        values["input_points"] = torch.tensor(
            [[[[x * scale, y * scale] for x, y in prompt.points]]]
        )
        values["input_labels"] = torch.tensor([[[int(inside) for inside in prompt.inside]]])
    if prompt.box is not None:
        values["input_boxes"] = torch.tensor([[[v * scale for v in prompt.box]]])
    with torch.no_grad():
        out = SamModel.from_pretrained(folder).eval()(**values, multimask_output=True)
    (masks,) = processor.post_process_masks(
        out.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )
    best = int(out.iou_scores[0, 0].argmax())
    wanted = masks[0, best].numpy()
    assert found.mask.shape == (100, 200)
    assert found.quality == pytest.approx(float(out.iou_scores[0, 0, best]), abs=1e-4)
    assert (found.mask != wanted).mean() < 0.002  # a logit may lie at the threshold
    assert 0 < wanted.mean() < 1, "a mask that is all or nothing would show little"


def test_the_tool_loads_a_folder(folder: Path) -> None:
    tool = Segment(folder)
    assert tool.lacks() is None
    result = call(tool, context(view()), points=[[30, 40]])
    assert result.ok, result.error
    tool.release()
    assert tool._sam is None


def test_the_environment_can_name_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHECKPOINT, str(folder))
    assert Segment().lacks() is None
    assert Segment().checkpoint == str(folder)


def test_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv(CHECKPOINT, raising=False)
    with pytest.raises(CheckpointError, match=r"no SAM checkpoint.*VPT_SAM_CHECKPOINT"):
        call(Segment(), points=[[1, 1]])
    with pytest.raises(CheckpointError, match=r"no such SAM checkpoint; where: .*nowhere\.pth"):
        call(Segment(tmp_path / "nowhere.pth"), points=[[1, 1]])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"this SAM model cannot be loaded; where: .*empty"):
        call(Segment(tmp_path / "empty"), points=[[1, 1]])
    file = tmp_path / "sam.pth"
    torch.save({}, file)
    monkeypatch.setattr(_sam, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"extra sam; .*vpt-agent\[sam\].*convert_sam"):
        call(Segment(file), points=[[1, 1]])
