"""The engine: one model, one KV cache, one loop that runs many sessions together.

Runs are generators (state machines) that yield what they need: :class:`Feed` (compute tokens) or
:class:`Look` (encode pictures). The loop (:mod:`vpt_agent.engine.scheduler`) collects what all runs
ask for, a plan (:mod:`vpt_agent.engine.plan`) says what of it is computed now, and the engine
computes it in few batches. Rows at different stages share a forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vpt_agent.engine.ahead import Decoding, make_ahead
from vpt_agent.engine.alone import alone
from vpt_agent.engine.cache import KVShape, PooledCache
from vpt_agent.engine.features import FeatureStore
from vpt_agent.engine.live import Live, Run, T
from vpt_agent.engine.parts import Block, Fed, Look, Looked
from vpt_agent.engine.plan import FEW, Measures, Piece, Planner
from vpt_agent.engine.scheduler import Outcome, Scheduler
from vpt_agent.engine.session import Session
from vpt_agent.errors import UserError
from vpt_agent.kernels import Stretch
from vpt_agent.model.deepstack import put_at, widened
from vpt_agent.tokens.table import ResolvedKind, ResolvedTable
from vpt_agent.vision.policy import ImagePolicy


class LanguageModel(Protocol):
    """What the engine needs of a model. Shapes: B rows, L new tokens, S cache slots, D width."""

    @property
    def table(self) -> ResolvedTable:
        """The kinds with their ids."""

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        """The embedding: ids [B, L] to [B, L, D]."""

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        """Patches [P, 1176] and grids [N, 3] to N blocks of visual tokens [V, D]."""

    def encode(self, kind: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Features f [V, D] of each picture for ``kind``."""

    def features_from_base(self, kind: str, tower_tokens: Tensor) -> Tensor:
        """``kind``'s features from the base tower's visual tokens [V, D]."""

    def condition(self, kind: str, features: Tensor, control: Tensor) -> Tensor:
        """Features [V, D] conditioned with control states [k, D]."""

    def run_language_model(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Final-norm hidden states [B, L, D]; the cache is written in place."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of hidden states [..., D]."""

    @property
    def config(self) -> Any:
        """A config with ``get_text_config()``: layers, heads, widths."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    @property
    def device(self) -> torch.device:
        """Where it lies."""


@dataclass
class Counters:
    """What the engine did, for tests and reports. ``padded_tokens`` includes ragged padding;
    ``shared_tokens`` were not computed, since another row had them; ``repeated_tokens`` were
    computed again, since their blocks had gone to others. ``host_reads`` counts how often decoding
    waited for a token, or several, to come from the device."""

    forwards: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    shared_tokens: int = 0
    repeated_tokens: int = 0
    host_reads: int = 0
    rows_per_forward: list[int] = field(default_factory=list)


class Engine:
    """Owns the model while it runs. ``policy`` says how pictures become patches.

    ``max_cached_tokens`` bounds the KV cache, in blocks of ``block`` tokens; None leaves it to
    memory. ``max_positions`` is the longest sequence the model was made for. At most ``max_runs``
    runs go on at once, others wait. ``measures`` say how much of prompts goes into one step.
    ``decoding`` says who chooses tokens (docs/gpu-decode.md): ``device``, several before the host
    looks, or ``host``; ``auto`` is the device on CUDA.
    """

    def __init__(
        self,
        model: LanguageModel,
        policy: ImagePolicy,
        *,
        max_cached_tokens: int | None = None,
        max_positions: int = 32768,
        max_runs: int = 64,
        measures: Measures = Measures(),  # noqa: B008 - frozen
        block: int = 16,
        feature_cache: int = 64,
        decoding: Decoding = "auto",
    ) -> None:
        self.model = model
        self.policy = policy
        self.table = model.table
        self.controls = model.table.controls
        self.control_ids = model.table.control_ids
        self.max_positions = max_positions
        self.measures = measures
        self.cache = PooledCache(kv_shape(model), max_tokens=max_cached_tokens, block=block)
        self.device = self.cache.shape.device
        self.features = FeatureStore(model, policy, self.device, capacity=feature_cache)
        self.counters = Counters()
        self.lock = threading.RLock()  # tools on threads may ask for features meanwhile
        self.ahead = make_ahead(self, decoding)  # None: the host chooses every token
        self.loop = Scheduler(self, most=max_runs, patience=measures.patience)
        self._sessions: WeakValueDictionary[int, Session] = WeakValueDictionary()  # by row

    def kind_of(self, name: str) -> ResolvedKind:
        """The row of a kind."""
        return self.table[name]

    def session(self) -> Session:
        """A new, empty session."""
        with self.lock:
            session = Session(self, self.cache.allocate())
            self._sessions[session.row] = session
            return session

    # --- the loop -------------------------------------------------------------------------

    def drive(self, runs: Sequence[Run[T]]) -> list[T]:
        """Run all to their ends, together and with what other threads run; their results in
        order."""
        return self.loop.drive(runs)

    def steps(self, runs: Sequence[Run[T]]) -> Generator[None, None, None]:
        """As :meth:`drive`, giving control back after every step."""
        return self.loop.steps(runs)

    def submit(self, run: Run[T]) -> Future[T]:
        """Run it in the background, in the same batches as all others. Cancelling the future stops
        it."""
        return self.loop.submit(run)

    def look_all(self, looks: Sequence[Look]) -> list[list[Looked]]:
        """Features of pictures, one batch an encoder."""
        with self.lock, torch.inference_mode():
            return self.features.look_all(looks)

    def foresee(self, looks: Sequence[Look]) -> None:
        """Begin features that will be asked for, beside the model's work, where that can gain."""
        with self.lock, torch.inference_mode():
            self.features.begin(looks)

    def step(self, feeding: Sequence[Live], everyone: Sequence[Live]) -> list[Outcome]:
        """Compute what fits into one step of what ``feeding`` ask for (see
        :class:`~vpt_agent.engine.plan.Planner`); the answer of each feed that is complete, or why
        it cannot be."""
        with self.lock, torch.inference_mode():
            fed = alone(self, feeding)
            if fed is not None:
                return [(feeding[0], fed)]
            planner = Planner(
                self.cache,
                self.measures,
                idle=lambda: self._idle(everyone),
                longest=self.max_positions,
            )
            done: list[Outcome] = []
            for pieces in planner.waves(feeding, everyone):
                if self.ahead is not None:
                    answered, pieces = self.ahead.together(pieces)
                    done += answered
                for group in _groups(pieces):
                    done += self._together(group)
            return done + planner.refused

    def _idle(self, everyone: Sequence[Live]) -> list[Session]:
        """Sessions that no run is using, the one that was used longest ago first."""
        used = {live.row() for live in everyone}
        idle = [s for row, s in list(self._sessions.items()) if row not in used and not s.closed]
        return sorted(idle, key=lambda s: s.touched)

    def _together(self, group: list[Piece]) -> list[Outcome]:
        """Compute a group; what goes wrong is the trouble of the row that makes it go wrong."""
        try:
            return self._forward(group)
        except (UserError, torch.OutOfMemoryError) as error:
            trouble = error
        # Outside the handler: the error holds the frames, and so the memory, of what failed.
        if len(group) > 1:
            return [done for piece in group for done in self._together([piece])]
        if isinstance(trouble, torch.OutOfMemoryError):
            trouble = UserError(
                "the device has too little memory for these tokens",
                where="Engine",
                got=f"{len(group[0].block.ids)} tokens at once",
                fix="give fewer or smaller pictures, run fewer questions at once, or lower "
                "max_cached_tokens",
            )
        return [(group[0].entry, trouble)]

    # --- one forward ----------------------------------------------------------------------

    def _forward(self, pieces: Sequence[Piece]) -> list[Outcome]:
        blocks = [p.block for p in pieces]
        counts = [len(b.ids) for b in blocks]
        rows = [p.session.row for p in pieces]
        width = _width(blocks, counts)
        embeds, positions = self._inputs(blocks, counts, width)
        mask = self.cache.begin(rows, counts, width)
        hidden = self.model.run_language_model(embeds, positions, mask, self.cache)  # [B, L, D]
        pairs = list(zip(pieces, counts, strict=True))
        states = [hidden[b, p.outputs : n] for b, (p, n) in enumerate(pairs)]
        logits = self._logits(pieces, states)
        self.cache.commit(rows, counts)
        count = self.counters
        count.forwards += 1
        count.tokens += sum(counts)
        count.padded_tokens += width * len(pieces)
        count.repeated_tokens += sum(min(p.outputs, n) for p, n in pairs)
        count.rows_per_forward.append(len(pieces))
        return [
            (piece.entry, self._taken(piece, state, part))
            for piece, state, part in zip(pieces, states, logits, strict=True)
        ]

    def _taken(self, piece: Piece, state: Tensor, logits: Tensor | None) -> Fed | None:
        """Note what was computed of a feed; the answer, if that was the last of it."""
        entry, session = piece.entry, piece.session
        entry.computed(len(piece.block.ids), state, logits)
        session.touched = self.counters.forwards
        if entry.known is not None:
            self.cache.register(session.row, entry.known)
        if not piece.last:
            return None
        self.counters.shared_tokens += entry.shared
        return entry.fed()

    def _inputs(
        self, blocks: Sequence[Block], counts: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, D] with visual tokens in place, positions [3, B, L].

        Wider, where a picture has features for deeper layers (``model.deepstack``).
        """
        if len(blocks) == 1 and not blocks[0].visual:  # words of one row: nothing to lay out
            words = torch.tensor([blocks[0].ids], device=self.device)
            places = blocks[0].positions[:, None].to(self.device)
            return self.model.get_input_embeddings()(words), places
        if width == 1 and not any(block.visual for block in blocks):  # one word a row
            words = torch.tensor([block.ids for block in blocks], device=self.device)
            places = torch.stack([block.positions for block in blocks], dim=1).to(self.device)
            return self.model.get_input_embeddings()(words), places
        ids = torch.zeros(len(blocks), width, dtype=torch.long)
        positions = torch.zeros(3, len(blocks), width, dtype=torch.long)
        stretches: list[Stretch] = []
        features: list[Tensor] = []
        done = 0
        for b, block in enumerate(blocks):
            ids[b, : counts[b]] = torch.tensor(block.ids)
            positions[:, b, : counts[b]] = block.positions
            for offset, tokens in block.visual:
                stretches.append(Stretch(b, offset, tokens.shape[0], done))
                features.append(tokens)
                done += tokens.shape[0]
        embeds = self.model.get_input_embeddings()(ids.to(self.device))  # [B, L, D]
        if features:
            wide = max(f.shape[-1] for f in features)
            rows = torch.cat([widened(f.to(embeds), wide) for f in features])
            embeds = put_at(embeds, rows, stretches)
        return embeds, positions.to(self.device)

    def _logits(self, pieces: Sequence[Piece], states: Sequence[Tensor]) -> list[Tensor | None]:
        """One product with the output head for every position that asked for logits."""
        wanted = [
            state if p.logits == "all" else state[-1:] if p.logits == "last" else state[:0]
            for p, state in zip(pieces, states, strict=True)
        ]
        stacked = wanted[0] if len(wanted) == 1 else torch.cat(wanted)
        if not stacked.shape[0]:
            return [None] * len(wanted)
        logits = self.model.compute_logits(stacked).float()
        parts = logits.split([w.shape[0] for w in wanted])
        return [part if part.shape[0] else None for part in parts]

    def look(self, encoder: str, views: Sequence[Any]) -> list[Looked]:
        """Encode pictures outside a run (tools, tests)."""
        with self.lock, torch.inference_mode():
            return self.features.look_all([Look(encoder, tuple(views))])[0]


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Rows to run together: alike in length, since a ragged batch is padded to its longest.

    Decoding rows (a few tokens) go in one batch; long blocks go together while padding stays
    under a quarter.
    """
    groups: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: len(p.block.ids)):
        n = len(piece.block.ids)
        if groups and (n <= FEW or n <= 1.33 * len(groups[-1][0].block.ids)):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return [sorted(g, key=lambda p: p.session.row) for g in groups]


def _width(blocks: Sequence[Block], counts: Sequence[int]) -> int:
    """Tokens of a row in one pass. A pass of one token takes it for a word, whose three positions
    are one; one token of a picture (a chunk may end anywhere) goes as two, the second padding."""
    width = max(counts)
    if width == 1 and any(b.visual and len(set(b.positions[:, 0].tolist())) > 1 for b in blocks):
        return 2
    return width


def kv_shape(model: LanguageModel) -> KVShape:
    """What one cached token of ``model`` is made of, read from its text config."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return KVShape(
        text.num_hidden_layers, text.num_key_value_heads, head_dim, model.dtype, model.device
    )
