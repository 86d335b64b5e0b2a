"""Rows to batches for ``VPTForConditionalGeneration.forward``.

A row becomes an :class:`Item` (ids, labels, its pictures as they are), whose length is known
before any picture is resized; items become a batch. B rows, L tokens, P patches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vpt_agent.data import IGNORED, Dropped, Encoded, Row, RowEncoder, RowError, row_views
from vpt_agent.errors import UserError
from vpt_agent.model.positions import rope_positions
from vpt_agent.tokens.table import END_OF_TEXT
from vpt_agent.types import View
from vpt_agent.vision.encoders import encoder_pixels
from vpt_agent.vision.patches import Patches, look

MULTIPLE = 8
"""Batches are padded on the right to a multiple of this, as published."""

Batch = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """A row ready to be batched; ``views`` are its pictures by id, decoded once; ``keys``
    name them (path and crop)."""

    where: str
    encoded: Encoded
    views: Mapping[str, View]
    keys: Mapping[str, str]

    def __len__(self) -> int:
        """The row's length in tokens."""
        return len(self.encoded.labels)

    @property
    def kinds(self) -> frozenset[str]:
        """Names of the perception kinds that the row teaches: their calls are the model's own, or
        their features are shown."""
        return frozenset(
            span.kind
            for span in self.encoded.record.spans
            if span.kind is not None and span.source in ("sampled", "visual")
        )


