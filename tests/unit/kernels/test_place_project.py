"""vpt::place and vpt::project: what they compute, their gradients, and what they refuse."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional

from vpt_agent import kernels
from vpt_agent.errors import UserError
from vpt_agent.kernels import Stretch

STRETCHES = [
    Stretch(row=0, first=0, tokens=2, start=5),
    Stretch(row=0, first=2, tokens=6, feature=0, start=7, height=2, width=3),
    Stretch(row=0, first=8, tokens=1, start=10),
    Stretch(row=1, first=3, tokens=2, feature=6, start=3),
]


def _rows(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(6)
    embeds = torch.randn(2, 10, 4, dtype=torch.float64, generator=g).to(dtype)
    features = torch.randn(8, 4, dtype=torch.float64, generator=g).to(dtype)
    return embeds.requires_grad_(), features.requires_grad_()


def _table(stretches: list[Stretch] = STRETCHES) -> torch.Tensor:
    return torch.tensor([list(s) for s in stretches])


def _parts(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    shapes = ((3, 6), (6,), (6,), (5, 6), (5,))
    return tuple(
        torch.randn(s, dtype=torch.float64, generator=g).to(dtype).requires_grad_() for s in shapes
    )


def test_place_puts_features_and_positions() -> None:
    embeds, features = _rows()
    got, positions = kernels.place(embeds, features, STRETCHES)
    expected = embeds.detach().clone()
    expected[0, 2:8], expected[1, 3:5] = features[:6].detach(), features[6:].detach()
    assert torch.equal(got, expected)
    assert positions.tolist() == [
        [[5, 6, 7, 7, 7, 7, 7, 7, 10, 0], [0, 0, 0, 3, 4, 0, 0, 0, 0, 0]],
        [[5, 6, 7, 7, 7, 8, 8, 8, 10, 0], [0, 0, 0, 3, 4, 0, 0, 0, 0, 0]],
        [[5, 6, 7, 8, 9, 7, 8, 9, 10, 0], [0, 0, 0, 3, 4, 0, 0, 0, 0, 0]],
    ]


def test_place_is_splice_where_both_can() -> None:
    embeds, features = _rows(torch.float32)
    index = torch.tensor([2, 3, 4, 5, 6, 7, 13, 14])
    got, _ = kernels.place(embeds, features.double(), STRETCHES)
    assert torch.equal(got, kernels.splice(embeds, features, index))
    assert got.dtype == torch.float32


@pytest.mark.parametrize("stretches", [STRETCHES, STRETCHES[1:2] + STRETCHES[3:]])
def test_place_the_cpu_gives_what_the_plain_version_gives(stretches: list[Stretch]) -> None:
    embeds, features = _rows(torch.bfloat16)
    args = (embeds.detach(), features.detach().float(), _table(stretches))
    for got, expected in zip(
        torch.ops.vpt.place(*args), kernels.plain("place")(*args), strict=True
    ):
        assert torch.equal(got, expected)
    assert kernels.kernel_name("place", embeds) == "vpt::place[cpu:runs]"


def test_place_gradients() -> None:
    def run(embeds: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return kernels.place(embeds, features, STRETCHES)[0]

    assert gradcheck(run, _rows())


def test_place_nothing() -> None:
    embeds, features = _rows()
    got, positions = kernels.place(embeds, features[:0], [])
    assert torch.equal(got, embeds)
    assert not positions.any()


def test_project_is_norm_then_linear() -> None:
    control, norm_weight, norm_bias, weight, bias = _parts(torch.float32)
    got = kernels.project(control, norm_weight, norm_bias, weight, bias, eps=1e-6)
    normed = functional.layer_norm(control, (6,), norm_weight, norm_bias, 1e-6)
    assert torch.equal(got, functional.linear(normed, weight, bias))


def test_project_gradients() -> None:
    assert gradcheck(lambda *parts: kernels.project(*parts), _parts())


def test_the_conditioned_projector_gradients() -> None:
    segment = torch.tensor([0, 0, 1, 2, 2, 2])
    features = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def run(features: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        return kernels.condition(features, kernels.project(*parts), segment)

    assert gradcheck(run, (features, *_parts()))


@pytest.mark.parametrize("name", ["place", "project"])
def test_torch_accepts_the_registration(name: str) -> None:
    args = (*_rows(), _table()) if name == "place" else (*_parts(), 1e-5)
    torch.library.opcheck(getattr(torch.ops.vpt, name).default, args)


@pytest.mark.parametrize(
    ("stretches", "message"),
    [
        ([Stretch(0, 8, 3)], r"leaves the batch.*row 0, positions 8..10.*positions 0..9"),
        ([Stretch(2, 0, 3)], r"leaves the batch.*row 2.*rows 0..1"),
        ([Stretch(0, 3, 0)], r"a stretch is empty"),
        ([Stretch(0, 0, 3), Stretch(0, 2, 3)], r"two stretches overlap.*row 0, position 2"),
        ([Stretch(0, 0, 4, 4), Stretch(1, 0, 4, 0)], r"not stand in order.*feature 4.*feature 0"),
        ([Stretch(0, 0, 4, 0)], r"another number of features; .*got: 4; expected: 8"),
        ([Stretch(0, 0, 8, 0, 0, 3, 3)], r"as long as its grid.*8 tokens, 3 x 3"),
    ],
)
def test_place_refuses_stretches(stretches: list[Stretch], message: str) -> None:
    embeds, features = _rows()
    with pytest.raises(UserError, match=message):
        kernels.place(embeds, features, stretches)


def test_place_and_project_refuse_shapes() -> None:
    embeds, features = _rows()
    with pytest.raises(UserError, match=r"do not fit the embeddings.*\(8, 3\)"):
        kernels.place(embeds, features[:, :3], STRETCHES)
    with pytest.raises(UserError, match="different devices"):
        kernels.place(embeds, features.to("meta"), STRETCHES)
    control, norm_weight, norm_bias, weight, bias = _parts()
    with pytest.raises(UserError, match=r"parts do not fit.*\[M, K\]"):
        kernels.project(control[:, :4], norm_weight, norm_bias, weight, bias)
    with pytest.raises(UserError, match=r"other dtypes.*one float dtype"):
        kernels.project(control, norm_weight, norm_bias, weight.float(), bias)
    with pytest.raises(UserError, match="different devices"):
        kernels.project(control, norm_weight, norm_bias, weight.to("meta"), bias)
