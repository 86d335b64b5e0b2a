"""Features of pictures: computed once per picture, encoder and size, reused afterwards.

The key is the hash of the pixels that the model will see and how they were made (view, policy,
crop or whole), and the encoder. The control state is not part of it: conditioning happens on top.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vpt_agent.engine.parts import Look, Looked
from vpt_agent.errors import UserError
from vpt_agent.kernels import kernel_name
from vpt_agent.types import View
from vpt_agent.vision.encoders import encoder_pixels
from vpt_agent.vision.patches import look as look_at
from vpt_agent.vision.policy import ImagePolicy

if TYPE_CHECKING:
    from vpt_agent.engine.core import LanguageModel


@dataclass(frozen=True)
class _Entry:
    tokens: Tensor  # [V, D]
    grid: tuple[int, int, int] | None
    kernels: tuple[str, ...]


class FeatureStore:
    """The last ``capacity`` features. Encoder inputs of one kind are computed in one batch."""

    def __init__(
        self, model: LanguageModel, policy: ImagePolicy, device: torch.device, *, capacity: int
    ) -> None:
        self.model, self.policy, self.device, self.capacity = model, policy, device, capacity
        self.encoder_calls = 0
        self._kept: OrderedDict[str, _Entry] = OrderedDict()

    def clear(self) -> None:
        """Forget all features: the model's weights have changed."""
        self._kept.clear()

    def key(self, encoder: str, view: View) -> str:
        """What decides the features: encoder, policy, how the view is resized, and the pixels."""
        how = "crop" if view.parent is not None else "whole"
        return f"{encoder}:{self.policy.kind}:{how}:{view.sha256}"

    def look_all(self, looks: Sequence[Look]) -> list[list[Looked]]:
        """Answers in the order asked; each distinct (encoder, picture) is computed once."""
        missing: dict[str, dict[str, View]] = {}
        for look in looks:
            source = self._source(look.encoder)
            for view in look.views:
                key = self.key(source, view)
                if key not in self._kept:
                    missing.setdefault(source, {})[key] = view
        # Held here too, so that a small capacity cannot evict what this call still needs.
        at_hand = dict(self._kept)
        seconds: dict[str, float] = {}
        for source, views in missing.items():
            began = time.perf_counter()
            for key, entry in zip(views, self._fitting(source, list(views.values())), strict=True):
                at_hand[key] = entry
            for key in views:
                seconds[key] = (time.perf_counter() - began) / len(views)
        fresh = {key for views in missing.values() for key in views}
        self.encoder_calls += len(fresh)
        answers = [
            [self._answer(look, v, at_hand, fresh, seconds) for v in look.views] for look in looks
        ]
        for key, entry in at_hand.items():
            self._kept[key] = entry
            self._kept.move_to_end(key)
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return answers

    def _answer(
        self,
        look: Look,
        view: View,
        at_hand: dict[str, _Entry],
        fresh: set[str],
        seconds: dict[str, float],
    ) -> Looked:
        source = self._source(look.encoder)
        key = self.key(source, view)
        entry = at_hand[key]
        new = key in fresh
        fresh.discard(key)  # a second request in the same batch is a reuse
        tokens = entry.tokens
        if look.encoder != source:
            tokens = self.model.features_from_base(look.encoder, tokens)
        done = Looked(view, look.encoder, tokens, entry.grid, key, not new, entry.kernels)
        return replace(done, seconds=seconds.get(key, 0.0) if new else 0.0)

    def _source(self, encoder: str) -> str:
        """The tower that computes ``encoder``: kinds on the base tower share its features.

        But for those that declare an input size: they see other pixels.
        """
        if encoder == "base":
            return "base"
        kind = self.model.table[encoder].kind
        return "base" if kind.encoder == "base" and kind.input_size is None else encoder

    def _fitting(self, source: str, views: list[View]) -> list[_Entry]:
        """Features of all ``views``; where the device's memory does not hold them, in halves."""
        try:
            return self._compute(source, views)
        except torch.OutOfMemoryError as error:
            if len(views) == 1:
                raise UserError(
                    "the device has too little memory to encode this picture",
                    where=views[0].id,
                    got=f"{views[0].size[0]} x {views[0].size[1]} pixels for {source}",
                    fix="give a smaller picture, run fewer questions at once, or lower "
                    "max_cached_tokens",
                ) from error
        # Outside the handler: the error holds the frames, and so the memory, of what failed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = len(views) // 2
        return self._fitting(source, views[:middle]) + self._fitting(source, views[middle:])

    def _compute(self, source: str, views: list[View]) -> list[_Entry]:
        kind = None if source == "base" else self.model.table[source].kind
        own = getattr(self.model, "look", None)
        if own is not None and source == "base":  # a stock model that reads pictures itself
            return [_Entry(_own(t), None, ()) for t in own(views)]
        if kind is None or kind.encoder == "base":
            patches = look_at(
                views, self.policy.at_input(None if kind is None else kind.input_size)
            )
            grid = patches.grid_thw
            tokens = self.model.encode_images(
                patches.pixel_values.to(self.device), grid.to(self.device)
            )
            if kind is not None:
                tokens = tuple(self.model.features_from_base(source, t) for t in tokens)
            return [
                _Entry(_own(t), (int(g[0]), int(g[1]), int(g[2])), patches.kernels)
                for t, g in zip(tokens, grid, strict=True)
            ]
        pixels = torch.stack([encoder_pixels(kind, v, self.policy) for v in views])
        names = (kernel_name("pixels", torch.empty(0)),)  # pictures lie on the CPU
        return [
            _Entry(_own(t), None, names)
            for t in self.model.encode(source, pixels=pixels.to(self.device))
        ]


def _own(tokens: Tensor) -> Tensor:
    """``tokens`` without the rest of its batch, which a view of it would keep in memory."""
    alone = tokens.untyped_storage().nbytes() == tokens.numel() * tokens.element_size()
    return tokens if alone else tokens.clone()
