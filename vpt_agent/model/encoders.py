"""Vision encoders behind the re-encoding kinds, and their projectors: one row per encoder.

V visual tokens, D the language model's width, k control tokens per call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Dinov2Config, Dinov2Model, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.kernels import project
from vpt_agent.tokens.table import PerceptionKind


class XavierLinear(nn.Linear):
    """A linear layer that starts as published: xavier-uniform weights, zero bias."""

    def reset_parameters(self) -> None:
        """Fresh weights."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class PlainConv(nn.Conv2d):
    """A convolution that starts as torch makes it, whatever the model's rule says."""


class Projector(nn.Module):
    """Encoder output → features f [V, D], and control states → condition c [D].

    Paper section 3.3; the parameters are those of the release, unused ones included, so that
    checkpoints match key by key. This base takes the base tower's tokens as they are.
    """

    def __init__(self, source_width: int, width: int, controls: int, **_: int) -> None:
        super().__init__()
        self.source_width = source_width
        self.linear_feature = XavierLinear(source_width, width)
        self.linear_condition = XavierLinear(controls * width, width)
        self.layernorm_feature = nn.LayerNorm(source_width)
        self.layernorm_condition = nn.LayerNorm(controls * width)

    def features(self, encoded: Tensor) -> Tensor:
        """Features [V, D] of one picture's ``encoded`` [V, W]: the tokens themselves.

        What a tower gives for deeper layers is left out: a re-encoded picture enters at the input.
        """
        return encoded[..., : self.source_width]

    def condition(self, control: Tensor) -> Tensor:
        """Conditions [M, D] of control states [M, k, D]."""
        states, norm, linear = control.flatten(1), self.layernorm_condition, self.linear_condition
        alike = states.dtype == norm.weight.dtype == linear.weight.dtype
        bare = _bare(norm, nn.LayerNorm) and _bare(linear, XavierLinear)
        if alike and bare and _alone(states):
            return project(states, norm.weight, norm.bias, linear.weight, linear.bias, eps=norm.eps)
        result: Tensor = linear(norm(states))
        return result


def _bare(module: nn.Module, expected: type[nn.Module]) -> bool:
    """Whether ``module`` is what its parameters say: no adapter, quantised layer, or hook that
    fetches weights from elsewhere."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is expected and not hooked


def _alone(states: Tensor) -> bool:
    """Whether nothing watches a computation on ``states``: training is left to the modules, which
    sharding and mixed precision take hold of."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled(states.device.type))


class TokenProjector(Projector):
    """For encoders that give tokens (DINOv2): f = linear(LN(tokens))."""

    def features(self, encoded: Tensor) -> Tensor:
        """Features [V, D] of ``encoded`` [V, W]."""
        result: Tensor = self.linear_feature(self.layernorm_feature(encoded))
        return result


class MapProjector(Projector):
    """For encoders that give a map (SAM): f = strided convolution of LN over channels."""

    def __init__(self, source_width: int, width: int, controls: int, *, stride: int) -> None:
        super().__init__(source_width, width, controls)
        self.conv_feature = PlainConv(source_width, width, kernel_size=stride, stride=stride)

    def features(self, encoded: Tensor) -> Tensor:
        """Features [V, D] of ``encoded`` [W, H, H], row by row."""
        normed = self.layernorm_feature(encoded.permute(1, 2, 0))  # [H, H, W]
        if normed.dtype == torch.float32:
            tokens = self.conv_feature(normed.permute(2, 0, 1)[None])  # [1, D, side, side]
            result: Tensor = tokens[0].flatten(1).T  # [V, D]
            return result
        # Kernel and stride are equal, so the convolution is a product over patches. Written as
        # one: torch's bfloat16 convolution on CPUs is wrong for some small channel counts.
        weight, (step, _) = self.conv_feature.weight, self.conv_feature.stride
        rows, columns, channels = normed.shape
        patches = normed.view(rows // step, step, columns // step, step, channels)
        flat = patches.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)  # [V, W * s * s]
        return functional.linear(flat, weight.flatten(1), self.conv_feature.bias)  # [V, D]


@dataclass(frozen=True)
class EncoderSpec:
    """What the table's ``encoder`` names: how it is built, run and projected.

    ``check`` compares a row with the encoder's config and gives the projector's extra arguments.
    """

    width: Callable[[Mapping[str, Any]], int]
    build: Callable[[Mapping[str, Any]], nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor]
    check: Callable[[PerceptionKind, Mapping[str, Any]], dict[str, int]]
    projector: type[Projector]


def _side(kind: PerceptionKind) -> int:
    side = math.isqrt(kind.visual_tokens or 0)
    if not side or side * side != kind.visual_tokens:
        raise UserError(
            "a kind with an encoder of its own needs a square number of visual tokens",
            where=f"the row of {kind.name!r}",
            got=repr(kind.visual_tokens),
        )
    return side


