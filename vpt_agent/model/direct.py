"""The language model's pass over an engine's cache, written out: the same numbers, fewer calls.

transformers' classes pass each token through some dozens of Python calls and small operators a
layer; where one token is computed at a time, these cost as much as the arithmetic. Here a layer of
Qwen2-VL and Qwen2.5-VL is ten products and what lies between them. It computes only what it knows
to be unchanged: modules that were replaced, hooked or quantised, and gradients, go the ordinary
way (:meth:`DirectDecoder.fits`).

B rows, L new tokens, S cache slots, D width, H heads, K key-value heads, G = H / K, d head width.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache

from vpt_agent.model import compiled, compiled_rows, onerow, onestep, somerows

_BIASED = (True, True, True, False, True, True, False, True, True)
"""Which parts of a layer (in the order of ``_Layer``) one row takes with a bias."""
_LAYERS = frozenset({"Qwen2VLDecoderLayer", "Qwen2_5_VLDecoderLayer"})
_SOME_ROWS = {torch.float32: (7, 48), torch.bfloat16: (2, 192)}
"""From how many rows to how many a product goes the other way round on a CPU: measured with MKL and
oneDNN, transposing included."""
_PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


class ExplicitCache(Cache):
    """A cache whose owner gives positions and masks with each forward, and knows which rows it
    writes: ``update(keys, values, layer)`` takes [B, K, L, d] and gives [B, K, S, d].
    ``one_each``: a device's own step, of one token of every row."""

    one_each = False


