"""The published procedure, written plainly: what answers are measured against.

Two complete generations, one a round. Each encodes all its pictures, runs the language model twice
over the whole prompt and twice for every token, copies the whole cache before each pass, and
computes logits at every position of the prompt. FACTS sections 4 and 6; the modules are the
measured model's own. One row, greedy; equal to the release's generations token by token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from vpt_agent.bench.clock import Clock
from vpt_agent.errors import UserError

if TYPE_CHECKING:
    from vpt_agent.model import VPTForConditionalGeneration


@dataclass(frozen=True)
class Prompt:
    """One row. ``ids`` with all placeholders in place; ``pixel_values`` [P, C] and ``grids`` [N, 3]
    of the base tower's pictures; ``looks``: inputs of the re-encoding kinds' encoders, by kind."""

    ids: Sequence[int]
    pixel_values: Tensor | None = None
    grids: Tensor | None = None
    looks: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass
class Generated:
    """What came out: ``ids``, the logits [vocab] that chose each, and how long each pass was:
    (new tokens, tokens in the cache) of every call of the language model."""

    ids: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    forwards: list[tuple[int, int]] = field(default_factory=list)


class PublishedProcedure:
    """Generates as published. ``kind`` is the one that may be called, if the model has several.
    ``copies`` False leaves the copies of the cache out (one remains,
    without which two passes over the same tokens are not possible)."""

    def __init__(
        self,
        model: VPTForConditionalGeneration,
        *,
        kind: str | None = None,
        copies: bool = True,
        clock: Clock | None = None,
    ) -> None:
        self.model, self.copies, self.clock = model, copies, clock
        rows = [row for row in model.table.rows if row.control is not None]
        self.controls = {row.control: row for row in rows if row.control is not None}
        # A released model has one kind with control tokens; of a model with several, one is named.
        named = [row for row in rows if kind in (None, row.name)]
        self.only = named[0] if len(named) == 1 else None

    def timed(self, name: str) -> AbstractContextManager[None]:
        """Inside, time counts to ``name``."""
        return nullcontext() if self.clock is None else self.clock.measure(name)

    @torch.inference_mode()
    def generate(
        self,
        prompt: Prompt,
        new_tokens: int,
        *,
        forced: Mapping[int, int] | None = None,
        stop: frozenset[int] = frozenset(),
        banned: Sequence[int] = (),
    ) -> Generated:
        """Greedy ids behind ``prompt``; ``forced`` ids by step, ``banned`` ones never chosen.

        Ends behind the first id in ``stop``, which is kept.
        """
        row = _Row(self, prompt)
        done = row.done
        logits = row.prefill()
        for step in range(new_tokens):
            done.logits.append(logits)
            if banned:
                logits = logits.index_fill(
                    0, torch.tensor(banned, device=logits.device), -torch.inf
                )
            row.say((forced or {}).get(step, int(logits.argmax())))
            if done.ids[-1] in stop or step + 1 == new_tokens:
                break
            logits = row.step()
        return done


class _Row:
    """One generation under way. L prompt tokens, D width."""

    def __init__(self, owner: PublishedProcedure, prompt: Prompt) -> None:
        self.owner, self.model, self.prompt = owner, owner.model, prompt
        self.done = Generated()
        self.cache = DynamicCache()
        self.device = self.model.device
        self.next_position = 0
        self.length = 0  # tokens in the cache

    def say(self, token: int) -> None:
        """Take ``token``, overwritten by the control token behind a start token."""
        only, ids = self.owner.only, self.done.ids
        if only is not None and only.control is not None and ids and ids[-1] == only.start:
            token = only.control
        ids.append(token)

    def prefill(self) -> Tensor:
        """Logits [vocab] behind the prompt."""
        ids = torch.tensor([self.prompt.ids], device=self.device)  # [1, L]
        grids: Any = [] if self.prompt.grids is None else self.prompt.grids
        positions = self.model.rope_positions(ids[0].cpu(), grids)[:, None].to(self.device)
        with self.owner.timed("vision"):
            pictures = self._pictures()
            features = self._features()
        with self.owner.timed("prefill"):
            embeds = self.model.get_input_embeddings()(ids)
            if pictures is not None:
                embeds = _put(embeds, ids == self.model.config.image_token_id, pictures)
            first = embeds
            for name, found in features.items():
                first = _put(first, ids == self.model.table[name].placeholder, torch.cat(found))
            hidden = self._pass(first, positions, self._copied())
            second = self._conditioned(embeds, ids, hidden, features)
            cache = self._copied()
            hidden = self._pass(second, positions, cache)
            self.cache, self.length = cache, ids.shape[1]
            self.next_position = int(positions.max()) + 1
            return self.model.compute_logits(hidden)[0, -1]  # of all positions, as published

    def step(self) -> Tensor:
        """Logits [vocab] behind the last token; behind a control token two tokens are fed."""
        ids, only = self.done.ids, self.owner.only
        both = only is not None and ids[-1] == only.control and len(ids) > 1
        with self.owner.timed("decode"):
            if both:
                self.cache.crop(-1)
                self.length -= 1
                self.next_position -= 1
            fed = torch.tensor([ids[-2:] if both else ids[-1:]], device=self.device)
            count = fed.shape[1]
            positions = torch.arange(count, device=self.device) + self.next_position
            positions = positions.expand(3, 1, count)
            embeds = self.model.get_input_embeddings()(fed)
            hidden = self._pass(embeds, positions, self._copied())
            second = self._conditioned(embeds, fed, hidden, {})
            cache = self._copied()
            hidden = self._pass(second, positions, cache)
            self.cache = cache
            self.length += count
            self.next_position += count
            return self.model.compute_logits(hidden)[0, -1]

    def _copied(self) -> DynamicCache:
        if self.owner.copies:
            with self.owner.timed("copies"):
                return copy.deepcopy(self.cache)
        left = self.cache.get_seq_length() - self.length
        if left > 0:  # by the first pass
            self.cache.crop(-left)
        return self.cache

    def _pass(self, embeds: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        count = embeds.shape[1]
        self.done.forwards.append((count, self.length))
        mask = None
        if self.length and count > 1:
            slots = torch.arange(self.length + count, device=self.device)
            mask = slots <= torch.arange(count, device=self.device)[:, None] + self.length
            mask = mask[None, None]
        return self.model.run_language_model(embeds, positions, mask, cache)

    def _pictures(self) -> Tensor | None:
        p = self.prompt
        if p.pixel_values is None or p.grids is None:
            return None
        found = self.model.encode_images(p.pixel_values.to(self.device), p.grids.to(self.device))
        return torch.cat(found)

    def _features(self) -> dict[str, tuple[Tensor, ...]]:
        return {
            name: self.model.encode(name, **{k: v.to(self.device) for k, v in inputs.items()})
            for name, inputs in self.prompt.looks.items()
        }

    def _conditioned(
        self,
        embeds: Tensor,
        ids: Tensor,
        hidden: Tensor,
        features: Mapping[str, Sequence[Tensor]],
    ) -> Tensor:
        """The embeddings of the second pass: control states at their tokens, features conditioned.

        A control state is the first pass's ``hidden`` [1, n, D] in front of its token.
        """
        for token, row in self.owner.controls.items():
            places = ids[0].eq(token).nonzero().flatten()
            if not len(places):
                continue
            if int(places[0]) == 0:
                # The release fails here as well where a call has two control tokens in a row.
                raise UserError(
                    "the published procedure cannot compute this: a control token has no token "
                    "before it",
                    where="PublishedProcedure",
                    fix="measure a model whose calls have one control token",
                )
            states = hidden[0, places - 1]  # [n, D]
            found = features.get(row.name, ())
            if found:
                k = self.model.table.controls
                ready = self.model.condition_many(row.name, found, states.view(len(found), k, -1))
                embeds = _put(embeds, ids == row.placeholder, ready)
            embeds = embeds.index_copy(1, places, states[None].to(embeds.dtype))
        return embeds


def _put(embeds: Tensor, mask: Tensor, features: Tensor) -> Tensor:
    """``embeds`` [1, n, D] with ``features`` [m, D] where ``mask`` [1, n] is true."""
    return embeds.masked_scatter(mask[..., None], features.to(embeds.dtype))
