"""One token of every row, on the device alone: the step that is replayed without asking the host.

All tensors stay where they are and keep their shapes, nothing is read back, and nothing decides by
a value in Python (nor is a Python number made a tensor, as ``torch.where`` does: that is a copy
from the host); so on CUDA the step is recorded once as a graph and replayed. A row that has to
stop stays in the batch: it writes to a slot that nobody reads, and what it says is not kept.

R rows, S cache slots that attention sees at most, V ids, D width, N steps that are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from vpt_agent import kernels  # noqa: F401  # registers vpt::attend
from vpt_agent.engine.device_tables import DEAD, Tables
from vpt_agent.engine.sampling import Draw, draw
from vpt_agent.errors import InternalError
from vpt_agent.model.direct import ExplicitCache

if TYPE_CHECKING:
    from vpt_agent.engine.cache import PooledCache
    from vpt_agent.engine.core import LanguageModel

Mode = Literal["greedy", "sampled", "filtered"]
"""What rows of a batch need at most: the largest logit, a draw, or a draw with top-k or top-p."""

INTS = ("token", "position", "length", "steps", "room", "state", "calls", "stopped", "cursor",
        "top_k", "garbage")  # fmt: skip
"""Whole numbers of each row; blocks of the cache stand behind them."""
FLOATS = ("temperature", "top_p")
"""Numbers of each row; the random ones stand behind them."""
KEPT = 5
"""What is kept of each choice: token (-1: none), forced, logprob, removed, drawn."""


_SIZES = 128
"""Sizes of batches, at most, that one process compiles the step for."""


class SteppedCache(ExplicitCache):
    """The paged cache as a step sees it: each row writes one slot and reads ``S`` of them."""

    one_each = True

    def __init__(self, cache: PooledCache) -> None:
        super().__init__(layers=[])
        self.cache = cache
        self.written: Tensor | None = None  # [R]
        self.seen: Tensor | None = None  # [R, S]
        self.lengths: Tensor | None = None  # [R], the new token included

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new [R, heads, 1, head_dim], give back [R, heads, S, head_dim]."""
        return (
            self._updated(self.cache.keys[layer_idx], key_states),
            self._updated(self.cache.values[layer_idx], value_states),
        )

    def attend(self, queries: Tensor, new: tuple[Tensor, Tensor], layer_idx: int) -> Tensor:
        """Store the new keys and values [R, heads, head_dim]; attention of ``queries`` [R, heads,
        group, head_dim] over what each row may see, as :func:`vpt_agent.kernels.attend`."""
        stores = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        for store, made in zip(stores, new, strict=True):
            self._write(store, made)
        assert self.seen is not None, "what was written was checked"
        assert self.lengths is not None, "it comes with what is seen"
        # The operator itself: its shapes are ours, and a tracer need not read the checks.
        found: Tensor = torch.ops.vpt.attend(queries, *stores, self.seen, self.lengths)
        return found

    def _write(self, store: Tensor, new: Tensor) -> None:
        if self.written is None or self.seen is None:
            raise InternalError("attention ran outside a step", where="SteppedCache")
        store.index_copy_(0, self.written, new.reshape(len(new), -1).to(store.dtype))

    def _updated(self, store: Tensor, new: Tensor) -> Tensor:
        self._write(store, new)
        assert self.seen is not None, "what was written was checked"
        rows, heads, _, head_dim = new.shape
        found = store.index_select(0, self.seen.reshape(-1))  # [R * S, heads * head_dim]
        return found.view(rows, -1, heads, head_dim).transpose(1, 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What attention sees; positions and masks are always passed explicitly."""
        return 0 if self.seen is None else self.seen.shape[1]

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Width of the keys, and their offset."""
        return self.get_seq_length(), 0


@dataclass(frozen=True)
class Row:
    """A row as the host hands it over: ``token`` was chosen and is not computed yet; ``state`` is
    the tables' state behind it; ``steps``, ``room`` (tokens) and ``calls`` are what it may still
    do; ``blocks`` are the cache's, ``chances`` random numbers [N] (empty: greedy)."""

    token: int
    position: int
    length: int
    steps: int
    room: int
    state: int
    calls: int
    blocks: Sequence[int]
    hidden: Tensor | None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    chances: Sequence[float] = ()


@dataclass(frozen=True)
class Said:
    """What a batch said: ``choices`` [n, R, KEPT] float64 on the host, ``hidden`` [n, R, D] the
    final-norm states at the tokens that were fed; ``reads`` times the host waited for that."""

    choices: Tensor
    hidden: Tensor
    steps: int
    reads: int


class Stepper:
    """Buffers and the step for up to R rows that see up to S slots; keeps N steps."""

    def __init__(
        self,
        model: LanguageModel,
        cache: PooledCache,
        tables: Tables,
        *,
        rows: int,
        slots: int,
        steps: int,
        mode: Mode,
        compiled: bool = False,
    ) -> None:
        self.model, self.cache, self.tables, self.mode = model, cache, tables, mode
        self.rows, self.slots, self.most = rows, slots, steps
        self.device = cache.shape.device
        self.view = SteppedCache(cache)
        width = model.config.get_text_config().hidden_size
        with torch.inference_mode(False), torch.no_grad():
            self._buffers(width, len(INTS) + cache.count(slots), len(FLOATS) + steps)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._compiled: Callable[[], None] | None = None
        if compiled:
            self._compiled = torch.compile(self.step, fullgraph=True, dynamic=False)

    def _buffers(self, width: int, ints: int, floats: int) -> None:
        device, rows = self.device, self.rows
        pinned = device.type == "cuda"
        self._ints_host = torch.zeros(rows, ints, dtype=torch.int64, pin_memory=pinned)
        self._floats_host = torch.zeros(rows, floats, dtype=torch.float64, pin_memory=pinned)
        self.ints = torch.zeros(rows, ints, dtype=torch.int64, device=device)
        self.floats = torch.zeros(rows, floats, dtype=torch.float64, device=device)
        self.hidden = torch.zeros(rows, width, dtype=self.model.dtype, device=device)
        self.step_number = torch.zeros(1, dtype=torch.int64, device=device)
        self.kept = torch.zeros(self.most, rows, KEPT, dtype=torch.float64, device=device)
        self.states = torch.zeros(self.most, rows, width, dtype=self.model.dtype, device=device)
        self._kept_host = torch.zeros(self.most, rows, KEPT, dtype=torch.float64, pin_memory=pinned)
        self._stopped_host = torch.zeros(self.most, rows, dtype=torch.int64, pin_memory=pinned)
        self._slot = torch.arange(self.slots, device=device)
        self._inner = torch.arange(self.cache.block, device=device)

    # --- the host's side ------------------------------------------------------------------

    def load(self, rows: Sequence[Row], garbage: int) -> None:
        """Hand ``rows`` over. ``garbage`` is a slot of the cache that nobody reads: rows that have
        stopped, and those that are missing, write there."""
        ints, floats = self._ints_host.numpy(), self._floats_host.numpy()
        ints[:] = 0
        floats[:] = 1.0  # a temperature must not be 0, and top-p 1 is off
        ints[:, INTS.index("stopped")] = 1
        ints[:, INTS.index("garbage")] = garbage
        blocks, own, spare = len(INTS), self.cache.block, garbage // self.cache.block
        ints[:, blocks:] = spare
        for r, row in enumerate(rows):
            values = (row.token, row.position, row.length, row.steps, row.room, row.state,
                      row.calls, int(row.steps < 1 or row.room < 1), 0, row.top_k)  # fmt: skip
            ints[r, : len(values)] = values
            ints[r, blocks:] = row.blocks[0]
            count = min(len(row.blocks), -(-self.slots // own))
            ints[r, blocks : blocks + count] = np.asarray(row.blocks[:count])
            floats[r, :2] = row.temperature, row.top_p
            floats[r, 2 : 2 + len(row.chances)] = row.chances
        self.ints.copy_(self._ints_host, non_blocking=True)
        self.floats.copy_(self._floats_host, non_blocking=True)
        self.step_number.zero_()
        found = [self.hidden[r] if x.hidden is None else x.hidden for r, x in enumerate(rows)]
        if found:
            self.hidden[: len(found)] = torch.stack(found).to(self.hidden.dtype)

    def run(self, steps: int, window: int) -> Said:
        """``steps`` steps, or fewer if every row has stopped. The host looks every ``window`` of
        them; on CUDA it launches the next window before it looks, so that the device has work."""
        waiting: deque[tuple[int, Any]] = deque()
        launched = reads = 0
        stopped = False
        while True:
            if launched < steps and not stopped:
                count = min(window, steps - launched)
                self.launch(count)
                waiting.append((launched, self._copied(launched, count)))
                launched += count
                if len(waiting) <= (self.device.type == "cuda"):
                    continue
            if not waiting:
                break
            first, event = waiting.popleft()
            if event is not None:
                event.synchronize()
            reads += 1
            stopped = bool(self._stopped_host[first].all())
        # Clones: the buffers are written again by the next batch.
        return Said(
            self._kept_host[:launched].clone(), self.states[:launched].clone(), launched, reads
        )

    def launch(self, count: int) -> None:
        """Begin ``count`` steps; nobody waits for them."""
        for _ in range(count):
            if self._graph is not None:
                self._graph.replay()
            else:
                self._once()

    def _once(self) -> None:
        if self._compiled is None:
            self.step()
            return
        # One code serves steppers of many sizes, each of which is compiled for itself.
        with torch._dynamo.config.patch(recompile_limit=_SIZES):
            self._compiled()

    def _copied(self, first: int, count: int) -> Any:
        """Begin to copy what ``count`` steps have said; the event that says it has come."""
        end = first + count
        self._kept_host[first:end].copy_(self.kept[first:end], non_blocking=True)
        self._stopped_host[first].copy_(self._int("stopped"), non_blocking=True)
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def record(self, pool: Any) -> None:
        """Record the step as a CUDA graph whose memory comes from ``pool``; the buffers must hold
        rows that have all stopped."""
        # What libraries set up at a first call must not be recorded: run it before, aside.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._once()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Tools on other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._once()
        self._graph = graph

    # --- the device's side ----------------------------------------------------------------

    def _int(self, name: str) -> Tensor:
        return self.ints[:, INTS.index(name)]

    def step(self) -> None:
        """One token of every row: compute the last one, choose the next."""
        active = self._int("stopped") == 0
        hidden = self._computed(active)  # [R, D]
        logits = self.model.compute_logits(hidden).float()  # [R, V]
        token, forced, numbers = self._chosen(logits)
        sane = ~torch.isnan(logits.amax(-1)) & ~torch.isnan(numbers[0])
        live = active & sane
        said = token.masked_fill(~live, -1)
        kept = torch.stack((said.double(), forced.double(), *numbers), dim=-1)  # [R, KEPT]
        # The number counts on by itself; what is run to warm up must not write behind the end.
        at = self.step_number.clamp(max=self.most - 1)
        self.kept.index_copy_(0, at, kept[None])
        self.states.index_copy_(0, at, hidden[None].to(self.states.dtype))
        self.step_number += 1
        self._move_on(token, forced, live, sane)
        self.hidden.copy_(torch.where(live[:, None], hidden.to(self.hidden.dtype), self.hidden))

    def _computed(self, active: Tensor) -> Tensor:
        """Final-norm states [R, D] of the rows' last tokens, their keys and values stored."""
        token, length, block = self._int("token"), self._int("length"), self.cache.block
        embeds = self.model.get_input_embeddings()(token[:, None])  # [R, 1, D]
        control = self.tables.control[token][:, None, None]
        embeds = torch.where(control, self.hidden[:, None].to(embeds.dtype), embeds)
        blocks = self.ints[:, len(INTS) :]
        slots = (blocks[:, :, None] * block + self._inner).view(self.rows, -1)[:, : self.slots]
        here = slots.gather(1, length[:, None])[:, 0]
        sees = self._slot <= length[:, None]  # [R, S]
        self.view.lengths = length + 1
        self.view.written = torch.where(active, here, self._int("garbage"))
        # Behind its end a row sees its own first slot: what lies there is finite, and masked.
        self.view.seen = torch.where(sees, slots, slots[:, :1])
        places = self._int("position").view(1, self.rows, 1).expand(3, -1, -1)
        made = self.model.run_language_model(embeds, places, sees[:, None, None], self.view)
        return made[:, 0]

    def _chosen(self, logits: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Tokens [R], whether each was forced, and its logprob, removed mass, and logprob of the
        draw: as :class:`~vpt_agent.engine.sampling.Sampler` has them."""
        t = self.tables
        number = t.sets[self._int("state"), (self._int("calls") <= 0).long()]
        logprobs = torch.log_softmax(logits, -1)
        kept = logprobs.masked_fill(~t.masks[number], float("-inf"))
        mass = torch.logsumexp(kept, -1)
        plain, only = t.plain[number], t.only[number]
        under = torch.where(plain[:, None], logprobs, kept - mass[:, None])
        token = under.argmax(-1)
        drawn = torch.zeros(self.rows, dtype=torch.float64, device=logits.device)
        if self.mode != "greedy":
            found, price = self._drawn(under)
            warm = self.floats[:, 0] > 0
            token, drawn = torch.where(warm, found, token), torch.where(warm, price, drawn)
        forced = only >= 0
        token = torch.where(forced, only, token)
        alone = logprobs.gather(1, token[:, None])[:, 0].exp()
        removed = (1.0 - mass.double().exp()).clamp(min=0.0).masked_fill(plain, 0.0)
        removed = torch.where(forced, 1.0 - alone.double(), removed)
        logprob = under.gather(1, token[:, None])[:, 0].double()
        return (
            token,
            forced,
            (logprob.masked_fill(forced, 0.0), removed, drawn.masked_fill(forced, 0.0)),
        )

    def _drawn(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        heat = self.floats[:, 0]
        how = Draw(
            heat.masked_fill(heat <= 0, 1.0),
            self._int("top_k"),
            self.floats[:, 1],
            self.mode == "filtered",
        )
        chances = self.floats[:, len(FLOATS) :].gather(1, self._int("cursor")[:, None])
        return draw(logprobs, how, chances[:, 0])

    def _move_on(self, token: Tensor, forced: Tensor, live: Tensor, sane: Tensor) -> None:
        """Everything that a chosen token changes in a row."""
        t, state, alive = self.tables, self._int("state"), live.long()
        after = t.follow[state, t.column[token]]
        entered = t.inside[after] & ~t.inside[state] & live
        steps, room = self._int("steps"), self._int("room")
        steps -= alive
        room -= alive
        self._int("calls").sub_(entered.long())
        self._int("length").add_(alive)
        self._int("position").add_(alive)
        self._int("cursor").add_((live & ~forced).long())
        self._int("token").copy_(torch.where(live, token, self._int("token")))
        over = (after == DEAD) | (room < 1) | (steps < 1)
        self._int("stopped").copy_(((self._int("stopped") != 0) | ~sane | over).long())
        state.copy_(torch.where(live, after, state))