def times(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` [..., n] times ``weight`` [m, n], plus ``bias`` [m]: [..., m].

    One row on a CPU goes as a matrix times a vector, which reads half types faster; some dozen
    rows as ``weight`` times their columns, for which its routines are faster.
    """
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or type(weight) is not nn.Parameter:
        return functional.linear(x, weight, bias)
    if rows != 1:
        least, most = _SOME_ROWS.get(x.dtype, (0, 0))
        if not least <= rows <= most:
            return functional.linear(x, weight, bias)
        columns = x.reshape(rows, -1).t()
        if bias is None and (made := compiled_rows.times(weight, columns)) is not None:
            return made.t().contiguous().view(*x.shape[:-1], -1)
        made = (
            torch.mm(weight, columns)
            if bias is None
            else torch.addmm(bias[:, None], weight, columns)
        )
        return made.t().contiguous().view(*x.shape[:-1], -1)
    row = x.reshape(-1)
    if bias is None and (found := compiled.times(weight, row)) is not None:
        return found.to(x.dtype).view(*x.shape[:-1], -1)
    made = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)
    return made.view(*x.shape[:-1], -1)


class _Layer(NamedTuple):
    """The parameters of one layer, by module: dicts, so that what is moved or loaded is seen."""

    q: Mapping[str, Any]
    k: Mapping[str, Any]
    v: Mapping[str, Any]
    o: Mapping[str, Any]
    gate: Mapping[str, Any]
    up: Mapping[str, Any]
    down: Mapping[str, Any]
    before: Mapping[str, Any]
    between: Mapping[str, Any]


class _Watched(NamedTuple):
    """Modules by place and name, their hooks, and their own attributes (where a library that wraps
    ``forward`` puts its own)."""

    places: tuple[Mapping[str, Any], ...]
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    hooks: tuple[Mapping[int, Any], ...]
    own: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, found: Sequence[tuple[Mapping[str, Any], str, nn.Module]]) -> _Watched:
        places, names, modules = zip(*found, strict=True)
        hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        return cls(places, names, modules, tuple(hooks), tuple(m.__dict__ for m in modules))


@dataclass(frozen=True, eq=False)
class DirectDecoder:
    """A language model's layers. ``watched`` are modules by their place, which must stay as they
    were; ``which`` [d / 2] says by which of the three positions each angle turns;
    ``plain_layers`` that no weight is of a kind of its own (quantised, say)."""

    text: Any
    layers: tuple[_Layer, ...]
    watched: _Watched
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    which: tuple[int, ...]
    scaling: float
    plain_layers: bool
    packed: dict[str, onestep.Packed] = field(default_factory=dict)  # "steps", if there are any

    @classmethod
    def of(cls, text: Any) -> DirectDecoder | None:
        """The layers of a language model of transformers; None if it is not of the known kind."""
        config = text.config
        rope = getattr(config, "rope_parameters", None) or {}
        sections: list[int] = rope.get("mrope_section") or []
        plain = getattr(config, "hidden_act", None) == "silu" and sections
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        attention = getattr(config, "_attn_implementation", None)
        if not plain or rope.get("rope_type", "default") != "default" or attention != "sdpa":
            return None
        known = all(type(layer).__name__ in _LAYERS for layer in text.layers)
        if kinds != {"full_attention"} or not known or not _plain_products(text.layers):
            return None
        watched: list[tuple[Mapping[str, Any], str, nn.Module]] = []
        layers = tuple(_layer(layer, watched) for layer in text.layers)
        watched += [
            (text.layers._modules, name, layer) for name, layer in text.layers.named_children()
        ]
        watched += [(text._modules, "norm", text.norm), ({"": text}, "", text)]
        return cls(
            text=text,
            layers=layers,
            watched=_Watched.of(watched),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            eps=config.rms_norm_eps,
            which=tuple(i for i, n in enumerate(sections) for _ in range(n)),
            scaling=text.rotary_emb.attention_scaling,
            plain_layers=all(
                type(part["weight"]) is nn.Parameter and (part.get("bias") is None or free)
                for layer in layers
                for part, free in zip(layer, _BIASED, strict=True)
            ),
        )

    def fits(self) -> bool:
        """Whether every module is still the one it was, without hooks.

        Asked before each token, so it runs in C: dicts, names and modules stand in lists.
        """
        watched = self.watched
        return (
            all(map(operator.is_, map(operator.getitem, watched.places, watched.names),
                    watched.modules))
            and not any(watched.hooks)
            and not any(map(operator.contains, watched.own, repeat("forward")))
        )  # fmt: skip

    def __call__(
        self, embeds: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache
    ) -> Tensor:
        """Final-norm hidden states [B, L, D] of ``embeds`` [B, L, D] at ``positions`` [3, B, L].

        ``mask`` bool [B, 1, L, S], or None: one query a row, or a block at the start.
        """
        if getattr(cache, "one_each", False) and "steps" in self.packed:
            return onestep.one_each(self.packed["steps"], embeds, positions, cast(Any, cache))
        if onerow.takes(embeds, mask) and self.plain_layers:
            return onerow.one_row(self, embeds, positions, cache)
        if somerows.takes(embeds) and self.plain_layers:
            return somerows.some_rows(self, embeds, positions, mask, cache)
        cos, sin = self.angles(positions, embeds.dtype)
        if mask is not None and embeds.shape[1] > 1:
            mask = mask.repeat(1, 1, self.heads // self.kv_heads, 1)  # [B, 1, G * L, S]
            if mask.device.type == "cpu":  # once, and not by each layer's attention
                mask = torch.zeros(mask.shape, dtype=embeds.dtype).masked_fill_(~mask, -torch.inf)
        hidden = embeds
        for index, layer in enumerate(self.layers):
            normed = self._norm(hidden, layer.before)
            hidden = hidden + self._attention(normed, layer, index, (cos, sin), mask, cache)
            normed = self._norm(hidden, layer.between)
            gate = functional.silu(_product(normed, layer.gate))
            hidden = hidden + _product(gate.mul_(_product(normed, layer.up)), layer.down)
        return self._norm(hidden, self.text.norm._parameters)

    def _norm(self, x: Tensor, norm: Mapping[str, Any]) -> Tensor:
        weight: Tensor = norm["weight"]
        if x.dtype == torch.float32:
            return functional.rms_norm(x, (x.shape[-1],), weight, self.eps)
        # Half types: the mean in float32, the weight behind the rounding, as transformers has it.
        normed = functional.rms_norm(x.float(), (x.shape[-1],), None, self.eps)
        return weight * normed.to(x.dtype)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, L, 1, d / 2] of the rotary positions (M-RoPE)."""
        speed = self.text.rotary_emb.inv_freq.float()  # a model that was cast has it in its type
        if positions.shape[2] == 1:  # text: its three positions are one
            angles = positions[0, :, :, None] * speed
        else:
            angles = positions[list(self.which)].permute(1, 2, 0) * speed  # [B, L, d / 2]
        cos, sin = angles.cos(), angles.sin()
        if self.scaling != 1.0:
            cos, sin = cos * self.scaling, sin * self.scaling
        return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)

    def _attention(
        self,
        x: Tensor,
        layer: _Layer,
        index: int,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache,
    ) -> Tensor:
        batch, length = x.shape[:2]
        both = torch.cat((_product(x, layer.q), _product(x, layer.k)), dim=-1)
        a, b = both.view(batch, length, self.heads + self.kv_heads, self.head_dim).chunk(2, -1)
        cos, sin = turn
        both = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)  # [B, L, H + K, d]
        q = both[:, :, : self.heads]
        k = both[:, :, self.heads :].transpose(1, 2)  # [B, K, L, d]
        v = _product(x, layer.v).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        keys, values = cache.update(k, v, index)  # [B, K, S, d]
        groups = self.heads // self.kv_heads
        if mask is None and length > 1:
            q = q.transpose(1, 2)  # [B, H, L, d]
            out = functional.scaled_dot_product_attention(
                q, keys, values, is_causal=True, enable_gqa=groups > 1
            )
            out = out.transpose(1, 2)  # [B, L, H, d]
        else:
            # The heads that share keys become rows of one head: nothing is repeated in memory.
            q = q.reshape(batch, length, self.kv_heads, groups, self.head_dim)
            q = q.permute(0, 2, 3, 1, 4).reshape(batch, self.kv_heads, -1, self.head_dim)
            out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
            out = out.view(batch, self.kv_heads, groups, length, self.head_dim)
            out = out.permute(0, 3, 1, 2, 4)  # [B, L, K, G, d]
        return _product(out.reshape(batch, length, -1), layer.o)


def _plain_products(layers: Any) -> bool:
    """Whether every product is torch's own linear layer: no adapter's, no quantised one."""
    return all(
        type(owner._modules.get(name)) is nn.Linear
        for layer in layers
        for owner, names in ((layer.self_attn, _PRODUCTS), (layer.mlp, _MLP))
        for name in names
    )


def _product(x: Tensor, linear: Mapping[str, Any]) -> Tensor:
    return times(x, linear["weight"], linear["bias"])


def _layer(layer: Any, watched: list[tuple[Mapping[str, Any], str, nn.Module]]) -> _Layer:
    """The parameters of ``layer``; its modules go to ``watched``."""
    places = [(layer.self_attn, name) for name in _PRODUCTS]
    places += [(layer.mlp, name) for name in _MLP]
    places += [(layer, name) for name in _NORMS]
    found = []
    for owner, name in places:
        module = owner._modules[name]
        watched.append((owner._modules, name, module))
        found.append(module._parameters)
    for owner, name in ((layer, "self_attn"), (layer, "mlp")):
        watched.append((owner._modules, name, owner._modules[name]))
    return _Layer(*found)
