"""Visual features into a sequence of embeddings: ``vpt::splice``."""

from __future__ import annotations

import torch
from torch import Tensor

from vpt_agent.kernels.registry import check_index, define, one_device, require


def _splice(embeds: Tensor, features: Tensor, index: Tensor) -> Tensor:
    result = embeds.clone(memory_format=torch.contiguous_format)  # [B, L, D]
    rows = result.view(-1, embeds.shape[-1])  # [B*L, D]
    rows.index_copy_(0, index, features.to(embeds.dtype))
    return result


def _splice_fake(embeds: Tensor, features: Tensor, index: Tensor) -> Tensor:
    return torch.empty_like(embeds, memory_format=torch.contiguous_format)


_op = define("splice", _splice, _splice_fake)


def _setup(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor
) -> None:
    _, features, index = inputs
    ctx.save_for_backward(index)
    ctx.features_dtype = features.dtype  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad: Tensor
) -> tuple[Tensor, Tensor, None]:
    (index,) = ctx.saved_tensors  # type: ignore[attr-defined]
    rows = grad.reshape(-1, grad.shape[-1])  # [B*L, D]
    to_features = rows.index_select(0, index)  # [N, D]
    to_embeds = rows.index_fill(0, index, 0).view(grad.shape)  # [B, L, D]
    return to_embeds, to_features.to(ctx.features_dtype), None  # type: ignore[attr-defined]


_op.register_autograd(_backward, setup_context=_setup)


def splice(embeds: Tensor, features: Tensor, index: Tensor, *, check: bool | None = None) -> Tensor:
    """A copy of ``embeds`` with the rows at flat positions ``index`` replaced by ``features``.

    ``embeds`` [B, L, D], ``features`` [N, D] (cast to the dtype of ``embeds``), ``index`` [N]
    int64, ``b * L + l`` for row b, position l; each position at most once. Returns [B, L, D].
    Gradients go to both; the replaced rows of ``embeds`` get zero.

    ``check`` looks at the values of ``index``, which waits for the device: None does so on the
    CPU only. Wrong shapes, dtypes, devices and entries are a :class:`UserError`.
    """
    where = "kernels.splice"
    require(
        embeds.dim() == 3 and features.dim() == 2 and features.shape[1] == embeds.shape[2],
        "features do not fit the embeddings",
        where=where,
        got=f"{tuple(features.shape)} into {tuple(embeds.shape)}",
        expected="[N, D] into [B, L, D]",
    )
    require(
        index.dtype == torch.int64 and tuple(index.shape) == (features.shape[0],),
        "index does not name one position for each feature",
        where=where,
        got=f"{index.dtype} {tuple(index.shape)}",
        expected=f"torch.int64 ({features.shape[0]},)",
    )
    one_device(where, embeds, features, index)
    if index.device.type == "cpu" if check is None else check:
        check_index(index, embeds.shape[0] * embeds.shape[1], where=where, unique=True)
    result: Tensor = _op(embeds, features, index)
    return result
