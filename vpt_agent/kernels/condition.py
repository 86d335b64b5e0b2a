"""Features conditioned on a control state: ``vpt::condition`` and its gradient.

Paper (arXiv 2502.17425) section 3.3, as the released model computes it: the control state is both
key and value, and the weight is not normalised, so with features f [N, D] and control states
c [M, D] the result is ``f_i + (f_i . c_s) c_s`` with ``s = segment_i``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vpt_agent.kernels.registry import check_index, define, one_device, require


def _wide(features: Tensor, condition: Tensor) -> torch.dtype:
    # Half types: the dot product over D is summed and applied in float32.
    dtype = torch.promote_types(features.dtype, condition.dtype)
    return torch.promote_types(dtype, torch.float32)


def _condition(features: Tensor, condition: Tensor, segment: Tensor) -> Tensor:
    dtype = _wide(features, condition)
    f = features.to(dtype)  # [N, D]
    c = condition.to(dtype).index_select(0, segment)  # [N, D]
    weight = (f * c).sum(-1, keepdim=True)  # [N, 1]
    return torch.addcmul(f, weight, c).to(features.dtype, copy=True)


def _condition_backward(
    grad: Tensor, features: Tensor, condition: Tensor, segment: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = _wide(features, condition)
    g, f = grad.to(dtype), features.to(dtype)  # [N, D]
    c = condition.to(dtype).index_select(0, segment)  # [N, D]
    g_c = (g * c).sum(-1, keepdim=True)  # [N, 1]
    f_c = (f * c).sum(-1, keepdim=True)  # [N, 1]
    to_features = g + g_c * c  # [N, D]
    to_condition = torch.zeros_like(condition, dtype=dtype)  # [M, D]
    to_condition.index_add_(0, segment, g_c * f + f_c * g)
    return (
        to_features.to(features.dtype, copy=True),
        to_condition.to(condition.dtype, copy=True),
    )


def _condition_fake(features: Tensor, condition: Tensor, segment: Tensor) -> Tensor:
    return torch.empty_like(features, memory_format=torch.contiguous_format)


def _condition_backward_fake(
    grad: Tensor, features: Tensor, condition: Tensor, segment: Tensor
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(features, memory_format=torch.contiguous_format),
        torch.empty_like(condition, memory_format=torch.contiguous_format),
    )


_op = define("condition", _condition, _condition_fake)
_backward_op = define("condition_backward", _condition_backward, _condition_backward_fake)


def _setup(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor, Tensor, None]:
    features, condition, segment = ctx.saved_tensors  # type: ignore[attr-defined]
    to_features, to_condition = _backward_op(grad, features, condition, segment)
    return to_features, to_condition, None


_op.register_autograd(_backward, setup_context=_setup)


def condition(
    features: Tensor, condition: Tensor, segment: Tensor, *, check: bool | None = None
) -> Tensor:
    """Condition visual features on control states: ``f_i + (f_i . c_s) c_s``, s = segment_i.

    ``features`` [N, D] floating point, ``condition`` [M, D] floating point, ``segment`` [N] int64:
    the row of ``condition`` that belongs to each feature. Returns [N, D] in the features' dtype;
    half types are summed in float32. Gradients go to features and condition.

    ``check`` looks at the values of ``segment``, which waits for the device: None does so on the
    CPU only. Wrong shapes, dtypes, devices and entries are a :class:`UserError`.
    """
    where = "kernels.condition"
    require(
        features.dim() == 2 and condition.dim() == 2 and features.shape[1] == condition.shape[1],
        "features and condition do not fit",
        where=where,
        got=f"{tuple(features.shape)} and {tuple(condition.shape)}",
        expected="[N, D] and [M, D]",
    )
    require(
        features.is_floating_point() and condition.is_floating_point(),
        "features and condition must be floating point",
        where=where,
        got=f"{features.dtype} and {condition.dtype}",
        expected="float dtypes",
    )
    require(
        segment.dtype == torch.int64 and tuple(segment.shape) == (features.shape[0],),
        "segment does not name one condition for each feature",
        where=where,
        got=f"{segment.dtype} {tuple(segment.shape)}",
        expected=f"torch.int64 ({features.shape[0]},)",
    )
    one_device(where, features, condition, segment)
    if segment.device.type == "cpu" if check is None else check:
        check_index(segment, condition.shape[0], where=where)
    result: Tensor = _op(features, condition, segment)
    return result
