"""Control states to the conditions that features are conditioned on: ``vpt::project``.

Paper (arXiv 2502.17425) section 3.3: c = linear(LN(control states)). With ``vpt::condition`` this
is the conditioned projector: one launch for all pictures' conditions, one for all their features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vpt_agent.kernels.registry import define, one_device, require


def _project(
    control: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    normed = functional.layer_norm(control, norm_weight.shape, norm_weight, norm_bias, eps)
    return functional.linear(normed, weight, bias)


def _project_fake(
    control: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> Tensor:
    return control.new_empty(control.shape[0], weight.shape[0])


def _project_backward(
    grad: Tensor,
    control: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = list(norm_weight.shape)
    normed, mean, rstd = torch.native_layer_norm(control, shape, norm_weight, norm_bias, eps)
    to_normed = grad @ weight  # [M, K]
    to_control, to_norm_weight, to_norm_bias = torch.ops.aten.native_layer_norm_backward(
        to_normed, control, shape, mean, rstd, norm_weight, norm_bias, [True, True, True]
    )
    return to_control, to_norm_weight, to_norm_bias, grad.T @ normed, grad.sum(0)


def _project_backward_fake(
    grad: Tensor,
    control: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    bias = weight.new_empty(weight.shape[0])
    return like(control), like(norm_weight), like(norm_bias), like(weight), bias


_op = define("project", _project, _project_fake)
_backward_op = define("project_backward", _project_backward, _project_backward_fake)


def _setup(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float],
    output: Tensor,
) -> None:
    control, norm_weight, norm_bias, weight, _, eps = inputs
    ctx.save_for_backward(control, norm_weight, norm_bias, weight)
    ctx.eps = eps  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, None]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    return (*_backward_op(grad, *saved, ctx.eps), None)  # type: ignore[attr-defined]


_op.register_autograd(_backward, setup_context=_setup)


def project(
    control: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Conditions [M, D] of control states: ``linear(LN(control))``.

    ``control`` [M, K], ``norm_weight`` and ``norm_bias`` [K], ``weight`` [D, K], ``bias`` [D], all
    of one floating-point dtype. Gradients go to all. Other shapes, dtypes or devices are a
    :class:`UserError`.
    """
    where = "kernels.project"
    given = (control, norm_weight, norm_bias, weight, bias)
    width = control.shape[-1]
    outputs = weight.shape[0]
    wanted = ((len(control), width), (width,), (width,), (outputs, width), (outputs,))
    require(
        control.dim() == 2 and all(tuple(t.shape) == w for t, w in zip(given, wanted, strict=True)),
        "the projector's parts do not fit",
        where=where,
        got=[tuple(t.shape) for t in given],
        expected="[M, K], [K], [K], [D, K], [D]",
    )
    require(
        control.is_floating_point() and len({t.dtype for t in given}) == 1,
        "the projector's parts have other dtypes",
        where=where,
        got=", ".join(str(t.dtype) for t in given),
        expected="one float dtype",
    )
    one_device(where, *given)
    result: Tensor = _op(control, norm_weight, norm_bias, weight, bias, eps)
    return result
