"""From calls to results: gives tools what they need and runs them beside the loop.

Encoder work is not done by the tools one by one: :meth:`Dispatcher.needed` says which features
the calls of one turn will ask for, the loop computes those of all concurrent runs in one batch,
and the tools find them done. Calls of one tool from concurrent runs go to it in one batch
(:class:`vpt_agent.tool.ToolPool`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from vpt_agent.engine.core import Engine
from vpt_agent.engine.intervention import Condition
from vpt_agent.engine.parts import Look, Looked, Wait
from vpt_agent.errors import ModelRetry, ToolDefinitionError
from vpt_agent.kernels import kernel_name
from vpt_agent.tokens.grid import RegionPolicy
from vpt_agent.tool import Pending, Submitted, ToolContext, ToolPool, ToolRegistry
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
        self, engine: Engine, registry: ToolRegistry, *, regions: RegionPolicy, workers: int = 16
    ) -> None:
        self.engine, self.registry, self.regions = engine, registry, regions
        embed = engine.model.get_input_embeddings()
        first = torch.zeros(1, 1, dtype=torch.long, device=engine.device)
        self._width = embed(first).shape[-1]  # of the language model: D
        self._pool = ToolPool(workers=workers, around=torch.inference_mode, inspect=self._check)

    def close(self) -> None:
        """Stop taking calls; threads end when their tools do, and a tool that no other agent uses
        is closed."""
        self._pool.close()

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

    def foresee(self, kind: str, view: View | None) -> None:
        """A call of ``kind`` has begun, or will come: what it will need of ``view`` can be begun,
        if it carries no arguments that may name another picture."""
        if view is None or kind not in self.engine.table:
            return
        row = self.engine.kind_of(kind).kind
        tool = self.registry.find(row.tool)
        if tool is None or row.payload != "control":
            return
        needed = {need.removeprefix("encoder:") for need in tool.needs if need != "encoder:base"}
        looks = [Look(e, (view,)) for e in sorted(needed) if e in self.engine.table]
        if looks:
            self.engine.foresee(looks)

    def answers(
        self,
        calls: Sequence[ToolCall],
        scope: Scope,
        made: Mapping[str, ToolResult],
        looked: Callable[[Sequence[Looked], str], None],
    ) -> Generator[Any, Any, list[ToolResult]]:
        """Results of a turn's calls, in order, as a part of a run.

        ``made`` holds the results of the run's earlier calls by :meth:`same`: an equal call is not
        run again. ``looked`` hears of the pictures that were encoded for the calls, and for which
        kind.
        """
        keys = [self.same(call) for call in calls]
        fresh = [
            i
            for i, key in enumerate(keys)
            if key is None or (key not in made and key not in keys[:i])
        ]
        new = [calls[i] for i in fresh]
        looks = self.needed(new, scope)
        if looks:  # encoder work of all runs in one batch; the tools find it done
            found = yield looks
            for look, items in zip(looks, found, strict=True):
                looked(items, look.encoder)
        results: dict[int, ToolResult] = {}
        if new:
            pending = self.submit(new, scope)
            try:
                told = yield Wait(pending.futures, pending.start)
            except BaseException:
                pending.cancel()  # stopped, or another call's fault: nobody waits any more
                raise
            results = dict(zip(fresh, told, strict=True))
        now = {keys[i]: result for i, result in results.items()}
        for i, call in enumerate(calls):
            if i not in results:
                first = made.get(str(keys[i])) or now[keys[i]]
                inline = call.kind is not None and self._inline(call.kind)
                results[i] = repeated(call, first, inline=inline)
        return [results[i] for i in range(len(calls))]

    def _inline(self, kind: str) -> bool:
        """Whether results of this kind stand right behind their call."""
        return self.engine.kind_of(kind).kind.result == "inline"

    def submit(self, calls: Sequence[ToolCall], scope: Scope) -> Pending:
        """Take calls: a future each, which never raises for the model's or a tool's fault. They run
        when :attr:`Pending.start` is called."""
        return self._pool.submit(
            Submitted(
                self.registry.get(call.name), call, partial(self._context, call, scope),
                deadline=scope.deadline,
            )
            for call in calls
        )  # fmt: skip

    def same(self, call: ToolCall) -> str | None:
        """What two equal calls have in common; None if an equal call must run again.

        A call that carries a control state is equal only if that is: it says what is looked for.
        """
        tool = self.registry.find(call.name)
        if tool is None or tool.always_run:
            return None
        state = None if call.control is None else _digest(call.control)
        try:
            arguments = json.dumps(dict(call.arguments), sort_keys=True)
        except (TypeError, ValueError, RecursionError):
            return None  # no call of a model; the check of the arguments says more
        return f"{tool.full_name} {call.kind} {state} {arguments}"

    def _check(self, result: ToolResult) -> None:
        """Features that the language model cannot take are their author's fault: said here, where
        the tool is known, and not in the middle of a batch."""
        features = result.features
        if features is None:
            return
        shape = tuple(getattr(features.tokens, "shape", ()))
        fits = len(shape) == 2 and shape[0] > 0 and shape[1] == self._width
        if fits and features.kind in self.engine.table and features.tokens.is_floating_point():
            return
        kinds = ", ".join(row.name for row in self.engine.table.rows)
        raise ToolDefinitionError(
            "a tool gave visual features that this model cannot take",
            where=result.name,
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
            views=MappingProxyType(scope.views),  # to look at, not to change
            view=scope.view(None),
            control=call.control,
            kind=None if call.kind is None else table[call.kind].kind,
            kinds={row.name: row.kind for row in table.rows},
            regions=self.regions,
            rng=random.Random(f"{seed}:{call.id}"),
            deadline=scope.deadline,
            device=str(self.engine.device),
            access=self.registry.access,
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


def _digest(state: Tensor) -> str:
    """Hash of a control state [k, D], to the bit."""
    plain = state.detach().to("cpu", torch.float64).contiguous()
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()


AGAIN = "This call was made before; what it showed is not shown again."


def repeated(call: ToolCall, first: ToolResult, *, inline: bool) -> ToolResult:
    """The answer to a call that was answered before by ``first``, without running it.

    Text is said again. Pictures and features stand in the conversation already, so the model is
    told so; but for an ``inline`` kind, whose result belongs where its call stands.
    """
    shown = bool(first.views) or first.features is not None
    answer = replace(
        first,
        call_id=call.id,
        metadata={"repeats": first.call_id},
        kernels=(),
        seconds=0.0,
    )
    if not shown or inline:
        return answer
    text = AGAIN if first.text is None else f"{first.text}\n{AGAIN}"
    return replace(answer, views=(), features=None, text=text)
