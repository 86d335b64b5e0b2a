"""The Triton kernels against the plain versions, on the CPU under Triton's interpreter.

The interpreter must be chosen before Triton is imported, so these tests run in a child process of
the ordinary ones; ``TRITON_INTERPRET=1 pytest`` on this file runs them directly.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vpt_agent import kernels
from vpt_agent.kernels import Stretch

MISSING = importlib.util.find_spec("triton") is None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not MISSING
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

needs_triton = pytest.mark.skipif(MISSING, reason="needs triton: pip install 'vpt-agent[triton]'")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a child under the interpreter")
# The interpreter takes bfloat16 for float32, so that type is left to a GPU.
DTYPES = [torch.float32, torch.float16, torch.float64]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_all_below_in_a_child() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "3 skipped" in done.stdout, "only what cannot be interpreted is skipped"


def _look(name: str) -> Callable[..., torch.Tensor]:
    from vpt_agent.kernels import look_triton

    return getattr(look_triton, name)


def _rows(name: str) -> Callable[..., Any]:
    from vpt_agent.kernels import rows_triton

    return getattr(rows_triton, name)


def _image(height: int, width: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=g)
    image[: height // 2] = (image[: height // 2] > 127) * 255  # overshoots
    return image


def _randn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=g, dtype=torch.float64) * 0.5).to(dtype)


@interpreted
@pytest.mark.parametrize("stages", [None, [[[9, 20]], [[7, 5]], [[11, 6]]]])
def test_look_gives_the_same_bits(stages: list[list[list[int]]] | None) -> None:
    image = _image(19, 23, 1)
    boxes = torch.tensor([[0, 0, 23, 19], [4, 2, 11, 18], [5, 0, 6, 19]])
    sizes = torch.tensor([[8, 24], [16, 8], [8, 8]])  # the second along the height first
    before = None if stages is None else torch.tensor(stages)
    args = (image, boxes, sizes, before, MEAN, STD, 4, 2, 2)
    assert torch.equal(_look("look_triton")(*args), kernels.plain("look")(*args))


@interpreted
def test_look_without_boxes_gives_no_patches() -> None:
    none = torch.zeros(0, 4, dtype=torch.int64)
    args = (_image(5, 6, 2), none, none[:, :2], None, MEAN, STD, 4, 2, 2)
    assert _look("look_triton")(*args).shape == (0, 96)


@interpreted
@pytest.mark.parametrize("bilinear", [False, True])
def test_pixels_gives_the_same_bits(bilinear: bool) -> None:
    image = _image(21, 17, 3)
    args = (
        image,
        [2, 1, 17, 20],
        [12, 11],
        [14, 19],
        [3, 2, 17, 13],
        [13, 16],
        MEAN,
        STD,
        bilinear,
    )
    got, expected = _look("pixels_triton")(*args), kernels.plain("pixels")(*args)
    assert torch.equal(got, expected)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_condition_and_its_gradient(dtype: torch.dtype) -> None:
    features, grad = (_randn(7, 20, dtype=dtype, seed=s) for s in (4, 5))
    condition = _randn(4, 20, dtype=dtype, seed=6)
    segment = torch.tensor([0, 2, 1, 0, 0, 2, 2])  # the last condition has no rows
    got = _rows("condition_triton")(features, condition, segment)
    torch.testing.assert_close(got, kernels.plain("condition")(features, condition, segment))
    args = (grad, features, condition, segment)
    both = _rows("condition_backward_triton")(*args)
    for mine, plain in zip(both, kernels.plain("condition_backward")(*args), strict=True):
        torch.testing.assert_close(mine, plain)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_project(dtype: torch.dtype) -> None:
    shapes = ((3, 10), (10,), (10,), (6, 10), (6,))
    parts = [_randn(*shape, dtype=dtype, seed=7 + i) for i, shape in enumerate(shapes)]
    got = _rows("project_triton")(*parts, 1e-5)
    torch.testing.assert_close(got, kernels.plain("project")(*parts, 1e-5), rtol=2e-3, atol=2e-3
                               if dtype == torch.float16 else 1e-6)  # fmt: skip


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_splice_and_place_give_the_same_bits(dtype: torch.dtype) -> None:
    embeds = _randn(2, 9, 20, dtype=dtype, seed=12)
    features = _randn(7, 20, dtype=torch.float32, seed=13)
    index = torch.tensor([3, 1, 17, 9, 10, 11, 12])
    got = _rows("splice_triton")(embeds, features, index)
    assert torch.equal(got, kernels.plain("splice")(embeds, features, index))
    stretches = [Stretch(0, 0, 2, -1, 5), Stretch(0, 2, 6, 0, 7, 2, 3), Stretch(1, 4, 1, 6, 3)]
    table = torch.tensor([list(s) for s in stretches])
    both = _rows("place_triton")(embeds, features, table)
    for mine, plain in zip(both, kernels.plain("place")(embeds, features, table), strict=True):
        assert torch.equal(mine, plain)


@interpreted
def test_nothing_to_do() -> None:
    embeds, none = torch.zeros(1, 3, 4), torch.zeros(0, dtype=torch.int64)
    features, condition = torch.zeros(0, 4), torch.ones(2, 4)
    assert _rows("condition_triton")(features, condition, none).shape == (0, 4)
    assert torch.equal(_rows("splice_triton")(embeds, features, none), embeds)
    out, positions = _rows("place_triton")(embeds, features, torch.zeros(0, 7, dtype=torch.int64))
    assert torch.equal(out, embeds)
    assert not positions.any()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vpt_agent.kernels import look_triton, rows_triton

KINDS = {"image": "*u8", "levels": "*fp32", "regions": "*i32", "table": "*i32", "line": "i32",
         "segment": "*i64", "order": "*i64", "bounds": "*i64", "index": "*i64",
         "stretches": "*i64", "positions": "*i64", "dots": "*fp32", "eps": "fp32"}
SIZES = ("width", "outputs", "count", "length", "tokens", "wide_patch", "high_patch")
CONSTANTS = dict(MERGE=2, TEMPORAL=2, BITS=22, TILE_A=16, TILE_B=16, BLOCK=256, FIELDS=16,
                 ACC=triton.language.float32)

for module in (look_triton, rows_triton):
    for name, kernel in vars(module).items():
        if not (isinstance(kernel, triton.JITFunction) and name.endswith("_kernel")):
            continue
        types, constants = {}, {}
        for place, argument in enumerate(kernel.arg_names):
            if argument in CONSTANTS:
                types[argument], constants[(place,)] = "constexpr", CONSTANTS[argument]
            else:
                types[argument] = "i32" if argument in SIZES else KINDS.get(argument, "*bf16")
        if name == "_look_kernel":
            types["out"] = "*fp32"
        source = ASTSource(kernel, types, constexprs=constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(name, len(made.asm["cubin"]) > 0)
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")
def test_all_compile_for_a_gpu_that_need_not_be_there(tmp_path: Path) -> None:
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=os.environ | cache
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = done.stdout.splitlines()
    assert len(compiled) == 7
    assert all(line.endswith(" True") for line in compiled), compiled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_a_gpu_gives_the_same_bits_of_pixels() -> None:
    image = _image(300, 400, 9)
    boxes = torch.tensor([[0, 0, 400, 300], [17, 30, 190, 290]])
    args = (boxes, torch.tensor([[224, 280], [280, 56]]), None, MEAN, STD, 14, 2, 2)
    got = torch.ops.vpt.look(image.cuda(), *args)
    assert torch.equal(got.cpu(), kernels.plain("look")(image, *args))
    assert torch.equal(got, torch.ops.vpt.look(image.cuda(), *args))
