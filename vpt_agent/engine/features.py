"""Features of pictures: computed once per picture, encoder and size, reused afterwards.

The key is the hash of the pixels that the model will see and how they were made (view, policy,
crop or whole), and the encoder. The control state is not part of it: conditioning happens on top.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vpt_agent.engine.early import MOST, Begun, Done, Early
from vpt_agent.engine.parts import Look, Looked
from vpt_agent.errors import UserError
from vpt_agent.kernels import kernel_name
from vpt_agent.tokens.table import PerceptionKind
from vpt_agent.types import View
from vpt_agent.vision.encoders import encoder_pixels
from vpt_agent.vision.patches import Patches
from vpt_agent.vision.patches import look as look_at
from vpt_agent.vision.policy import ImagePolicy

if TYPE_CHECKING:
    from vpt_agent.engine.core import LanguageModel


PREPARED = 16
"""Pictures, at most (or one more a thread), that were resized and not encoded yet."""
STALE = 10.0
"""Seconds after which a resized picture that nobody asked for is thrown away."""


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
        self.early = Early(device)
        self._kept: OrderedDict[str, _Entry] = OrderedDict()
        self._begun: OrderedDict[str, Begun[_Entry]] = OrderedDict()
        self._prepared: dict[str, tuple[Patches, float]] = {}
        self._preparing = threading.Lock()

    def clear(self) -> None:
        """Forget all features: the model's weights have changed."""
        self._kept.clear()
        self._begun.clear()
        with self._preparing:
            self._prepared.clear()

    # --- ahead of need --------------------------------------------------------------------

    def begin(self, looks: Sequence[Look]) -> None:
        """Start on what will be asked for, beside the model's work, where that can gain (see
        :class:`~vpt_agent.engine.early.Early`). What is kept or on its way is not begun again."""
        if not self.early.works:
            return
        for look in looks:
            source = self._source(look.encoder)
            if source == "base":
                continue  # the first look has it
            for view in look.views:
                key = self.key(source, view)
                if key in self._kept or key in self._begun:
                    continue
                if len(self._begun) >= MOST:
                    self._gather()
                if len(self._begun) >= MOST:
                    return
                self._begun[key] = self.early.begin(partial(self._alone, source, view))

    def _alone(self, source: str, view: View) -> _Entry:
        return self._compute(source, [view])[0]

    def _gather(self) -> None:
        """Keep what was begun for calls that never came, and is done."""
        for key in [key for key, begun in self._begun.items() if begun.ready]:
            done = self.early.take(self._begun.pop(key))
            if done is not None:
                self.encoder_calls += 1
                self._kept[key] = _here(done.found)

    def prepare(self, view: View) -> None:
        """Resize ``view`` for the base tower ahead of need, on any thread. At most
        :data:`PREPARED` pictures wait; one that nobody asked for goes after :data:`STALE`."""
        key = self.key("base", view)
        if getattr(self.model, "look", None) is not None or key in self._kept:
            return  # it reads pictures itself, or knows this one
        with self._preparing:
            for other, (_, made) in list(self._prepared.items()):
                if time.monotonic() - made > STALE:
                    del self._prepared[other]
            if key in self._prepared or len(self._prepared) >= PREPARED:
                return
        try:
            patches = look_at([view], self.policy)
        except UserError:
            return  # said to the run that shows it, when it does
        with self._preparing:
            self._prepared[key] = patches, time.monotonic()

    def _patches(self, views: Sequence[View], kind: PerceptionKind | None) -> Patches:
        if kind is not None:
            return look_at(views, self.policy.at_input(kind.input_size))
        with self._preparing:
            ready = [self._prepared.pop(self.key("base", view), None) for view in views]
        parts = [
            look_at([view], self.policy) if made is None else made[0]
            for made, view in zip(ready, views, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        return Patches(
            torch.cat([p.pixel_values for p in parts]),
            torch.cat([p.grid_thw for p in parts]),
            tuple(n for p in parts for n in p.visual_tokens),
            tuple(dict.fromkeys(name for p in parts for name in p.kernels)),
        )

    # --- when it is needed ----------------------------------------------------------------

    def key(self, encoder: str, view: View) -> str:
        """What decides the features: encoder, policy, how the view is resized, and the pixels."""
        how = "crop" if view.parent is not None else "whole"
        return f"{encoder}:{self.policy.kind}:{how}:{view.sha256}"

    def look_all(self, looks: Sequence[Look]) -> list[list[Looked]]:
        """Answers in the order asked; each distinct (encoder, picture) is computed once."""
        missing: dict[str, dict[str, View]] = {}
        ahead = self._arrived(looks)
        for look in looks:
            source = self._source(look.encoder)
            for view in look.views:
                key = self.key(source, view)
                if key not in self._kept and key not in ahead:
                    missing.setdefault(source, {})[key] = view
        # Held here too, so that a small capacity cannot evict what this call still needs.
        at_hand = self._kept | {key: _here(done.found) for key, done in ahead.items()}
        seconds = {key: done.seconds for key, done in ahead.items()}
        for source, views in missing.items():
            began = time.perf_counter()
            for key, entry in zip(views, self._fitting(source, list(views.values())), strict=True):
                at_hand[key] = entry
            for key in views:
                seconds[key] = (time.perf_counter() - began) / len(views)
        fresh = {key for views in missing.values() for key in views} | set(ahead)
        self.encoder_calls += len(fresh)
        answers = [
            [_told(self._answer(look, v, at_hand, fresh, seconds), ahead) for v in look.views]
            for look in looks
        ]
        for key, entry in at_hand.items():
            self._kept[key] = entry
            self._kept.move_to_end(key)
        while len(self._kept) > self.capacity:
            self._kept.popitem(last=False)
        return answers

    def _arrived(self, looks: Sequence[Look]) -> dict[str, Done[_Entry]]:
        """What of ``looks`` was begun before; waits for it."""
        found: dict[str, Done[_Entry]] = {}
        if not self._begun:
            return found
        for look in looks:
            for view in look.views:
                begun = self._begun.pop(key := self.key(self._source(look.encoder), view), None)
                done = None if begun is None else self.early.take(begun)
                if done is not None:
                    found[key] = done
        return found

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
            patches = self._patches(views, kind)
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


def _here(entry: _Entry) -> _Entry:
    """``entry`` for the current stream, if another one made it."""
    if entry.tokens.device.type == "cuda":
        entry.tokens.record_stream(torch.cuda.current_stream(entry.tokens.device))
    return entry


def _told(answer: Looked, ahead: Mapping[str, Done[_Entry]]) -> Looked:
    """``answer``, and how early it was begun."""
    done = None if answer.reused else ahead.get(answer.key)
    return answer if done is None else replace(answer, early=done.early, hidden=done.hidden)


def _own(tokens: Tensor) -> Tensor:
    """``tokens`` without the rest of its batch, which a view of it would keep in memory."""
    alone = tokens.untyped_storage().nbytes() == tokens.numel() * tokens.element_size()
    return tokens if alone else tokens.clone()
