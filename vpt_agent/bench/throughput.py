"""Many questions together beside one after another, with the same agent, in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from vpt_agent.agent.agent import Question
from vpt_agent.bench.answer import QUESTION, Loaded, picture
from vpt_agent.bench.forced import call_length, chosen_ahead, forced_agent, kind_of
from vpt_agent.bench.limits import Costs, Work
from vpt_agent.bench.machine import Rates, describe, measure_rates, stamp, threads
from vpt_agent.bench.timing import in_turn, ratios, spreads, timer_for
from vpt_agent.engine.ahead import Decoding
from vpt_agent.trace import Decoded, ImageEncoded, PerceptionAppended, PromptRendered
from vpt_agent.types import Answer, Limits

AIM, SHARE = 3.0, 0.8
"""Aims: times the throughput of one after another, and share of what the limit allows."""


@dataclass(frozen=True)
class Crowd:
    """``questions``, each on a picture of its own of ``image`` x ``image`` pixels, with a forced
    call of ``force`` and then ``new_tokens`` tokens."""

    questions: int = 16
    image: int = 224
    new_tokens: int = 128
    force: str = "clip"
    repeats: int = 3
    threads: int = 1
    decoding: Decoding = "auto"


def bench_throughput(
    loaded: Loaded, crowd: Crowd, *, shape: str = "", tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Figures of ``crowd``: questions a second both ways, their ratio, and the limit's."""
    with threads(crowd.threads):
        return _bench(loaded, crowd, shape, tell)


def _bench(loaded: Loaded, crowd: Crowd, shape: str, tell: Callable[[str], None]) -> dict[str, Any]:
    device = loaded.model.device
    machine = describe(device)
    kind = kind_of(loaded.model, crowd.force)
    tokens = call_length(kind, loaded.model.table.controls) + crowd.new_tokens
    limits = Limits(new_tokens=tokens)
    pictures = [picture(crowd.image, seed) for seed in range(crowd.questions)]
    questions = [Question(f"{QUESTION} {i}", data) for i, data in enumerate(pictures)]
    agent = forced_agent(
        loaded.model, loaded.processor, new_tokens=crowd.new_tokens, decoding=crowd.decoding
    )
    said: dict[str, list[str]] = {}
    last: list[Answer] = []

    def together() -> None:
        agent.engine.features.clear()
        agent.engine.counters.rows_per_forward.clear()
        last[:] = agent.run_batch(questions, tool_choice=kind.tool, limits=limits)
        said["together"] = [a.text for a in last]

    def alone() -> None:
        agent.engine.features.clear()
        said["alone"] = [
            agent.run(q.text, q.image, tool_choice=kind.tool, limits=limits).text for q in questions
        ]

    samples = in_turn(
        {"alone": alone, "together": together},
        repeats=crowd.repeats,
        device=device,
        tell=tell,
    )
    together()
    rows = agent.engine.counters.rows_per_forward
    rates = measure_rates(loaded.model.dtype, device, stream=2**28)
    least = _least(loaded, last, rates)
    agent.close()
    timer = timer_for(device)
    ratio, both = ratios(samples["alone"], samples["together"]), spreads(samples["together"])
    share = least / both[timer]["median"]
    return {
        "what": "throughput",
        "when": stamp(),
        "machine": machine.to_dict(),
        "model": shape,
        "settings": asdict(crowd),
        "timer": timer,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "answers_equal": said["alone"] == said["together"],
        "alone": spreads(samples["alone"]),
        "together": both | {"rows_per_forward": sum(rows) / len(rows)},
        "chosen_on_device": chosen_ahead(last),
        "ratio": ratio,
        "rates": rates.to_dict(),
        "limits": {"seconds": least, "share": share},
        "aims": [
            _aim("times the throughput of one after another", ratio[timer]["median"], AIM),
            _aim("share of what the computed limit allows", share, SHARE),
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


def _least(loaded: Loaded, answers: list[Answer], rates: Rates) -> float:
    """Seconds that ``answers`` take at least: each stage in one batch that reads weights once."""
    costs = Costs.of(loaded.model)
    total = 0.0
    stages: dict[tuple[str, int], list[Work]] = {}
    for answer in answers:
        for event in answer.trace.events:
            if isinstance(event, ImageEncoded) and event.grid and not event.reused:
                work = costs.vision(event.grid[1] * event.grid[2])
                stages.setdefault(("vision", 0), []).append(work)
        for stage, number, new, past in _blocks(answer):
            stages.setdefault((stage, number), []).append(costs.block(new, past))
    weights = float(costs.decode_bytes)
    for (stage, _), works in stages.items():
        read = sum(w.bytes for w in works)
        if stage != "vision":
            read -= weights * (len(works) - 1)
        total += Work(sum(w.flops for w in works), read).seconds(rates)
    return total


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