def _misfit(kind: PerceptionKind, got: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "a perception kind's row does not fit its encoder",
        where=f"the row of {kind.name!r}",
        got=got,
        expected=expected,
        fix="set visual_tokens and input_size of the row, or the encoder's config, to match",
    )


def _check_dino(kind: PerceptionKind, config: Mapping[str, Any]) -> dict[str, int]:
    patch = int(config["patch_size"])
    if kind.input_size is None or kind.input_size != _side(kind) * patch:
        raise _misfit(
            kind,
            f"input {kind.input_size} px, patch {patch}, {kind.visual_tokens} visual tokens",
            "input = patch * sqrt(visual tokens)",
        )
    return {}


def _check_sam(kind: PerceptionKind, config: Mapping[str, Any]) -> dict[str, int]:
    image, patch = int(config["image_size"]), int(config["patch_size"])
    stride, rest = divmod(image // patch, _side(kind))
    if kind.input_size != image or rest or stride == 0:
        raise _misfit(
            kind,
            f"input {kind.input_size} px, {kind.visual_tokens} visual tokens",
            f"input {image} px, a side that divides the map's {image // patch}",
        )
    return {"stride": stride}


def _build_dino(config: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = Dinov2Model(Dinov2Config(**config))
    return model


def _build_sam(config: Mapping[str, Any]) -> nn.Module:
    values = {"initializer_range": 0.02, **config}  # transformers' default of 1e-10 learns nothing
    values.setdefault("num_pos_feats", int(config["output_channels"]) // 2)
    model: nn.Module = SamVisionEncoder(SamVisionConfig(**values))
    return model


def _run_dino(model: nn.Module, pixels: Tensor) -> Tensor:
    tokens: Tensor = model(pixel_values=pixels, return_dict=True).last_hidden_state
    return tokens[:, 1:]  # [N, V, W]: without the class token


def _run_sam(model: nn.Module, pixels: Tensor) -> Tensor:
    result: Tensor = model(pixel_values=pixels, return_dict=True).last_hidden_state
    return result  # [N, W, H, H]


ENCODERS: Mapping[str, EncoderSpec] = {
    "dino": EncoderSpec(
        width=lambda config: int(config["hidden_size"]),
        build=_build_dino,
        run=_run_dino,
        check=_check_dino,
        projector=TokenProjector,
    ),
    "sam": EncoderSpec(
        width=lambda config: int(config["output_channels"]),
        build=_build_sam,
        run=_run_sam,
        check=_check_sam,
        projector=MapProjector,
    ),
}
"""Encoders besides the base tower, by the name that a row's ``encoder`` gives."""


def build_parts(
    kind: PerceptionKind, encoders: Mapping[str, Mapping[str, Any]], width: int, controls: int
) -> tuple[nn.Module | None, Projector]:
    """The encoder (None for the base tower) and projector of one re-encoding kind.

    ``encoders`` are the shapes by config prefix, ``width`` is D, ``controls`` is k.
    """
    if kind.encoder == "base":
        return None, Projector(width, width, controls)
    if kind.encoder not in ENCODERS:
        raise UserError(
            "no such vision encoder",
            where=f"the row of {kind.name!r}",
            got=kind.encoder,
            expected=", ".join(["base", *ENCODERS]),
        )
    spec = ENCODERS[kind.encoder]
    config = encoders.get(kind.config_prefix or "")
    if config is None:
        raise CheckpointError(
            "the config has no shapes for a kind's encoder",
            where=f"VPTConfig.encoders[{kind.config_prefix!r}]",
            expected=f"the shapes of the {kind.encoder} encoder",
        )
    extra = spec.check(kind, config)
    projector = spec.projector(spec.width(config), width, controls, **extra)
    return spec.build(config), projector


def run_encoder(kind: PerceptionKind, model: nn.Module, pixels: Tensor) -> Tensor:
    """Encoder output of ``pixels`` [N, 3, S, S]: [N, V, W] (tokens) or [N, W, H, H] (a map)."""
    size = kind.input_size
    if pixels.dim() != 4 or pixels.shape[1] != 3 or tuple(pixels.shape[2:]) != (size, size):
        raise UserError(
            "pictures of the wrong shape for this encoder",
            where=kind.name,
            got=tuple(pixels.shape),
            expected=f"[N, 3, {size}, {size}]",
        )
    dtype = next(model.parameters()).dtype
    return ENCODERS[kind.encoder].run(model, pixels.to(dtype))


def stack_segments(counts: list[int], device: torch.device) -> Tensor:
    """Which of ``len(counts)`` segments each of ``sum(counts)`` tokens belongs to, int64."""
    return torch.repeat_interleave(
        torch.arange(len(counts), device=device), torch.tensor(counts, device=device)
    )
