"""Weights of the language model's layers in eight bits, by torchao.

Decoding reads every weight once a token, so half the bytes are half the time, where the device's
product takes them as they are. Activations stay as they were; embeddings, the output head, the
vision tower and the projectors keep their dtype. The model is loaded first and its layers are
changed in place, so that checkpoints and random weights go the same way. See
docs/gpu-decode.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vpt_agent.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    from vpt_agent.model.modeling import VPTForConditionalGeneration

WEIGHTS = ("own", "int8", "float8")
"""As the checkpoint and ``dtype`` have them; whole numbers or floats of eight bits, with a scale a
row."""
_FLOAT8 = (8, 9)
"""The compute capability from which on a GPU has products of such floats."""


def check_weights(name: str) -> None:
    """Raise :class:`UserError` for a name that is none of :data:`WEIGHTS`, and
    :class:`MissingExtraError` where torchao is missing."""
    if name not in WEIGHTS:
        raise UserError(
            "unknown weights", where="weights", got=str(name), expected=", ".join(WEIGHTS)
        )
    if name != "own":
        _torchao()


def _torchao() -> Any:
    try:
        import torchao.quantization
    except ImportError as error:
        raise MissingExtraError(
            "weights of eight bits are torchao's, which is not installed",
            where="weights",
            fix='pip install "vpt-agent[int8]"',
        ) from error
    return torchao.quantization


def use_weights(model: VPTForConditionalGeneration, name: str) -> None:
    """Give the products of ``model``'s language layers weights of kind ``name``, where they lie.

    Such a model can run, and cannot be trained or saved.
    """
    check_weights(name)
    if name == "own":
        return
    library = _torchao()
    if name == "float8" and not _has_float8(model.device):
        raise UserError(
            "this device has no products of eight-bit floats",
            where="weights='float8'",
            got=str(model.device),
            expected="a CUDA device of compute capability 8.9 or more",
            fix="use weights='int8'",
        )
    how = library.Float8WeightOnlyConfig() if name == "float8" else library.Int8WeightOnlyConfig()
    layers: Any = model.model.layers
    library.quantize_(layers, how)


def _has_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FLOAT8


def stored_bytes(module: nn.Module) -> int:
    """Bytes of ``module``'s parameters as they are stored, their scales included."""
    return sum(_bytes(p) for p in module.parameters())


def _bytes(tensor: Tensor) -> int:
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor.numel() * tensor.element_size()
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(getattr(tensor, name)) for name in flatten()[0])
