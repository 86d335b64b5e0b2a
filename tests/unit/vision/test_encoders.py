"""Inputs of DINO and SAM against transformers' processors; patches of several views."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from vpt_agent import kernels
from vpt_agent.errors import UserError
from vpt_agent.types import View
from vpt_agent.vision import (
    DEFAULT_POLICY,
    PUBLISHED_POLICY,
    crop_view,
    dino_pixels,
    load_views,
    look,
    sam_pixels,
)
from vpt_agent.vision.encoders import IMAGENET_MEAN, IMAGENET_STD
from vpt_agent.vision.patches import pixels_of
from vpt_agent.vision.policy import ImagePolicy, PolicyKind, published_stages

SIZES = [(300, 200), (90, 333), (700, 500), (64, 64), (1300, 40)]
DINO = BitImageProcessorPil(
    size={"shortest_edge": 256}, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD)
)


def _view(size: tuple[int, int]) -> View:
    rng = np.random.default_rng(size[0])
    return load_views(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))[0]


def _staged(view: View, longest: int, published: bool) -> Image.Image:
    image = view.image
    for stage in published_stages(image.size, longest) if published else ():
        image = image.resize(stage, Image.Resampling.NEAREST)
    return image


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("published", [True, False])
def test_dino_equals_transformers(size: tuple[int, int], published: bool) -> None:
    view = _view(size)
    expected = DINO([_staged(view, 512, published)], return_tensors="pt")["pixel_values"][0]
    got = dino_pixels(view, PUBLISHED_POLICY if published else DEFAULT_POLICY)
    assert got.shape == (3, 224, 224)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("published", "side"), [(True, 1024), (False, 1024), (True, 256)])
def test_sam_equals_transformers(size: tuple[int, int], published: bool, side: int) -> None:
    view = _view(size)
    processor = SamImageProcessorPil(
        size={"longest_edge": side}, pad_size={"height": side, "width": side}
    )
    staged = _staged(view, side, published)
    expected = torch.as_tensor(processor([staged], return_tensors="pt")["pixel_values"][0])
    got = sam_pixels(view, PUBLISHED_POLICY if published else None, size=side)
    assert got.shape == (3, side, side)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_sizes_are_arguments() -> None:
    view = _view((300, 200))
    processor = BitImageProcessorPil(
        size={"shortest_edge": 64},
        crop_size={"height": 56, "width": 56},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    expected = processor([view.image], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(dino_pixels(view, size=56), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(dino_pixels(view, size=56, shortest=64), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (1, 1)])
def test_lines_and_points_have_an_input(size: tuple[int, int]) -> None:
    view = _view(size)
    for policy in (PUBLISHED_POLICY, DEFAULT_POLICY):
        assert dino_pixels(view, policy).isfinite().all()
        assert sam_pixels(view, policy, size=128).isfinite().all()
        assert look([view], policy).pixel_values.isfinite().all()


def test_patches_of_several_views() -> None:
    whole = _view((640, 480))
    crop = crop_view(whole, (100, 50, 200, 250), id="crop_1")
    patches = look([whole, crop], DEFAULT_POLICY)
    assert patches.grid_thw.tolist() == [[1, 34, 46], [1, 48, 24]]
    assert patches.visual_tokens == (391, 288)
    assert patches.pixel_values.shape == (34 * 46 + 48 * 24, 1176)
    assert patches.kernels == ("vpt::look[cpu:direct]",)
    alone = look([crop], DEFAULT_POLICY)
    assert torch.equal(patches.pixel_values[34 * 46 :], alone.pixel_values)


@pytest.mark.parametrize("kind", ["published", "fit", "native"])
@pytest.mark.parametrize("size", [(640, 480), (1300, 700), (60, 20), (900, 3)])
def test_what_is_resized_before_the_kernel_is_the_kernel_s_own(
    kind: PolicyKind, size: tuple[int, int]
) -> None:
    view, policy = _view(size), ImagePolicy(kind=kind, longest=224)
    plan = policy.plan(size)
    stages = [[(h, w) for w, h in plan.pre_sizes]] if plan.pre_sizes else None
    whole = kernels.plain("look")(
        pixels_of(view),
        torch.tensor([(0, 0, *size)]),
        torch.tensor([plan.size[::-1]]),
        None if stages is None else torch.tensor(stages),
        list(policy.mean),
        list(policy.std),
        14,
        2,
        2,
    )
    assert torch.equal(look([view], policy).pixel_values, whole)


def test_a_device_without_a_kernel_is_refused() -> None:
    with pytest.raises(UserError, match=r"no kernel.*got: meta"):
        look([_view((64, 64))], PUBLISHED_POLICY, device=torch.device("meta"))


def test_no_views() -> None:
    patches = look([], PUBLISHED_POLICY)
    assert patches.pixel_values.shape == (0, 1176)
    assert patches.grid_thw.shape == (0, 3)
    assert patches.kernels == ()
