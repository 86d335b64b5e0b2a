"""Attention over a cache's slots: the plain version by hand, and the Triton one against it.

As in test_triton: the interpreter is chosen before Triton is imported, in a child process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vpt_agent import kernels
from vpt_agent.errors import UserError
from vpt_agent.kernels.attend import attend

MISSING = importlib.util.find_spec("triton") is None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not MISSING
needs_triton = pytest.mark.skipif(MISSING, reason="needs triton: pip install 'vpt-agent[triton]'")

SHAPES = [
    # rows, key heads, heads that share one, width, slots seen at most, slots of the store
    (1, 2, 6, 16, 40, 64),
    (3, 2, 2, 12, 130, 300),
    (2, 1, 17, 32, 300, 400),
    (4, 2, 1, 16, 150, 200),
]


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    rows, heads, group, width, most, slots = shape
    g = torch.Generator().manual_seed(sum(shape))
    queries = torch.randn(rows, heads, group, width, generator=g).to(dtype)
    keys, values = (torch.randn(slots, heads * width, generator=g).to(dtype) for _ in range(2))
    seen = torch.stack([torch.randperm(slots, generator=g)[:most] for _ in range(rows)])
    lengths = torch.randint(1, most + 1, (rows,), generator=g)
    lengths[0], lengths[-1] = 1, most
    return queries, keys, values, seen, lengths


def by_hand(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor, lengths: Tensor) -> Tensor:
    rows, heads, _, width = queries.shape
    out = torch.zeros(queries.shape, dtype=torch.float64)
    for r in range(rows):
        here = seen[r, : lengths[r]]
        k, v = (store[here].view(-1, heads, width).double() for store in (keys, values))
        for h in range(heads):
            scores = queries[r, h].double() @ k[:, h].T / width**0.5
            out[r, h] = scores.softmax(-1) @ v[:, h]
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_sees_its_own_slots(shape: tuple[int, ...]) -> None:
    given = case(shape)
    torch.testing.assert_close(attend(*given).double(), by_hand(*given), atol=1e-5, rtol=0)


def test_what_does_not_fit_is_refused() -> None:
    queries, keys, values, seen, lengths = case(SHAPES[0])
    with pytest.raises(UserError, match="keys and values do not fit the queries"):
        attend(queries, keys[:, :-1], values, seen, lengths)
    with pytest.raises(UserError, match="each row needs the slots that it sees"):
        attend(queries, keys, values, seen.int(), lengths)
    with pytest.raises(UserError, match="are of different types"):
        attend(queries.double(), keys, values, seen, lengths)
    with pytest.raises(UserError, match="lie on different devices"):
        attend(queries, keys, values, seen, lengths.to("meta"))


def test_shapes_without_values() -> None:
    given = [t.to("meta") for t in case(SHAPES[1])]
    assert attend(*given).shape == given[0].shape


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the child")
def test_all_below_in_a_child() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    here = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[3], env=here
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "12 skipped" in done.stdout, "only what cannot be interpreted is skipped"


@pytest.mark.skipif(not INTERPRETED, reason="runs in a child under the interpreter")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_gives_the_same(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpt_agent.kernels import attend_triton

    given = case(shape, dtype)
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    got = attend_triton.attend_triton(*given)
    torch.testing.assert_close(got.double(), by_hand(*given), atol=bound, rtol=0)
    assert torch.equal(got, attend_triton.attend_triton(*given))
    monkeypatch.setattr(attend_triton, "MANY", 0)  # the long spans
    wide = attend_triton.attend_triton(*given)
    torch.testing.assert_close(wide.double(), by_hand(*given), atol=bound, rtol=0)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vpt_agent.kernels import attend_triton

KINDS = {"seen": "*i64", "lengths": "*i64", "tops": "*fp32", "sums": "*fp32", "slots": "i32",
         "parts": "i32", "heads": "i32", "scale": "fp32"}
CONSTANTS = dict(GROUP=6, GROUPS=16, WIDTH=128, WIDE=128, SPAN=64, TILE=32)
for name, kernel in vars(attend_triton).items():
    if not (isinstance(kernel, triton.JITFunction) and name.endswith("_kernel")):
        continue
    types, constants = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in CONSTANTS:
            types[argument], constants[(place,)] = "constexpr", CONSTANTS[argument]
        else:
            types[argument] = KINDS.get(argument, "*bf16")
    made = triton.compile(ASTSource(kernel, types, constexprs=constants),
                          target=GPUTarget("cuda", 90, 32))
    print(name, len(made.asm["cubin"]) > 0)
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel is not compiled")
def test_it_compiles_for_a_gpu_that_need_not_be_there(tmp_path: Path) -> None:
    here = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["_attend_kernel True", "_join_kernel True"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("shape", [*SHAPES, (32, 2, 6, 128, 2048, 40000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = case(shape, dtype)
    got = torch.ops.vpt.attend(*(t.cuda() for t in given))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.double().cpu(), by_hand(*given), atol=bound, rtol=0)
    name = kernels.kernel_name("attend", given[0].cuda())
    assert name == "vpt::attend[cuda:triton]"