class Collator:
    """Rows to items and items to batches, for one model.

    ``encoder`` spells rows and says how long they may be; ``positions`` as in the model's config;
    ``folder`` is where relative picture paths begin, ``bad_rows`` what happens to rows that cannot
    be used. ``counts`` adds up what became of them.
    """

    def __init__(
        self,
        encoder: RowEncoder,
        *,
        positions: Literal["mrope", "published"] = "mrope",
        bad_rows: Literal["error", "skip"] = "error",
    ) -> None:
        self.encoder, self.positions, self.bad_rows = encoder, positions, bad_rows
        self.policy = encoder.policy
        self.table = encoder.layout.table
        pad = encoder.layout.tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        if pad is None:
            raise UserError("the tokenizer lacks the padding token", got=END_OF_TEXT)
        self.pad = pad
        self.counts: Counter[str] = Counter()

    # --- one row ------------------------------------------------------------------------------

    def item(self, row: Row | RowError, folder: Path | str | None = None) -> Item | None:
        """The row with its pictures opened, or None where it is dropped (``counts`` says why).

        Dropped are rows that would be cut inside a call or a run of visual tokens, and rows without
        a label. A row that cannot be used (too few pictures, a kind the model has not, a missing
        file; or an error where a row should be) is a :class:`UserError`, or counted as ``skipped``.
        """
        self.counts["rows"] += 1
        try:
            if isinstance(row, RowError):
                raise row
            views = row_views(row, folder=folder)
            encoded = self.encoder.encode(row, views)
        except UserError:
            if self.bad_rows == "error":
                raise
            self.counts["skipped"] += 1
            return None
        by_id = {v.id: v for group in views.values() for v in group}
        reason = self._unfit(encoded, by_id)
        if reason is not None:
            self.counts[f"dropped: {reason}"] += 1
            return None
        assert isinstance(encoded, Encoded)
        self.counts["shortened"] += encoded.cut > 0
        keys = {
            view.id: f"{folder}/{ref.path}_{ref.crop}"
            for tag, group in views.items()
            for view, ref in zip(group, row.pictures[tag], strict=True)
        }
        return Item(row.where, encoded, by_id, keys)

    def _unfit(self, encoded: Encoded | Dropped, views: Mapping[str, View]) -> str | None:
        if isinstance(encoded, Dropped):
            return encoded.reason
        if all(label == IGNORED for label in encoded.labels[1:]):
            return "no label"
        for span in encoded.record.spans:
            # Published truncation cuts there, too; the release then shifts later rows' features.
            if span.source == "visual" and len(span.ids) != self._visual(
                span.kind, span.view, views
            ):
                return "picture"
        return None

    def _visual(self, kind: str | None, view: str | None, views: Mapping[str, View]) -> int:
        fixed = self.table[kind].visual_tokens if kind else None
        if fixed is not None:
            return fixed
        shown = views[view or ""]
        policy = self.policy.at_input(self.table[kind].input_size if kind else None)
        return policy.plan(shown.size, crop=shown.parent is not None).visual_tokens

    # --- one batch ----------------------------------------------------------------------------

    def batch(self, items: Sequence[Item]) -> Batch:
        """Arguments of ``forward`` for ``items``, and ``rows``: what they are called.

        ``input_ids``, ``attention_mask``, ``labels`` [B, L] int64, padded on the right (L a
        multiple of 8); ``position_ids`` [3, B, L] where the model's positions are M-RoPE;
        ``pixel_values`` [P, 1176] and ``image_grid_thw`` [N, 3] of the base tower;
        ``perception_inputs`` and ``picture_keys`` by kind. Each picture is resized once for a
        tower and row.
        """
        length = -(-max(len(item) for item in items) // MULTIPLE) * MULTIPLE
        shape = (len(items), length)
        ids = torch.full(shape, self.pad)
        labels = torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        positions = torch.zeros(3, *shape, dtype=torch.int64)
        base: list[Patches] = []
        again: dict[str, list[Any]] = {}
        keys: dict[str, list[str]] = {}
        for i, item in enumerate(items):
            n = len(item)
            ids[i, :n] = torch.tensor(item.encoded.record.ids)
            labels[i, :n] = torch.tensor(item.encoded.labels)
            mask[i, :n] = 1
            shown = self._pictures(item, again, keys)
            base += shown
            if self.positions == "mrope":
                positions[:, i, :n] = self._positions(ids[i, :n], shown)
        made: Batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.positions == "mrope":
            made["position_ids"] = positions
        if base:
            made["pixel_values"], made["image_grid_thw"] = _joined(base)
        made["perception_inputs"] = {
            kind: self._inputs(kind, values) for kind, values in again.items()
        }
        made["picture_keys"] = keys
        made["rows"] = [item.where for item in items]
        return made

    def _pictures(
        self, item: Item, again: dict[str, list[Any]], keys: dict[str, list[str]]
    ) -> list[Patches]:
        """Patches of the row's base pictures in order; its re-encoded ones go to ``again``."""
        known: dict[tuple[str, int | None], Patches] = {}
        base: list[Patches] = []

        def patches(view: View, size: int | None = None) -> Patches:
            if (view.id, size) not in known:
                known[view.id, size] = look([view], self.policy.at_input(size))
            return known[view.id, size]

        for span in item.encoded.record.spans:
            if span.source != "visual":
                continue
            view = item.views[span.view or ""]
            key, kind = item.keys[view.id], self.table[span.kind] if span.kind else None
            size = kind.input_size if kind is not None and kind.encoder == "base" else None
            keys.setdefault(span.kind or "image", []).append(
                key if size is None else f"{key}@{size}"
            )
            if span.kind is None:
                base.append(patches(view))
            elif self.table[span.kind].encoder == "base":
                again.setdefault(span.kind, []).append(patches(view, size))
            else:
                pixels = encoder_pixels(self.table[span.kind], view, self.policy)
                again.setdefault(span.kind, []).append(pixels)
        return base

    def _inputs(self, kind: str, values: list[Any]) -> dict[str, Tensor]:
        if self.table[kind].encoder == "base":
            pixel_values, grids = _joined(values)
            return {"pixel_values": pixel_values, "grid_thw": grids}
        return {"pixels": torch.stack(values)}

    def _positions(self, ids: Tensor, shown: Sequence[Patches]) -> Tensor:
        pad = self.encoder.layout.image_pad
        grids = [(int(t), int(h), int(w)) for p in shown for t, h, w in p.grid_thw.tolist()]
        return rope_positions(ids, grids, pad, merge=self.policy.merge)


def _joined(patches: Sequence[Patches]) -> tuple[Tensor, Tensor]:
    return (
        torch.cat([p.pixel_values for p in patches]),
        torch.cat([p.grid_thw for p in patches]),
    )


def plan_batches(
    lengths: Sequence[int], *, rows: int, tokens: int | None = None
) -> list[list[int]]:
    """Groups of numbers of ``lengths`` that share a batch: like lengths together.

    At most ``rows`` in each; or, with ``tokens``, as many as fit that many tokens with padding.
    A row longer than ``tokens`` has a batch of its own.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        padded = -(-lengths[i] // MULTIPLE) * MULTIPLE
        room = rows if tokens is None else max(1, tokens // padded)
        if groups and len(groups[-1]) < room:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
