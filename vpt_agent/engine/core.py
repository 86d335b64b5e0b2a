"""The engine: one model, one KV pool, one loop that runs many sessions together.

Runs are generators (state machines) that yield what they need: :class:`Feed` (compute tokens) or
:class:`Look` (encode pictures). The loop collects what all runs ask for, groups it, computes each
group in one batch, and sends the answers back. Rows at different stages share a forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vpt_agent.engine.cache import KVShape, PooledCache
from vpt_agent.engine.features import FeatureStore
from vpt_agent.engine.parts import Fed, Feed, Look, Looked, Wait
from vpt_agent.engine.session import Session
from vpt_agent.errors import UserError
from vpt_agent.model.deepstack import put, widened
from vpt_agent.tokens.table import ResolvedKind, ResolvedTable
from vpt_agent.vision.policy import ImagePolicy

T = TypeVar("T")
Run = Generator[Any, Any, T]
"""A run yields a Feed, a list of Look, or a Wait; it receives a Fed, list[list[Looked]] or a
list of tool results."""


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
class _Live:
    """A run in progress: what it waits for, or what it returned."""

    run: Run[Any]
    want: Any = None
    result: Any = None
    finished: bool = False


@dataclass
class Counters:
    """What the engine did, for tests and reports. ``padded_tokens`` includes ragged padding."""

    forwards: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    rows_per_forward: list[int] = field(default_factory=list)


class Engine:
    """Owns the model while it runs. ``policy`` says how pictures become patches.

    ``max_cached_tokens`` bounds the KV pool (rows x slots); None leaves it to memory.
    ``max_positions`` is the longest sequence the model was made for.
    """

    def __init__(
        self,
        model: LanguageModel,
        policy: ImagePolicy,
        *,
        max_cached_tokens: int | None = None,
        max_positions: int = 32768,
        feature_cache: int = 64,
    ) -> None:
        self.model = model
        self.policy = policy
        self.table = model.table
        self.controls = model.table.controls
        self.control_ids = model.table.control_ids
        self.max_positions = max_positions
        self.cache = PooledCache(kv_shape(model), max_tokens=max_cached_tokens)
        self.device = self.cache.shape.device
        self.features = FeatureStore(model, policy, self.device, capacity=feature_cache)
        self.counters = Counters()
        self.lock = threading.RLock()  # tools on threads may ask for features meanwhile

    def kind_of(self, name: str) -> ResolvedKind:
        """The row of a kind."""
        return self.table[name]

    def session(self) -> Session:
        """A new, empty session."""
        with self.lock:
            return Session(self, self.cache.allocate())

    # --- the loop -------------------------------------------------------------------------

    def drive(self, runs: Sequence[Run[T]]) -> list[T]:
        """Run all to their ends, together; their results in order."""
        live = [_Live(run) for run in runs]
        for _ in self._steps(live):
            pass
        return [entry.result for entry in live]

    def steps(self, runs: Sequence[Run[T]]) -> Generator[None, None, None]:
        """As :meth:`drive`, giving control back after every step."""
        return self._steps([_Live(run) for run in runs])

    def _steps(self, live: list[_Live]) -> Generator[None, None, None]:
        try:
            for entry in live:
                self._advance(entry, None)
            while waiting := [entry for entry in live if not entry.finished]:
                self._step(waiting)
                yield
        finally:
            for entry in live:
                entry.run.close()

    def _step(self, waiting: list[_Live]) -> None:
        """Answer one kind of wish: tools that are ready, then pictures, then tokens."""
        if self._collect_tools(waiting):
            return
        looking = [e for e in waiting if isinstance(e.want, list)]
        if looking:
            # One batch per encoder over all runs; then each run goes on to its next wish.
            self._look_together(looking)
            return
        for group in _groups([e for e in waiting if isinstance(e.want, Feed)]):
            try:
                with self.lock, torch.inference_mode():
                    fed = self._forward([e.want for e in group])
            except UserError as error:  # too long, or no room in the cache
                self._without_culprits(group, error)
                continue
            for entry, answer in zip(group, fed, strict=True):
                self._advance(entry, answer)

    def _look_together(self, looking: list[_Live]) -> None:
        """Features for all of ``looking`` in one batch; a picture that cannot be encoded is the
        trouble of the run that showed it."""
        try:
            with self.lock, torch.inference_mode():
                answers = iter(self.features.look_all([w for e in looking for w in e.want]))
        except UserError as error:
            if len(looking) == 1:
                self._throw(looking[0], error)
                return
            for entry in looking:
                self._look_together([entry])
            return
        for entry in looking:
            self._advance(entry, [next(answers) for _ in entry.want])

    def _without_culprits(self, group: list[_Live], error: UserError) -> None:
        """One row's trouble is its own: run the rows of a refused batch one by one."""
        if len(group) == 1:
            self._throw(group[0], error)
            return
        for entry in group:
            try:
                with self.lock, torch.inference_mode():
                    answer = self._forward([entry.want])[0]
            except UserError as own:
                self._throw(entry, own)
            else:
                self._advance(entry, answer)

    def _collect_tools(self, waiting: list[_Live]) -> bool:
        """Advance the runs whose tools are done; block only if every run waits for tools."""
        on_tools = [e for e in waiting if isinstance(e.want, Wait)]
        if not on_tools:
            return False
        for entry in on_tools:
            entry.want.start()
        running = [f for e in on_tools for f in e.want.futures if not f.done()]
        if len(on_tools) == len(waiting) and not any(_ready(e) for e in on_tools):
            wait(running, return_when=FIRST_COMPLETED)
        ready = [e for e in on_tools if _ready(e)]
        for entry in ready:
            broken = next((e for f in entry.want.futures if (e := f.exception())), None)
            if broken is not None:  # the user's or our fault: that run's, not everybody's
                self._throw(entry, broken)
            else:
                self._advance(entry, [f.result() for f in entry.want.futures])
        return bool(ready) or len(on_tools) == len(waiting)

    @staticmethod
    def _advance(entry: _Live, answer: Any) -> None:
        try:
            with torch.inference_mode():
                entry.want = entry.run.send(answer)
        except StopIteration as stop:
            entry.result, entry.finished = stop.value, True

    @staticmethod
    def _throw(entry: _Live, error: BaseException) -> None:
        try:
            entry.want = entry.run.throw(error)
        except StopIteration as stop:
            entry.result, entry.finished = stop.value, True

    # --- one forward ----------------------------------------------------------------------

    def _forward(self, feeds: Sequence[Feed]) -> list[Fed]:
        sessions = [f.session for f in feeds]
        counts = [len(f.block.ids) for f in feeds]
        rows = [s.row for s in sessions]
        for session, n in zip(sessions, counts, strict=True):
            session.check_open()
            if len(session) + n > self.max_positions:
                raise UserError(
                    "the conversation is longer than the model can hold",
                    got=f"{len(session) + n} tokens",
                    expected=f"at most {self.max_positions}",
                    fix="ask a shorter question, give fewer or smaller pictures, "
                    "or start a new conversation",
                )
        width = max(counts)
        embeds, positions = self._inputs(feeds, counts, width)
        mask = self.cache.begin(rows, counts)
        hidden = self.model.run_language_model(embeds, positions, mask, self.cache)  # [B, L, D]
        self.cache.commit(rows, counts)
        self.counters.forwards += 1
        self.counters.tokens += sum(counts)
        self.counters.padded_tokens += width * len(feeds)
        self.counters.rows_per_forward.append(len(feeds))
        states = [hidden[b, :n] for b, n in enumerate(counts)]
        for feed, state in zip(feeds, states, strict=True):
            feed.session.advance(feed.block, state)
        return self._with_logits(feeds, states)

    def _inputs(
        self, feeds: Sequence[Feed], counts: Sequence[int], width: int
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, L, D] with visual tokens in place, positions [3, B, L].

        Wider, where a picture has features for deeper layers (``model.deepstack``).
        """
        ids = torch.zeros(len(feeds), width, dtype=torch.long)
        positions = torch.zeros(3, len(feeds), width, dtype=torch.long)
        index: list[Tensor] = []
        features: list[Tensor] = []
        for b, feed in enumerate(feeds):
            ids[b, : counts[b]] = torch.tensor(feed.block.ids)
            positions[:, b, : counts[b]] = feed.block.positions
            for offset, tokens in feed.block.visual:
                index.append(torch.arange(tokens.shape[0]) + b * width + offset)
                features.append(tokens)
        embeds = self.model.get_input_embeddings()(ids.to(self.device))  # [B, L, D]
        if features:
            wide = max(f.shape[-1] for f in features)
            embeds = put(
                embeds,
                torch.cat([widened(f.to(embeds), wide) for f in features]),
                torch.cat(index).to(self.device),
            )
        return embeds, positions.to(self.device)

    def _with_logits(self, feeds: Sequence[Feed], states: Sequence[Tensor]) -> list[Fed]:
        """One product with the output head for every position that asked for logits."""
        wanted = [
            state if f.logits == "all" else state[-1:] if f.logits == "last" else state[:0]
            for f, state in zip(feeds, states, strict=True)
        ]
        stacked = torch.cat(wanted)
        if not stacked.shape[0]:
            return [Fed(state, None) for state in states]
        logits = self.model.compute_logits(stacked).float()
        parts = logits.split([w.shape[0] for w in wanted])
        return [
            Fed(state, part if part.shape[0] else None)
            for state, part in zip(states, parts, strict=True)
        ]

    def look(self, encoder: str, views: Sequence[Any]) -> list[Looked]:
        """Encode pictures outside a run (tools, tests)."""
        with self.lock, torch.inference_mode():
            return self.features.look_all([Look(encoder, tuple(views))])[0]


def _ready(entry: _Live) -> bool:
    """Whether all tools that a run waits for are done."""
    return all(f.done() for f in entry.want.futures)


def _groups(waiting: Sequence[_Live]) -> list[list[_Live]]:
    """Rows to run together: alike in length, since a ragged batch is padded to its longest.

    Decoding rows (a few tokens) go in one batch; long blocks go together while padding stays
    under a quarter.
    """
    ordered = sorted(waiting, key=lambda e: len(e.want.block.ids))
    groups: list[list[_Live]] = []
    for entry in ordered:
        n = len(entry.want.block.ids)
        if groups and (n <= 4 or n <= 1.33 * len(groups[-1][0].want.block.ids)):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return [sorted(g, key=lambda e: e.want.session.row) for g in groups]


def kv_shape(model: LanguageModel) -> KVShape:
    """What one cached token of ``model`` is made of, read from its text config."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return KVShape(
        text.num_hidden_layers, text.num_key_value_heads, head_dim, model.dtype, model.device
    )
