"""What is done ahead of need, beside the same done when it is needed: clock on the wall, in turn.

Two things: features of an encoder that a call will ask for, begun before it is complete; and the
pictures of a batch, read and resized on threads while the model answers others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from vpt_agent.agent.agent import Question
from vpt_agent.bench.answer import QUESTION, Loaded, Ours, Settings, picture
from vpt_agent.bench.machine import describe, stamp, threads
from vpt_agent.bench.timing import in_turn, ratios, spreads
from vpt_agent.errors import InternalError
from vpt_agent.trace import ImageEncoded


@dataclass(frozen=True)
class Overlap:
    """An answer with a forced call of ``force`` on a picture of ``image`` pixels a side, and a
    batch of ``questions`` on pictures of ``large`` pixels a side, both with ``new_tokens`` words,
    ``threads`` of torch."""

    image: int = 448
    new_tokens: int = 8
    force: str = "dino"
    repeats: int = 5
    threads: int = 2
    questions: int = 8
    large: int = 448


def bench_overlap(
    loaded: Loaded,
    settings: Overlap,
    *,
    shape: str = "",
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Seconds with and without, and their ratios; of the early features also how much of their
    computing nobody waited for."""
    with threads(settings.threads):
        device = loaded.model.device
        one = Settings(
            settings.image, settings.new_tokens, settings.force, threads=settings.threads
        )
        ours = Ours(loaded, one, picture(settings.image))
        try:
            return {
                "what": "overlap",
                "when": stamp(),
                "machine": describe(device).to_dict(),
                "model": shape,
                "settings": asdict(settings),
                "features": _features(ours, settings, tell),
                "pictures": _pictures(ours, settings, tell),
            }
        finally:
            ours.close()


def _features(ours: Ours, settings: Overlap, tell: Callable[[str], None]) -> dict[str, Any]:
    early = ours.agent.engine.features.early
    hidden: list[tuple[float, float]] = []
    said: set[str] = set()

    def run(wanted: bool) -> None:
        early.wanted = wanted
        answer = ours.run()
        said.add(answer.text)
        told = [e for e in answer.trace.events if isinstance(e, ImageEncoded) and e.early > 0]
        hidden.extend((e.seconds, e.hidden) for e in told)

    found = _both(run, settings.repeats, tell)
    early.wanted = None
    _same(said)
    seconds = sum(s for s, _ in hidden)
    return found | {"hidden_share": sum(h for _, h in hidden) / seconds if seconds else 0.0}


def _pictures(ours: Ours, settings: Overlap, tell: Callable[[str], None]) -> dict[str, Any]:
    agent = ours.agent
    data = [picture(settings.large, seed) for seed in range(settings.questions)]
    questions = [Question(f"{QUESTION} {i}", d) for i, d in enumerate(data)]
    workers, said = agent.pictures.workers, set()

    def run(ahead: bool) -> None:
        agent.engine.features.clear()
        agent.pictures.workers = workers if ahead else 0
        answers = agent.run_batch(questions, tool_choice="none")
        said.add(" | ".join(a.text for a in answers))

    found = _both(run, settings.repeats, tell)
    _same(said)
    return found | {"workers": workers}


def _both(run: Callable[[bool], None], repeats: int, tell: Callable[[str], None]) -> dict[str, Any]:
    samples = in_turn(
        {"when_needed": partial(run, False), "ahead": partial(run, True)},
        repeats=repeats,
        tell=tell,
    )
    return {name: spreads(s) for name, s in samples.items()} | {
        "ratio": ratios(samples["when_needed"], samples["ahead"])
    }


def _same(said: set[str]) -> None:
    if len(said) != 1:
        raise InternalError("what was done ahead changed the answers", where="bench overlap")
