"""What an answer would take at least: operations over measured operations a second, bytes over
measured bytes a second. Nothing here is guessed: shapes come from the model's config."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vpt_agent.bench.machine import Rates
from vpt_agent.bench.timing import timed, timer_for
from vpt_agent.model.direct import times
from vpt_agent.model.weights import stored_bytes

if TYPE_CHECKING:
    from vpt_agent.model import VPTForConditionalGeneration


@dataclass(frozen=True)
class Work:
    """Operations (a multiply-add is two) and bytes that must be read."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        """The longer of the two at ``rates``: one cannot be faster than either."""
        return max(self.flops / rates.flops_per_second, self.bytes / rates.bytes_per_second)

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Costs:
    """A model's costs. ``layers`` and ``head`` are parameters of the language model's layers and
    of the output head, ``layer_bytes`` and ``head_bytes`` what they take as they are stored;
    ``width`` and ``kv_width`` what attention has of queries and of keys."""

    layers: int
    head: int
    layer_bytes: int
    head_bytes: int
    depth: int
    width: int
    kv_width: int
    itemsize: int
    vision_layers: int
    vision_merger: int
    vision_depth: int
    vision_width: int
    merge: int

    @classmethod
    def of(cls, model: VPTForConditionalGeneration) -> Costs:
        """Read from a model."""
        text = model.config.get_text_config()
        vision: Any = model.visual
        embeddings: Any = model.get_input_embeddings()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        total, merger = _weights(vision), _weights(vision.merger)
        words: int = stored_bytes(embeddings)
        blocks = vision.blocks
        return cls(
            layers=_weights(model.model) - embeddings.weight.numel(),
            head=model.lm_head.weight.numel(),
            layer_bytes=stored_bytes(model.model) - words,
            head_bytes=stored_bytes(model.lm_head),
            depth=text.num_hidden_layers,
            width=text.num_attention_heads * head_dim,
            kv_width=text.num_key_value_heads * head_dim,
            itemsize=model.dtype.itemsize,
            vision_layers=total - merger,
            vision_merger=merger,
            vision_depth=len(blocks),
            vision_width=blocks[0].norm1.weight.numel(),
            merge=int(vision.spatial_merge_size),
        )

    @property
    def decode_bytes(self) -> int:
        """Weights that one token reads."""
        return self.layer_bytes + self.head_bytes

    def vision(self, patches: int) -> Work:
        """The base tower on one picture of ``patches``."""
        merged = patches / self.merge**2
        products = 2.0 * (self.vision_layers * patches + self.vision_merger * merged)
        attention = 4.0 * self.vision_depth * patches * patches * self.vision_width
        read = (self.vision_layers + self.vision_merger) * self.itemsize
        return Work(products + attention, read)

    def block(self, tokens: int, past: int, heads: int = 1) -> Work:
        """``tokens`` new tokens behind ``past``, logits of ``heads`` of them."""
        seen = tokens * past + tokens * (tokens + 1) / 2  # pairs of query and key
        products = 2.0 * (self.layers * tokens + self.head * heads)
        attention = 4.0 * self.depth * seen * self.width
        cache = 2 * self.depth * self.kv_width * (past + tokens)
        weights = self.layer_bytes + (self.head_bytes if heads else 0)
        return Work(products + attention, float(weights + cache * self.itemsize))

    def attention(self, tokens: int, past: int) -> Work:
        """The part of :meth:`block` that is attention: its operations, and the cache."""
        return self.block(tokens, past, heads=0) + Work(
            -2.0 * self.layers * tokens, -float(self.layer_bytes)
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def products_seconds(model: VPTForConditionalGeneration, rows: int, heads: int) -> float:
    """Seconds that the language model's products alone take for ``rows`` tokens together, and the
    output head's for ``heads`` of them: the best of some passes over all weights, one after
    another, by the routines that the model computes with."""
    repeats = 3 if rows <= 256 else 1  # many rows take long, and differ less
    weights = [
        module.weight for module in model.model.layers.modules() if isinstance(module, nn.Linear)
    ]
    with torch.inference_mode():
        head = model.lm_head.weight
        wide = {n: torch.randn(rows, n).to(head) for n in {w.shape[1] for w in weights}}
        last = torch.randn(heads, head.shape[1]).to(head)

        def once() -> None:
            for weight in weights:
                times(wide[weight.shape[1]], weight)
            if heads:
                times(last, head)

        device = head.device
        samples = [timed(once, device).by(timer_for(device)) for _ in range(repeats + 1)][1:]
    return min(samples)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
