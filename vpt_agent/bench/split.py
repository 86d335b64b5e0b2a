"""How one answer's time splits, measured around the model's calls and told apart by the trace.

Nothing is built into engine or agent for it: the model is wrapped, and the trace says to which
stage the calls since its last event belong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from vpt_agent.bench.clock import Clock
from vpt_agent.engine.live import Run
from vpt_agent.engine.sampling import Choice, Sampler
from vpt_agent.trace import Event

if TYPE_CHECKING:
    from vpt_agent.model import VPTForConditionalGeneration

T = TypeVar("T")

PARTS = ("image", "vision", "prefill", "decode", "choose", "tool", "append", "agent", "loop")
"""Image decode and resize; vision encode; language model in prefill, decode and append with the
output head; choosing tokens; conditioning in tools. Then what is no arithmetic: the agent's run
(layout, grammar, trace, checks of calls), and the loop below it (laying out batches, positions,
cache rows, threads of tools)."""
REST = ("agent", "loop")

_STAGES = {"prefilled": "prefill", "decoded": "decode", "perception_appended": "append"}


class TimedModel:
    """``model`` with its calls under ``clock``; what it does not define is the model's."""

    def __init__(self, model: VPTForConditionalGeneration, clock: Clock) -> None:
        self.model, self.clock = model, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        """The embedding, counted to the language model."""
        embed = self.model.get_input_embeddings()

        def timed(ids: Tensor) -> Tensor:
            with self.clock.measure("language"):
                found: Tensor = embed(ids)
            return found

        return timed

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        """As the model's."""
        with self.clock.measure("vision"):
            return self.model.encode_images(pixel_values, grid_thw)

    def encode(self, kind: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        """As the model's."""
        with self.clock.measure("vision"):
            return self.model.encode(kind, **inputs)

    def condition(self, kind: str, features: Tensor, control: Tensor) -> Tensor:
        """As the model's."""
        with self.clock.measure("tool"):
            return self.model.condition(kind, features, control)

    def run_language_model(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the model's."""
        with self.clock.measure("language"):
            return self.model.run_language_model(*args, **kwargs)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """As the model's."""
        with self.clock.measure("language"):
            return self.model.compute_logits(hidden)


class TimedSampler(Sampler):
    """``inner`` with its time counted as choosing."""

    def __init__(self, inner: Sampler, clock: Clock) -> None:
        super().__init__(inner.sampling)
        self._inner, self._clock = inner, clock

    def choose(self, logits: Tensor, **options: Any) -> Choice:
        """As the inner one's."""
        with self._clock.measure("choose"):
            return self._inner.choose(logits, **options)

    def probability_of(self, logits: Tensor, token: int) -> float:
        """As the inner one's."""
        with self._clock.measure("choose"):
            return self._inner.probability_of(logits, token)


class Split:
    """Hears a run's trace, and gives the parts of ``PARTS`` in seconds."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.turns = 0

    def hear(self, event: Event) -> None:
        """Give what the language model did since the last event to its stage."""
        self.turns += event.type == "decoded"
        stage = _STAGES.get(event.type)
        if stage is not None:
            self.clock.add(stage, self.clock.seconds.pop("language", 0.0))

    def parts(self, total: float) -> Mapping[str, float]:
        """Seconds by part of a run that took ``total``."""
        found = {name: self.clock.seconds.get(name, 0.0) for name in PARTS}
        found["loop"] = total - sum(found.values())
        return found


def watched(steps: Run[T], clock: Clock) -> Run[T]:
    """A run whose own steps are counted as the agent's."""
    answer = None
    try:
        while True:
            with clock.measure("agent"):
                try:
                    want = steps.send(answer)
                except StopIteration as stop:
                    done: T = stop.value
                    return done
            answer = yield want
    finally:
        steps.close()
