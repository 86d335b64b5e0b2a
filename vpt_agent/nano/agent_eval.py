"""The shipped model measured as its user meets it: through :class:`PerceptionAgent`.

Exact match with looking, and with looking forbidden; how often the tag lay inside the crop; and
the positions that the language model computed, beside what the published procedure computes for
the same answers (two generations, two passes a step: FACTS of the release, its golden files'
``lm_tokens_total``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vpt_agent.agent import PerceptionAgent, Question
from vpt_agent.nano.alphabet import Split
from vpt_agent.nano.scene import Scene, make_scene
from vpt_agent.trace import Decoded, PerceptionAppended, Prefilled
from vpt_agent.types import Answer

FIRST_SEED = 10_000_000
"""Far above every seed that training draws from."""


@dataclass
class Score:
    """Sums over scenes; :meth:`to_dict` gives shares and means."""

    scenes: int = 0
    failed: int = 0
    exact: int = 0
    looked: int = 0
    localised: int = 0
    forward_tokens: int = 0
    published_tokens: int = 0
    visual_tokens: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Shares of scenes, means a scene, and the sums."""
        n = max(1, self.scenes)
        return {
            "scenes": self.scenes,
            "failed": self.failed / n,
            "exact_match": self.exact / n,
            "looked": self.looked / n,
            "tag_inside_crop": self.localised / n,
            "forward_tokens_per_answer": self.forward_tokens / n,
            "published_forward_tokens_per_answer": self.published_tokens / n,
            "visual_tokens_per_answer": self.visual_tokens / n,
            "seconds_per_answer": self.seconds / n,
            "sums": asdict(self),
        }


def published_forward_tokens(answer: Answer) -> int:
    """Positions the published procedure computes for the same answer.

    Each round is a generation of its own over the whole prompt, with two passes of the language
    model a step; the last token of a round is never fed.
    """
    total = 0
    prompt = 0
    for event in answer.trace.events:
        if isinstance(event, Prefilled):
            prompt = event.start + event.tokens
        elif isinstance(event, PerceptionAppended):
            prompt = event.start + sum(len(s.ids) for s in event.spans)
        elif isinstance(event, Decoded):
            new = sum(len(s.ids) for s in event.spans)
            total += 2 * (prompt + new - 1)
    return total


def _batches(split: Split, first: int, count: int, size: int) -> Iterator[list[Scene]]:
    for start in range(0, count, size):
        stop = min(count, start + size)
        yield [make_scene(first + i, split=split) for i in range(start, stop)]


def evaluate(
    agent: PerceptionAgent,
    *,
    split: Split = "train",
    scenes: int = 1000,
    first_seed: int = FIRST_SEED,
    tool_choice: str = "auto",
    batch: int = 25,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Ask one question on each of ``scenes`` unseen scenes; greedy. ``progress`` hears counts."""
    scores = evaluate_choices(
        agent,
        (tool_choice,),
        split=split,
        scenes=scenes,
        first_seed=first_seed,
        batch=batch,
        progress=progress,
    )
    return scores[tool_choice]


def evaluate_choices(
    agent: PerceptionAgent,
    choices: Sequence[str],
    *,
    split: Split = "train",
    scenes: int = 1000,
    first_seed: int = FIRST_SEED,
    batch: int = 25,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Score]:
    """As :func:`evaluate`, for several tool choices on the same scenes, drawn once."""
    scores = {choice: Score() for choice in choices}
    for drawn in _batches(split, first_seed, scenes, batch):
        questions = [Question(s.questions[0].question, s.image) for s in drawn]
        for choice, score in scores.items():
            began = time.perf_counter()
            answers = agent.run_batch(questions, tool_choice=choice)
            score.seconds += time.perf_counter() - began
            for scene, answer in zip(drawn, answers, strict=True):
                _count(score, scene, answer)
        if progress is not None:
            progress(len(drawn))
    return scores


def _count(score: Score, scene: Scene, answer: Answer) -> None:
    asked = scene.questions[0]
    score.scenes += 1
    score.failed += answer.status == "failed"
    score.exact += answer.text == asked.answer
    crops = [v for r in answer.results for v in r.views]
    score.looked += bool(crops)
    left, top, right, bottom = asked.regions[0]
    score.localised += any(
        v.box.left <= left and v.box.top <= top and v.box.right >= right and v.box.bottom >= bottom
        for v in crops
    )
    score.forward_tokens += answer.usage.forward_tokens
    score.published_tokens += published_forward_tokens(answer)
    score.visual_tokens += answer.usage.visual_tokens
