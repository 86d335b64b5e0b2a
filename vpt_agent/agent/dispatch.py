"""From calls to results: gives tools what they need and runs them beside the loop.

Encoder work is not done by the tools one by one: :meth:`Dispatcher.needed` says which features
the calls of one turn will ask for, the loop computes those of all concurrent runs in one batch,
and the tools find them done.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vpt_agent.engine.core import Engine
from vpt_agent.engine.intervention import Condition
from vpt_agent.engine.parts import Look
from vpt_agent.errors import ModelRetry, ToolDefinitionError, UserError
from vpt_agent.kernels import kernel_name
from vpt_agent.tokens.grid import RegionPolicy
from vpt_agent.tool import ToolContext, ToolRegistry, execute
from vpt_agent.types import (
    Box,
    ToolCall,
    ToolResult,
    View,
    VisualFeatures,
)
from vpt_agent.vision.frames import crop_view


@dataclass(frozen=True)
class Scope:
    """What the calls of one turn may see: all ``views`` by id, the question's ``originals``,
    the run's seed, and the moment (``time.monotonic``) at which it must be over. ``condition`` is
    the session's; None is the model's."""

    views: Mapping[str, View]
    originals: tuple[View, ...]
    seed: int | None = None
    deadline: float | None = None
    condition: Condition | None = None

    def view(self, source: object) -> View | None:
        """The view that ``source`` names; the latest original for None."""
        if source is None:
            return self.originals[-1] if self.originals else None
        return self.views.get(str(source))


class Dispatcher:
    """Runs validated calls on threads; one for all runs of an agent."""

    def __init__(
        self, engine: Engine, registry: ToolRegistry, *, regions: RegionPolicy, workers: int = 4
    ) -> None:
        self.engine, self.registry, self.regions = engine, registry, regions
        embed = engine.model.get_input_embeddings()
        first = torch.zeros(1, 1, dtype=torch.long, device=engine.device)
        self._width = embed(first).shape[-1]  # of the language model: D
        self._closed = False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="vpt-tool")

    def close(self) -> None:
        """Stop taking calls; threads end when their tools do."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def look(self, encoder: str, views: tuple[View, ...]) -> Look:
        """A request for features."""
        return Look(encoder, views)

    def visual_tokens(self, view: View) -> int:
        """How many visual tokens a view costs through the base tower."""
        return self.engine.policy.plan(view.size, crop=view.parent is not None).visual_tokens

    def needed(self, calls: Sequence[ToolCall], scope: Scope) -> list[Look]:
        """The features that re-encoding calls will ask for, as far as it can be known."""
        looks = []
        for call in calls:
            tool = self.registry.find(call.name)
            view = scope.view(call.arguments.get("source"))
            if tool is None or view is None:
                continue
            for need in sorted(tool.needs):
                encoder = need.removeprefix("encoder:")
                if encoder != need and encoder in self.engine.table:
                    looks.append(Look(encoder, (view,)))
        return looks

    def submit(self, calls: Sequence[ToolCall], scope: Scope) -> tuple[Future[ToolResult], ...]:
        """Start all calls; a future each, which never raises for the model's or a tool's fault."""
        if self._closed:
            raise UserError("this agent is closed: its tools do not run any more")
        return tuple(self._pool.submit(self._one, call, scope) for call in calls)

    def _one(self, call: ToolCall, scope: Scope) -> ToolResult:
        with torch.inference_mode():
            tool = self.registry.get(call.name)
            result = execute(tool, call, lambda: self._context(call, scope))
        if result.features is not None:
            self._check(result.features, call.name)
        return result

    def _check(self, features: VisualFeatures, name: str) -> None:
        """Features that the language model cannot take are their author's fault: said here, where
        the tool is known, and not in the middle of a batch."""
        shape = tuple(getattr(features.tokens, "shape", ()))
        fits = len(shape) == 2 and shape[0] > 0 and shape[1] == self._width
        if fits and features.kind in self.engine.table and features.tokens.is_floating_point():
            return
        kinds = ", ".join(row.name for row in self.engine.table.rows)
        raise ToolDefinitionError(
            "a tool gave visual features that this model cannot take",
            where=name,
            got=f"kind {features.kind!r}, shape {shape}",
            expected=f"a kind of {kinds}; floating point [V, {self._width}] with V > 0",
        )

    def _context(self, call: ToolCall, scope: Scope) -> ToolContext:
        table = self.engine.table
        count = itertools.count(1)

        def crop(parent: View, box: Box) -> View:
            # Named after the call: the same run gives the same names, whatever runs beside it.
            name = f"{call.id}.{next(count)}"
            # A view at the original's resolution is cut as it is (it may be drawn on); one that
            # was resized has lost pixels, so its original is cut instead.
            resized = parent.size != (parent.box.width, parent.box.height)
            root = scope.views.get(parent.root) if resized else None
            return crop_view(parent, box, id=name, origin=call.name, root=root)

        seed = 0 if scope.seed is None else scope.seed
        return ToolContext(
            views=scope.views,
            view=scope.view(None),
            control=call.control,
            kind=None if call.kind is None else table[call.kind].kind,
            kinds={row.name: row.kind for row in table.rows},
            regions=self.regions,
            rng=random.Random(f"{seed}:{call.id}"),
            deadline=scope.deadline,
            device=str(self.engine.device),
            encode=self._encode,
            project=partial(self._project, scope.condition or self.engine.model.condition),
            crop=crop,
        )

    def _encode(self, kind: str, view: View) -> Tensor:
        """Features [V, D] of a view; found in the store when the loop computed them."""
        return self.engine.look(kind, (view,))[0].tokens

    def _project(
        self, condition: Condition, kind: str, features: Tensor, control: Tensor | None
    ) -> VisualFeatures:
        if control is None:
            raise ModelRetry(f"{kind} needs a control token: call it with its perception token")
        with self.engine.lock:
            tokens = condition(kind, features, control)
        return VisualFeatures(kind, tokens, kernel_name("condition", features))
