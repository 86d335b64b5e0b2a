"""vpt::condition and vpt::splice: values, gradients, and what they refuse."""

import pytest
import torch
from torch.autograd import gradcheck

from vpt_agent import kernels
from vpt_agent.errors import UserError

SEGMENT = torch.tensor([0, 1, 1, 0, 2])
INDEX = torch.tensor([0, 3, 7, 5])


def _features(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    f = torch.randn(5, 6, dtype=torch.float64, generator=g).to(dtype)
    c = torch.randn(3, 6, dtype=torch.float64, generator=g).to(dtype)
    return f.requires_grad_(), c.requires_grad_()


def _sequence(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    e = torch.randn(2, 4, 3, dtype=torch.float64, generator=g).to(dtype)
    f = torch.randn(4, 3, dtype=torch.float64, generator=g).to(dtype)
    return e.requires_grad_(), f.requires_grad_()


def test_condition_is_attention_with_the_state_as_key_and_value() -> None:
    f, c = _features()
    got = kernels.condition(f, c, SEGMENT)
    for i, s in enumerate(SEGMENT.tolist()):
        expected = f[i] + (f[i] @ c[s][:, None]) @ c[s][None]
        torch.testing.assert_close(got[i], expected)


def test_condition_gradients() -> None:
    f, c = _features()
    assert gradcheck(lambda f, c: kernels.condition(f, c, SEGMENT), (f, c))


def test_splice_gradients() -> None:
    e, f = _sequence()
    assert gradcheck(lambda e, f: kernels.splice(e, f, INDEX), (e, f))


@pytest.mark.parametrize("name", ["condition", "splice"])
def test_torch_accepts_the_registration(name: str) -> None:
    args = (*_features(), SEGMENT) if name == "condition" else (*_sequence(), INDEX)
    torch.library.opcheck(getattr(torch.ops.vpt, name).default, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_condition_sums_half_types_in_float32(dtype: torch.dtype) -> None:
    f, c = _features(dtype)
    got = kernels.condition(f, c, SEGMENT)
    exact = kernels.condition(f.float(), c.float(), SEGMENT)
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype))
    got.float().sum().backward()
    assert f.grad is not None
    assert f.grad.dtype == dtype
    assert c.grad is not None
    assert c.grad.dtype == dtype


def test_condition_keeps_the_dtype_of_the_features_when_the_state_is_wider() -> None:
    f, _ = _features(torch.bfloat16)
    _, c = _features(torch.float32)
    got = kernels.condition(f, c, SEGMENT)
    got.float().sum().backward()
    assert got.dtype == torch.bfloat16
    assert c.grad is not None
    assert c.grad.dtype == torch.float32


def test_condition_does_not_touch_or_alias_its_inputs() -> None:
    f, c = _features()
    before = f.detach().clone()
    with torch.no_grad():
        kernels.condition(f, torch.zeros_like(c), SEGMENT).add_(1)
    assert torch.equal(f, before)


def test_nothing_to_condition_or_splice() -> None:
    e, f = _sequence()
    _, c = _features()
    none = torch.zeros(0, dtype=torch.int64)
    assert kernels.condition(torch.zeros(0, 6, dtype=torch.float64), c, none).shape == (0, 6)
    got = kernels.splice(e, f[:0], none)
    assert torch.equal(got, e)
    assert got.data_ptr() != e.data_ptr()


def test_splice_replaces_flat_positions_of_a_copy() -> None:
    e, f = _sequence(torch.float32)
    got = kernels.splice(e, f.double(), INDEX)
    expected = e.detach().clone()
    for row, position in enumerate(INDEX.tolist()):
        expected[position // 4, position % 4] = f[row]
    assert torch.equal(got, expected)
    assert got.dtype == e.dtype
    (got * torch.arange(24).view(2, 4, 3)).sum().backward()
    assert e.grad is not None
    assert bool((e.grad.view(8, 3)[INDEX] == 0).all())
    assert f.grad is not None
    assert torch.equal(f.grad, torch.arange(24.0).view(8, 3)[INDEX])


def test_both_compile_into_one_graph() -> None:
    f, c = _features(torch.float32)

    def run(f: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        seen = kernels.condition(f, c, SEGMENT, check=False)
        rows = torch.zeros(1, 8, 6)
        return kernels.splice(rows, seen[:4], INDEX, check=False)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(f, c), run(f, c))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[40], [5, 30, 5], [1] * 9, [0, 12, 0]])
