"""Many questions together beside one after another, with the same agent, in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vpt_agent.agent.agent import PerceptionAgent, Question
from vpt_agent.bench.answer import QUESTION, Loaded, picture
from vpt_agent.bench.clock import Clock
from vpt_agent.bench.forced import call_length, chosen_ahead, forced_agent, kind_of
from vpt_agent.bench.limits import Costs, Work, products_seconds
from vpt_agent.bench.machine import Rates, describe, measure_rates, stamp, threads
from vpt_agent.bench.split import TimedModel
from vpt_agent.bench.timing import Sample, in_turn, ratios, spreads, timed, timer_for
from vpt_agent.engine.ahead import Decoding
from vpt_agent.model import compiled
from vpt_agent.trace import Decoded, ImageEncoded, PerceptionAppended, PromptRendered
from vpt_agent.types import Answer, Limits

AIM, SHARE = 3.0, 0.8
"""Aims: times the throughput of one after another, and share of what the limit allows."""
PARTS = ("vision", "blocks", "decode", "logits", "choose", "tool")
"""Looking; the language model in prompts and results, and in steps of one token a row; the output
head; choosing tokens; conditioning. The rest is agents, pictures' decoding and the loop."""


@dataclass(frozen=True)
class Crowd:
    """``questions``, each on a picture of its own of ``image`` x ``image`` pixels, with a forced
    call of ``force`` and then ``new_tokens`` tokens. ``compiled``: by the routines in C. Of all of
    them ``alone`` are asked one after another, too, and their time counts for all."""

    questions: int = 16
    image: int = 224
    new_tokens: int = 128
    force: str = "clip"
    repeats: int = 2
    threads: int = 1
    decoding: Decoding = "auto"
    compiled: bool = False
    alone: int = 4


