"""vpt::look and vpt::pixels: equal to transformers' PIL processors, and what they refuse."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vpt_agent import kernels
from vpt_agent.errors import UserError

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def _picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def _tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture))


@pytest.mark.parametrize("size", [(112, 84), (300, 40), (57, 931), (28, 28), (500, 375)])
def test_equal_to_transformers(size: tuple[int, int]) -> None:
    picture = _picture(*size)
    reference = Qwen2VLImageProcessorPil(image_mean=MEAN, image_std=STD)
    expected = reference([picture], return_tensors="pt")
    _, rows, columns = expected["image_grid_thw"][0].tolist()
    got = kernels.look(
        _tensor(picture), [[0, 0, *size]], [[rows * 14, columns * 14]], mean=MEAN, std=STD
    )
    assert got.dtype == torch.float32
    assert torch.equal(got, expected["pixel_values"])


def test_crops_and_nearest_stages_equal_the_same_done_by_hand() -> None:
    picture = _picture(640, 480)
    box, stages, size = (101, 33, 540, 411), [(300, 350), (28, 200)], (56, 196)
    small = picture.crop(box)
    for height, width in stages:
        small = small.resize((width, height), Image.Resampling.NEAREST)
    small = small.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    reference = Qwen2VLImageProcessorPil(image_mean=MEAN, image_std=STD, do_resize=False)
    expected = reference([small], return_tensors="pt")["pixel_values"]
    whole = kernels.look(_tensor(picture), [[0, 0, 640, 480]], [[28, 56]], mean=MEAN, std=STD)
    got = kernels.look(
        _tensor(picture),
        torch.tensor([box, (0, 0, 640, 480)]),
        torch.tensor([size, (28, 56)]),
        torch.tensor([stages, [(480, 640), (480, 640)]]),
        mean=MEAN,
        std=STD,
    )
    assert torch.equal(got, torch.cat([expected, whole]))
    one = kernels.look(_tensor(picture), [box], [size], [stages[0]], mean=MEAN, std=STD)
    two = kernels.look(_tensor(picture), [box], [size], [[stages[0]]], mean=MEAN, std=STD)
    assert torch.equal(one, two)


@pytest.mark.parametrize("seed", range(8))
def test_the_cpu_kernel_gives_the_plain_version_s_bits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    width, height = (int(v) for v in rng.integers(8, 400, 2))
    image = _tensor(_picture(width, height, seed))
    boxes, sizes, stages = [], [], []
    for _ in range(3):
        left, right = sorted(int(v) for v in rng.integers(0, width + 1, 2))
        top, bottom = sorted(int(v) for v in rng.integers(0, height + 1, 2))
        right, bottom = min(max(right, left + 1), width), min(max(bottom, top + 1), height)
        boxes.append((min(left, right - 1), min(top, bottom - 1), right, bottom))
        sizes.append([int(v) * 16 for v in rng.integers(1, 9, 2)])
        stages.append([[int(v) for v in rng.integers(1, 300, 2)]])
    args = (image, torch.tensor(boxes), torch.tensor(sizes))
    rest = (MEAN, STD, 8, 2, 1 + seed % 3)
    for before in (None, torch.tensor(stages)):
        got = torch.ops.vpt.look(*args, before, *rest)
        assert torch.equal(got, kernels.plain("look")(*args, before, *rest))
    more = (image, list(boxes[0]), stages[0][0], [40, 50], [3, 2, 50, 39], [64, 64], MEAN, STD)
    for bilinear in (False, True):
        got = torch.ops.vpt.pixels(*more, bilinear)
        assert torch.equal(got, kernels.plain("pixels")(*more, bilinear))


def test_a_picture_of_the_right_size_may_be_stored_in_planes_by_line() -> None:
    image = _tensor(_picture(56, 84))
    lines = image.mT.contiguous().mT
    assert lines.stride() == (3 * 56, 1, 56)
    boxes, sizes = [(0, 0, 56, 84), (0, 28, 28, 84), (0, 0, 28, 28)], [(84, 56), (56, 28), (56, 56)]
    got = kernels.look(lines, boxes, sizes, mean=MEAN, std=STD)
    assert torch.equal(got, kernels.look(image, boxes, sizes, mean=MEAN, std=STD))
    args = ([0, 0, 56, 84], [], [84, 56], [3, 4, 50, 80], [80, 64], MEAN, STD, True)
    assert torch.equal(torch.ops.vpt.pixels(lines, *args), kernels.plain("pixels")(image, *args))


def test_regions_on_threads_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image = _tensor(_picture(200, 150))
    boxes = [(10 * i, 5 * i, 10 * i + 80, 5 * i + 60) for i in range(8)]
    sizes = [(28 + 28 * (i % 3), 56) for i in range(8)]
    one = kernels.look(image, boxes, sizes, mean=MEAN, std=STD)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for _ in range(3):
        assert torch.equal(kernels.look(image, boxes, sizes, mean=MEAN, std=STD), one)


def test_other_patch_layouts() -> None:
    image = _tensor(_picture(40, 24))
    got = kernels.look(
        image, [[0, 0, 40, 24]], [[24, 40]], mean=[0.0] * 3, std=[1.0] * 3,
        patch=8, merge=1, temporal=1,
    )  # fmt: skip
    expected = image.view(3, 8, 5, 8, 3).permute(0, 2, 4, 1, 3).reshape(15, 192).double() / 255
    torch.testing.assert_close(got.double(), expected)


def test_no_boxes_give_no_patches() -> None:
    got = kernels.look(_tensor(_picture(30, 30)), [], [], mean=MEAN, std=STD)
    assert got.shape == (0, 1176)


def test_pixels_window_and_canvas() -> None:
    picture = _picture(90, 60)
    got = kernels.pixels(
        _tensor(picture),
        (10, 5, 80, 55),
        (25, 35),
        mean=[0.0] * 3,
        std=[1.0] * 3,
        stages=[(30, 40)],
        window=(5, 0, 30, 20),
        canvas=(24, 32),
        bilinear=True,
    )
    small = picture.crop((10, 5, 80, 55)).resize((40, 30), Image.Resampling.NEAREST)
    small = small.resize((35, 25), Image.Resampling.BILINEAR).crop((5, 0, 30, 20))
    expected = torch.zeros(3, 24, 32)
    expected[:, :20, :25] = _tensor(small).permute(2, 0, 1) / 255
    assert got.shape == (3, 24, 32)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["look", "pixels"])
def test_torch_accepts_the_registration(name: str) -> None:
    image = _tensor(_picture(60, 60))
    box, size = torch.tensor([[0, 0, 60, 60]]), torch.tensor([[56, 56]])
    if name == "look":
        args: tuple[object, ...] = (image, box, size, None, MEAN, STD, 14, 2, 2)
    else:
        args = (image, [0, 0, 60, 60], [], [8, 8], [0, 0, 8, 8], [8, 8], MEAN, STD, False)
    torch.library.opcheck(getattr(torch.ops.vpt, name).default, args)


def _look(**change: object) -> Callable[[], torch.Tensor]:
    values = {
        "image": torch.zeros(50, 60, 3, dtype=torch.uint8),
        "boxes": [[0, 0, 60, 50]],
        "sizes": [[28, 56]],
        "mean": MEAN,
        "std": STD,
    } | change
    return lambda: kernels.look(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(50, 60, 3)}, r"another layout.*expected: torch.uint8 \[H, W, 3\]"),
        ({"image": torch.zeros(3, 50, 60, dtype=torch.uint8)}, r"another layout.*\(3, 50, 60\)"),
        ({"boxes": [[0, 0, 61, 50]]}, r"leaves the picture.*\(0, 0, 61, 50\).*0\.\.60"),
        ({"boxes": [[-1, 0, 6, 5]]}, "leaves the picture"),
        ({"boxes": [[5, 0, 5, 5]]}, "a box is empty"),
        ({"boxes": [[0, 0, 5]]}, r"boxes has another shape.*\[R, 4\]"),
        ({"sizes": [[28, 56], [28, 56]]}, r"sizes has another shape.*\[1, 2\]"),
        ({"sizes": [[28, 57]]}, r"does not fit the patches.*multiples of 28"),
        ({"sizes": [[0, 28]]}, "does not fit the patches"),
        ({"pre_sizes": [[28]]}, "pre_sizes has another shape"),
        ({"pre_sizes": [[0, 28]]}, r"before the resize is empty.*1 pixel or more"),
        ({"image": torch.zeros(5, 6, 3, dtype=torch.uint8, device="meta")}, "no kernel"),
    ],
)
def test_look_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _look(**change)()


def test_pixels_refuses() -> None:
    image = torch.zeros(50, 60, 3, dtype=torch.uint8)
    box = (0, 0, 60, 50)
    with pytest.raises(UserError, match=r"a size is empty.*\(0, 8\)"):
        kernels.pixels(image, box, (0, 8), mean=MEAN, std=STD)
    with pytest.raises(UserError, match=r"window leaves the resized picture.*within 8 x 9"):
        kernels.pixels(image, box, (9, 8), mean=MEAN, std=STD, window=(0, 0, 9, 8))
    with pytest.raises(UserError, match=r"canvas is smaller.*at least \(9, 8\)"):
        kernels.pixels(image, box, (9, 8), mean=MEAN, std=STD, canvas=(9, 7))
    with pytest.raises(UserError, match="leaves the picture"):
        kernels.pixels(image, (0, 0, 61, 50), (9, 8), mean=MEAN, std=STD)