def test_the_cpu_gives_what_the_plain_version_gives(dtype: torch.dtype, counts: list[int]) -> None:
    g = torch.Generator().manual_seed(5)
    rows = sum(counts)
    f, grad = (torch.randn(rows, 48, generator=g).to(dtype) for _ in range(2))
    c = torch.randn(len(counts), 48, generator=g).to(dtype) * 0.3
    segment = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    for name, args in {
        "condition": (f, c, segment),
        "condition_backward": (grad, f, c, segment),
    }.items():
        fast = getattr(torch.ops.vpt, name)(*args)
        exact = kernels.plain(name)(*args)
        torch.testing.assert_close(fast, exact)
        assert kernels.kernel_name(name, f) == f"vpt::{name}[cpu:runs]"


def test_condition_of_rows_in_any_order() -> None:
    f, c = _features()
    mixed = torch.tensor([2, 0, 2, 1, 0])
    for segment in (mixed, mixed.repeat_interleave(8)):
        rows = f.detach().repeat_interleave(len(segment) // 5, dim=0)
        got = kernels.condition(rows, c, segment)
        torch.testing.assert_close(got, kernels.plain("condition")(rows, c, segment))


def test_condition_refuses() -> None:
    f, c = _features()
    with pytest.raises(UserError, match=r"do not fit.*got: \(5, 6\) and \(3, 4\)"):
        kernels.condition(f, c[:, :4], SEGMENT)
    with pytest.raises(UserError, match=r"floating point.*torch.int64"):
        kernels.condition(f.long(), c, SEGMENT)
    with pytest.raises(UserError, match="one condition for each feature"):
        kernels.condition(f, c, SEGMENT.int())
    with pytest.raises(UserError, match=r"index is out of range.*got: 0..2; expected: 0..1"):
        kernels.condition(f, c[:2], SEGMENT)
    with pytest.raises(UserError, match="nothing to point at"):
        kernels.condition(f, c[:0], SEGMENT)
    with pytest.raises(UserError, match=r"different devices.*cpu, meta"):
        kernels.condition(f.to("meta"), c, SEGMENT)


def test_splice_refuses() -> None:
    e, f = _sequence()
    with pytest.raises(UserError, match=r"do not fit the embeddings.*\[N, D\] into \[B, L, D\]"):
        kernels.splice(e, f[:, :2], INDEX)
    with pytest.raises(UserError, match="one position for each feature"):
        kernels.splice(e, f, INDEX[:2])
    with pytest.raises(UserError, match=r"out of range.*expected: 0..7"):
        kernels.splice(e, f, torch.tensor([0, 3, 8, 5]))
    with pytest.raises(UserError, match=r"repeated.*4 entries, 3 of them different"):
        kernels.splice(e, f, torch.tensor([0, 3, 3, 5]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_accelerator_gives_what_the_plain_version_gives(dtype: torch.dtype) -> None:
    results = []
    for device in ("cpu", "cuda"):
        f, c = (t.detach().to(device).requires_grad_() for t in _features(dtype))
        e = torch.zeros(1, 8, 6, dtype=dtype, device=device)
        seen = kernels.condition(f, c, SEGMENT.to(device))
        out = kernels.splice(e, seen[:4], INDEX.to(device))
        out.float().square().sum().backward()
        assert f.grad is not None
        assert c.grad is not None
        results.append([t.detach().cpu() for t in (out, f.grad, c.grad)])
        if device == "cuda":
            assert kernels.kernel_name("condition", f, c) in (
                "vpt::condition[cuda:plain]",
                "vpt::condition[cuda:triton]",
            )
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)