def bench_throughput(
    loaded: Loaded, crowd: Crowd, *, shape: str = "", tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Figures of ``crowd``: seconds of both ways, their ratio, the computed limits, and where the
    time of all together goes."""
    with threads(crowd.threads), compiled.using(crowd.compiled):
        return _bench(loaded, crowd, shape, tell)


class _Ways:
    """The questions of a crowd, and both ways to answer them."""

    def __init__(self, loaded: Loaded, crowd: Crowd, tell: Callable[[str], None]) -> None:
        kind = kind_of(loaded.model, crowd.force)
        self.loaded, self.crowd, self.tell, self.tool = loaded, crowd, tell, kind.tool
        tokens = call_length(kind, loaded.model.table.controls) + crowd.new_tokens
        self.limits = Limits(new_tokens=tokens)
        pictures = [picture(crowd.image, seed) for seed in range(crowd.questions)]
        self.questions = [Question(f"{QUESTION} {i}", data) for i, data in enumerate(pictures)]
        self.agent = self._agent(loaded.model)
        self.texts: dict[str, list[str]] = {}
        self.answers: list[Answer] = []
        self.rows: list[int] = []

    def _agent(self, model: Any) -> PerceptionAgent:
        crowd = self.crowd
        return forced_agent(
            model, self.loaded.processor, new_tokens=crowd.new_tokens, decoding=crowd.decoding
        )

    def warm_up(self) -> None:
        """The first questions of both ways, which do not count."""
        self.tell("warming up")
        self._together(self.agent, self.questions[:2])
        self._one(self.questions[0])

    def together(self) -> None:
        """All at once."""
        self.agent.engine.counters.rows_per_forward.clear()
        self.answers = self._together(self.agent, self.questions)
        self.rows = list(self.agent.engine.counters.rows_per_forward)
        self.texts["together"] = [answer.text for answer in self.answers]
        self.tell(f"{len(self.answers)} questions together")

    def alone(self) -> None:
        """One after another."""
        self.agent.engine.features.clear()
        self.texts["alone"] = []
        for question in self.questions[: self.crowd.alone]:
            self.texts["alone"].append(self._one(question).text)
        self.tell(f"{self.crowd.alone} questions one after another")

    def _one(self, question: Question) -> Answer:
        return self.agent.run(
            question.text, question.image, tool_choice=self.tool, limits=self.limits
        )

    def _together(self, agent: PerceptionAgent, questions: list[Question]) -> list[Answer]:
        agent.engine.features.clear()
        return agent.run_batch(questions, tool_choice=self.tool, limits=self.limits)

    def profile(self) -> dict[str, float]:
        """Seconds of one more run of all together, by part."""
        self.tell("splitting")
        device = self.loaded.model.device
        clock = Clock(device, timer_for(device))
        agent = self._agent(_Apart(self.loaded.model, clock))
        whole = timed(lambda: self._together(agent, self.questions), device).by(clock.timer)
        agent.close()
        parts = {name: clock.seconds.get(name, 0.0) for name in PARTS}
        return parts | {"rest": whole - sum(parts.values())}


class _Apart(TimedModel):
    """Steps of one token a row, apart from blocks of more."""

    def run_language_model(self, embeds: Tensor, *args: Any) -> Tensor:
        """As the model's."""
        with self.clock.measure("decode" if embeds.shape[1] == 1 else "blocks"):
            return self.model.run_language_model(embeds, *args)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """As the model's."""
        with self.clock.measure("logits"):
            return self.model.compute_logits(hidden)


def _bench(loaded: Loaded, crowd: Crowd, shape: str, tell: Callable[[str], None]) -> dict[str, Any]:
    device = loaded.model.device
    machine, timer, ways = describe(device), timer_for(device), _Ways(loaded, crowd, tell)
    ways.warm_up()
    samples = in_turn(
        {"alone": ways.alone, "together": ways.together},
        repeats=crowd.repeats,
        warmup=0,
        device=device,
        tell=tell,
    )
    scale = len(ways.questions) / min(crowd.alone, len(ways.questions))
    alone = [Sample(s.wall * scale, s.cpu * scale) for s in samples["alone"]]
    parts = ways.profile()
    tell("measuring the machine")
    rates = measure_rates(loaded.model.dtype, device, stream=2**28)
    least, library = _least(loaded, ways.answers, rates)
    ways.agent.close()
    ratio, both = ratios(alone, samples["together"]), spreads(samples["together"])
    taken = both[timer]["median"]
    return {
        "what": "throughput",
        "when": stamp(),
        "machine": machine.to_dict(),
        "model": f"{shape}, compiled" if crowd.compiled else shape,
        "settings": asdict(crowd),
        "timer": timer,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "answers_equal": ways.texts["alone"] == ways.texts["together"][: crowd.alone],
        "alone": spreads(alone) | {"scale": scale},
        "together": both | {"rows_per_forward": sum(ways.rows) / len(ways.rows), "parts": parts},
        "chosen_on_device": chosen_ahead(ways.answers),
        "ratio": ratio,
        "rates": rates.to_dict(),
        "limits": {
            "seconds": least,
            "share": least / taken,
            "with_measured_products": {"seconds": library, "share": library / taken},
        },
        "aims": [
            _aim("times the throughput of one after another", ratio[timer]["median"], AIM),
            _aim("share of what the computed limit allows", least / taken, SHARE),
        ],
    }


def _aim(text: str, figure: float, wanted: float) -> dict[str, Any]:
    return {
        "aim": text,
        "figure": figure,
        "wanted": wanted,
        "at_least": True,
        "met": figure >= wanted,
    }


def _least(loaded: Loaded, answers: list[Answer], rates: Rates) -> tuple[float, float]:
    """Seconds that ``answers`` take at least, each stage in one batch that reads weights once: by
    the machine's rates, and with the language model's products as fast as they were measured for
    as many rows."""
    costs = Costs.of(loaded.model)
    vision: list[Work] = []
    stages: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for answer in answers:
        for event in answer.trace.events:
            if isinstance(event, ImageEncoded) and event.grid and not event.reused:
                vision.append(costs.vision(event.grid[1] * event.grid[2]))
        for stage, number, new, past in _blocks(answer):
            stages.setdefault((stage, number), []).append((new, past))
    looking = sum(vision, Work(0.0, 0.0)).seconds(rates)
    weights = float(costs.layer_bytes + costs.head_bytes)
    total = library = looking
    measured: dict[tuple[int, int], float] = {}
    for blocks in stages.values():
        whole = sum((costs.block(*b) for b in blocks), Work(0.0, weights * (1 - len(blocks))))
        total += whole.seconds(rates)
        rows = sum(new for new, _ in blocks), len(blocks)
        if rows not in measured:
            measured[rows] = products_seconds(loaded.model, *rows)
        seen = sum((costs.attention(*b) for b in blocks), Work(0.0, 0.0))
        library += measured[rows] + seen.seconds(rates)
    return total, library


def _blocks(answer: Answer) -> list[tuple[str, int, int, int]]:
    """(stage, number, new tokens, tokens before) of each forward of one answer."""
    found: list[tuple[str, int, int, int]] = []
    past = pending = step = 0
    for event in answer.trace.events:
        if isinstance(event, PromptRendered | PerceptionAppended):
            new = sum(len(s.ids) for s in event.spans) + pending
            found.append((event.type, 0, new, past))
            past += new
            pending = 0
        elif isinstance(event, Decoded):
            count = sum(len(s.ids) for s in event.spans)
            found += [("decode", step + i, 1, past + i) for i in range(count - 1)]
            past += count - 1
            step += count - 1
            pending = 1
    return found
