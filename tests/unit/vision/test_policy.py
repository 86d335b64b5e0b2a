"""Sizes: from a picture to stages, patches and visual tokens."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vpt_agent.errors import UserError
from vpt_agent.vision import DEFAULT_POLICY, PUBLISHED_POLICY, ImagePolicy
from vpt_agent.vision.policy import limit_aspect, published_stages

SIZES = st.tuples(st.integers(1, 20000), st.integers(1, 20000))
FIT = ImagePolicy(kind="fit", longest=336, crop_longest=224)


@given(SIZES, st.booleans(), st.sampled_from([PUBLISHED_POLICY, DEFAULT_POLICY, FIT]))
def test_every_size_has_a_plan(size: tuple[int, int], crop: bool, policy: ImagePolicy) -> None:
    plan = policy.plan(size, crop=crop)
    width, height = plan.size
    assert width % 28 == height % 28 == 0
    assert 3136 <= width * height <= 12845056
    assert plan.grid_thw == (1, height // 14, width // 14)
    assert plan.visual_tokens == width * height // 28**2


@given(SIZES)
def test_published_sizes_are_those_of_transformers(size: tuple[int, int]) -> None:
    plan = PUBLISHED_POLICY.plan(size)
    width, height = plan.pre_sizes[-1] if plan.pre_sizes else size
    assert min(width, height) >= 28
    assert max(width, height) <= 512
    expected = smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=12845056)
    assert plan.size[::-1] == expected


@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), st.booleans())
def test_fit_is_one_resize_to_the_longest_side(size: tuple[int, int], crop: bool) -> None:
    plan = FIT.plan(size, crop=crop)
    longest = 224 if crop else 336
    assert plan.pre_sizes == ()
    assert max(plan.size) == longest
    scale = longest / max(size)
    assert plan.size == tuple(max(28, int(s * scale / 28 + 0.5) * 28) for s in size)


def test_upscaling_is_a_choice() -> None:
    assert DEFAULT_POLICY.plan((100, 60)).size == (112, 56)
    assert DEFAULT_POLICY.plan((100, 60), crop=True).size == (672, 392)
    assert DEFAULT_POLICY.plan((4000, 3000)).size == (896, 672)
    never = dataclasses.replace(FIT, upscale=False)
    assert never.plan((100, 60), crop=True).size == (112, 56)
    assert never.plan((1000, 600), crop=True).size == (224, 140)


def test_default_cells_are_whole_tokens() -> None:
    width, height = DEFAULT_POLICY.plan((1500, 1500)).size
    for grid in (4, 8, 16, 32):
        assert width % (28 * grid) == height % (28 * grid) == 0


def test_published_stages() -> None:
    assert published_stages((512, 300), 512) == ()
    assert published_stages((3000, 10), 512) == ((512, 1), (512, 28))
    assert published_stages((3000, 5), 512) == ((512, 1), (512, 28))  # the release fails here
    assert published_stages((8000, 30), 10000) == ((5400, 30),)
    assert limit_aspect((30, 8000)) == (30, 5400)
    assert limit_aspect((200, 1)) == (200, 1)


def test_areas_are_bounded() -> None:
    small = ImagePolicy(kind="fit", longest=560, max_pixels=28 * 28 * 100)
    width, height = small.plan((1000, 1000)).size
    assert (width, height) == (280, 280)
    large = ImagePolicy(kind="fit", longest=28, min_pixels=28 * 28 * 16)
    width, height = large.plan((1000, 1000)).size
    assert width * height >= 28 * 28 * 16
    with pytest.raises(UserError, match=r"no size of whole tokens fits.*at most 7840 pixels"):
        ImagePolicy(kind="fit", longest=2800, max_pixels=7840).plan((20000, 10))


def test_manifest_round_trip() -> None:
    for policy in (PUBLISHED_POLICY, DEFAULT_POLICY, FIT):
        data = json.loads(json.dumps(policy.to_manifest()))
        assert ImagePolicy.from_manifest(data) == policy
    assert ImagePolicy.from_manifest({}) == PUBLISHED_POLICY
    with pytest.raises(UserError, match=r"unknown fields; got: \['tiles'\].*upgrade"):
        ImagePolicy.from_manifest({"tiles": 4})


def test_policies_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"unknown image policy; got: best"):
        ImagePolicy(kind="best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no visual token; where: ImagePolicy.longest; got: 20"):
        ImagePolicy(longest=20)
    with pytest.raises(UserError, match=r"ImagePolicy.crop_longest; got: 27"):
        ImagePolicy(kind="fit", crop_longest=27)
    with pytest.raises(UserError, match=r"limits of area.*at least 784"):
        ImagePolicy(min_pixels=500, max_pixels=600)
    with pytest.raises(UserError, match=r"at least one pixel; got: \(0, 5\)"):
        FIT.plan((0, 5))
