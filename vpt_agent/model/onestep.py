"""One token of each of some rows on a GPU: :mod:`vpt_agent.model.direct`'s pass in few kernels.

There each kernel costs about a microsecond beside its work, as long as reading a small matrix
takes. So the products that read the same row are one product (their weights lie behind one another
in memory, and the model's parameters are views of that), sums are part of products, norms and
rotations are as few operators as they can be. Half as many kernels a layer as in ``direct``.

In half types a norm rounds once here and twice there, so figures differ in the last bits.

R rows, D width, H heads, K key-value heads, G = H / K, d head width, I inner width, S cache slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from vpt_agent.model.direct import DirectDecoder


class SteppingCache(Protocol):
    """A cache that each row writes one token to, and attends to."""

    def attend(self, queries: Tensor, new: tuple[Tensor, Tensor], layer_idx: int) -> Tensor:
        """Store the new keys and values [R, K, d]; attention of ``queries`` [R, K, G, d]."""


@dataclass(frozen=True)
class PackedLayer:
    """Weights that lie together: queries, keys and values [(H + 2 K) d, D] with their bias, gate
    and up [2 I, D]."""

    attend: Tensor
    bias: Tensor
    inner: Tensor


@dataclass(frozen=True, eq=False)
class Packed:
    """The layers of one decoder."""

    decoder: DirectDecoder
    layers: tuple[PackedLayer, ...]

    def current(self) -> bool:
        """Whether the model's parameters still are these: nobody has moved or replaced them."""
        return all(
            _lie_in(packed.attend, "weight", (layer.q, layer.k, layer.v))
            and _lie_in(packed.bias, "bias", (layer.q, layer.k, layer.v))
            and _lie_in(packed.inner, "weight", (layer.gate, layer.up))
            for layer, packed in zip(self.decoder.layers, self.layers, strict=True)
        )


def pack_for_steps(model: Any) -> bool:
    """Lay the weights of ``model``'s language layers together for steps of one token of each row,
    unless they lie so already; whether they do now. Models whose layers are not plain (quantised,
    adapted, of another family) are left alone."""
    with torch.no_grad():
        decoder: DirectDecoder | None = model.direct_decoder()
    if decoder is None or not decoder.plain_layers:
        return False
    known = decoder.packed.get("steps")
    if known is None or not known.current():
        decoder.packed["steps"] = pack(decoder)
    return True


def forget_if_moved(model: Any) -> None:
    """Let go of weights that lay together and are no longer ``model``'s own: it was moved since."""
    with torch.no_grad():
        decoder: DirectDecoder | None = model.direct_decoder()
    if decoder is not None and "steps" in decoder.packed and not decoder.packed["steps"].current():
        del decoder.packed["steps"]


def pack(decoder: DirectDecoder) -> Packed:
    """Lay the weights of ``decoder`` together. Its parameters stay the same objects with the same
    values, at other addresses."""
    layers = []
    with torch.inference_mode(False), torch.no_grad():
        for layer in decoder.layers:
            attend = (layer.q, layer.k, layer.v)
            layers.append(
                PackedLayer(
                    _together("weight", attend),
                    _together("bias", attend),
                    _together("weight", (layer.gate, layer.up)),
                )
            )
    return Packed(decoder, tuple(layers))


def _together(name: str, parts: Sequence[Mapping[str, Any]]) -> Tensor:
    whole = torch.cat([part[name].data for part in parts])
    at = 0
    for part in parts:
        count = part[name].shape[0]
        part[name].data = whole[at : at + count]
        at += count
    return whole


def _lie_in(whole: Tensor, name: str, parts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ``parts`` are ``whole``'s, one behind another."""
    place = whole.data_ptr()
    for part in parts:
        own = part[name]
        if own is None or own.data_ptr() != place:
            return False
        place += own.numel() * own.element_size()
    return place == whole.data_ptr() + whole.numel() * whole.element_size()


def one_each(packed: Packed, embeds: Tensor, positions: Tensor, cache: SteppingCache) -> Tensor:
    """Final-norm hidden states [R, 1, D] of ``embeds`` [R, 1, D] at ``positions`` [3, R, 1] (those
    of text: all three alike). ``cache`` knows what each row may see."""
    decoder, rows = packed.decoder, embeds.shape[0]
    d, heads, kv = decoder.head_dim, decoder.heads, decoder.kv_heads
    angles = positions[0] * decoder.text.rotary_emb.inv_freq.float()  # [R, d / 2]
    cos, sin = angles.cos() * decoder.scaling, angles.sin() * decoder.scaling
    cos = cos.to(embeds.dtype)[:, None, None]  # [R, 1, 1, d / 2]
    sin = torch.stack((-sin, sin), dim=1).to(embeds.dtype)[:, None]  # [R, 1, 2, d / 2]
    x = embeds[:, 0]
    for index, (layer, own) in enumerate(zip(decoder.layers, packed.layers, strict=True)):
        made = functional.linear(_norm(decoder, x, layer.before), own.attend, own.bias)
        halves = made[:, : (heads + kv) * d].view(rows, heads + kv, 2, d // 2)
        turned = torch.addcmul(halves * cos, halves.flip(2), sin).view(rows, heads + kv, d)
        new = turned[:, heads:], made[:, (heads + kv) * d :].view(rows, kv, d)
        # The heads that share keys are rows of one head.
        out = cache.attend(turned[:, :heads].reshape(rows, kv, heads // kv, d), new, index)
        x = torch.addmm(x, out.reshape(rows, -1), layer.o["weight"].t())
        gate, up = functional.linear(_norm(decoder, x, layer.between), own.inner).chunk(2, dim=-1)
        x = torch.addmm(x, functional.silu(gate) * up, layer.down["weight"].t())
    return _norm(decoder, x, decoder.text.norm._parameters)[:, None]


def _norm(decoder: DirectDecoder, x: Tensor, norm: Mapping[str, Any]) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), norm["weight"], decoder.eps)
