"""One token each of several rows, by columns and by the routines in C, is what the pass by rows
computes; rows of any lengths, in any blocks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Tokens
from vpt_agent.model import VPTForConditionalGeneration, compiled, compiled_rows, somerows
from vpt_agent.model.direct import times
from vpt_agent.model.testing import tiny_model
from vpt_agent.vision.policy import ImagePolicy

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)
WAYS = ["torch", pytest.param("c", marks=needs_compiler)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def by_rows() -> Iterator[None]:
    """Inside, no pass goes by columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(somerows, "_ROWS", {})
        yield


@contextmanager
def counted() -> Iterator[list[str]]:
    """Which steps the passes by columns were made of, one entry a pass."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for steps in (somerows._Torch, somerows.Routines):
            begin = steps.begin

            def noted(self, embeds: Tensor, begin=begin, name=steps.__name__) -> Tensor:  # type: ignore[no-untyped-def]
                seen.append(name)
                return begin(self, embeds)

            patch.setattr(steps, "begin", noted)
        yield seen


def said(
    model: VPTForConditionalGeneration, lengths: list[int], steps: int, *, block: int = 16
) -> Tensor:
    """Logits of ``steps`` single tokens a row, all rows together, behind prompts of ``lengths``;
    rows grow in turn, so that their blocks are no neighbours. The first two begin alike."""
    engine = Engine(model, ImagePolicy(), block=block, max_runs=len(lengths))
    rows = [engine.session() for _ in lengths]
    prompts = [[(7 * max(1, i) + k) % 90 for k in range(n)] for i, n in enumerate(lengths)]
    engine.drive([row.feed([Tokens(p)]) for row, p in zip(rows, prompts, strict=True)])
    found = []
    for step in range(steps):
        feeds = [row.feed([Tokens([step + i])]) for i, row in enumerate(rows)]
        found += [fed[0].logits for fed in engine.drive(feeds)]
    assert engine.counters.rows_per_forward[-1] == len(rows)
    return torch.cat([f for f in found if f is not None])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("lengths", "block"),
    [([20] * 7, 16), ([33, 35, 1, 18, 16, 15, 40, 3, 70], 16), ([5 + i for i in range(19)], 4),
     ([12 + i % 5 for i in range(40)], 16)],
)  # fmt: skip
def test_columns_are_rows(way: str, base: str, lengths: list[int], block: int) -> None:
    model = tiny_model(("clip",), base=base)[0]
    with by_rows():
        wanted = said(model, lengths, 5, block=block)
    with compiled.using(way == "c"), counted() as passes:
        found = said(model, lengths, 5, block=block)
    assert passes == ["Routines" if way == "c" else "_Torch"] * 5
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("way", WAYS)
def test_half_types_are_as_close_as_rounding_lets_them(way: str) -> None:
    model = tiny_model(("clip",))[0]
    lengths = [20, 21, 3, 40]
    with by_rows():
        exact = said(model, lengths, 4)
        half = model.to(torch.bfloat16)
        rows = said(half, lengths, 4)
    with compiled.using(way == "c"), counted() as passes:
        found = said(half, lengths, 4)
    assert len(passes) == 4
    scale = exact.abs().max()
    assert (found - rows).abs().max() < 0.06 * scale
    assert (found - exact).abs().mean() < 1.2 * (rows - exact).abs().mean()


def test_few_rows_and_many_go_by_rows() -> None:
    model = tiny_model(("clip",))[0]
    with counted() as passes:
        said(model, [5] * 6, 2)
        said(model, [5] * 65, 2)
        assert passes == []
        said(model.to(torch.float16), [5] * 8, 2)
    assert passes == []


@needs_compiler
@pytest.mark.parametrize("rows", [7, 16, 17, 32])
@pytest.mark.parametrize("shape", [(40, 64), (13, 48), (3, 16)])
def test_products_are_those_of_torch(shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.nn.Parameter(torch.randn(shape)), torch.randn(rows, shape[1])
    wanted = x.double() @ weight.double().t()
    with torch.inference_mode(), compiled.using():
        assert compiled_rows.times(weight, x.t()) is not None
        found = times(x, weight)
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


@needs_compiler
def test_what_the_routines_do_not_know_is_left_to_torch() -> None:
    with compiled.using():
        known = torch.randn(8, 32)
        assert compiled_rows.times(known, torch.randn(32, 8)) is not None
        assert compiled_rows.times(known, torch.randn(32, 33)) is None
        assert compiled_rows.times(torch.randn(8, 24), torch.randn(24, 8)) is None
        assert compiled_rows.times(torch.randn(32, 8).t(), torch.randn(32, 8)) is None
        assert compiled_rows.times(known.double(), torch.randn(32, 8).double()) is None
        torch.set_num_threads(2)
        assert compiled_rows.times(known, torch.randn(32, 8)) is None
    assert compiled_rows.times(known, torch.randn(32, 8)) is None
