"""A perception token of your own: the small model learns to look parts up in a table.

The tool is not visual: it takes a text and gives one. The kind `lookup` is added to the model that
ships with the package, rows are built, the model is tuned on the CPU, saved, loaded and asked. A
quarter of the rows are questions about the scene, so that it learns when not to look up.

    python examples/own_token.py [--steps 120] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from vpt_agent import ModelRetry, PerceptionAgent, perception_tool
from vpt_agent.agent import Question
from vpt_agent.config import shipped_model
from vpt_agent.data.builder import Annotation, Recipe, build_rows, write_rows
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor, add_perception_kind
from vpt_agent.nano.scene import make_scene
from vpt_agent.tokens import own_kind
from vpt_agent.trace.show import render_text
from vpt_agent.training import make_config, train
from vpt_agent.types import Box

LETTERS, DIGITS = "ABCDEFGHJKLMNPRSTUVW", "23456789"
KEYS = [letter + digit for letter in LETTERS for digit in DIGITS]
BINS = {key: f"{random.Random(key).randrange(22, 99)}" for key in KEYS}
QUESTIONS = ("Which bin holds part {}?", "Where is part {}?", "Look up part {}.")
PICTURES, UNSEEN = 12, 40


@perception_tool
def lookup(key: str) -> str:
    """Say in which bin of the store a part lies.

    Args:
        key: the part's letter and digit
    """
    if key not in BINS:
        raise ModelRetry(f"there is no part {key}")
    return f"bin {BINS[key]}"


# A call is <|lookup_start|>K7<|lookup_end|>: whatever the model says in it fits the pattern.
LOOKUP = own_kind("lookup", payload="text", pattern="[A-HJ-NPR-W][2-9]", argument="key")


def annotations(folder: Path, keys: Sequence[str], *, first: int) -> list[Annotation]:
    """Questions that the table answers, and as many that the picture does."""
    chance, found = random.Random(first), list[Annotation]()
    about_parts = iter(keys)
    for seed in range(first, first + PICTURES):
        scene = make_scene(seed)
        image = str(folder / f"{seed}.png")
        scene.image.save(image)
        about_scene = [
            Annotation(image, q.question, q.answer, tuple(Box(*r) for r in q.regions))
            for q in scene.questions
        ]
        found += about_scene
        for key in [k for k, _ in zip(about_parts, range(-(-len(keys) // PICTURES)), strict=False)]:
            question = chance.choice(QUESTIONS).format(key)
            found.append(
                Annotation(image, question, BINS[key], argument=key, result=f"bin {BINS[key]}")
            )
    return found


def add_the_kind(folder: Path) -> Path:
    """The small model with the new kind, as a checkpoint to start from."""
    model = VPTForConditionalGeneration.from_pretrained(shipped_model(), dtype="float32")
    processor = VPTProcessor.from_pretrained(shipped_model(), config=model.config)
    added = add_perception_kind(model, processor, LOOKUP, tool=lookup)
    print(f"tokens added: {', '.join(f'{token} = {at}' for token, at in added.tokens.items())}")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tune(start: Path, rows: Path, out: Path, steps: int) -> Path:
    """Instruction tuning with the library's trainer; the vision towers stay as they are."""
    config = make_config(
        {
            "out": str(out),
            "stage": "instruction",
            "model": {"path": str(start), "remember": 0.5},
            "data": {"sources": [{"path": str(rows)}], "rows": 12, "workers": 0},
            "optim": {"learning_rate": 2e-3, "warmup": 0.1},
            "steps": steps,
            "log_every": max(1, steps // 6),
            "device": "cpu",
        }
    )
    return train(config).checkpoint


def ask(agent: PerceptionAgent, questions: Sequence[Annotation]) -> tuple[float, float]:
    """Share of part questions answered exactly, and share of scene questions without a look-up."""
    answers = agent.run_batch([Question(q.question, q.image) for q in questions])
    parts = [(q, a) for q, a in zip(questions, answers, strict=True) if q.result]
    scenes = [(q, a) for q, a in zip(questions, answers, strict=True) if not q.result]
    exact = [a.text == q.answer and a.calls[:1] != () for q, a in parts]
    quiet = [all(call.kind != LOOKUP.name for call in a.calls) for _, a in scenes]
    return sum(exact) / len(exact), sum(quiet) / len(quiet)


def main(steps: int, out: Path) -> None:
    """Add, build, tune, save, load, ask."""
    began = time.perf_counter()
    (out / "pictures").mkdir(parents=True)
    keys = random.Random(0).sample(KEYS, len(KEYS))
    start = add_the_kind(out / "start")
    seen = annotations(out / "pictures", keys[UNSEEN:], first=7_000_000)
    unseen = annotations(out / "pictures", keys[:UNSEEN], first=8_000_000)[: 2 * UNSEEN]

    agent = PerceptionAgent.from_pretrained(start, device="cpu", tools=[lookup])
    built = build_rows(
        seen,
        Recipe(
            shares={"lookup": 3, "region": 1},
            table=agent.engine.table.table,
            trigger=0,
            regions=agent.abilities.regions,
        ),
    )
    write_rows(built.rows, out / "rows.jsonl")
    print(f"rows: {dict(built.kinds)}")
    before = ask(agent, unseen)

    final = tune(start, out / "rows.jsonl", out / "run", steps)
    agent = PerceptionAgent.from_pretrained(final, device="cpu", tools=[lookup])
    after = ask(agent, unseen)
    print(f"parts never asked for in training, exact match: {before[0]:.2f} -> {after[0]:.2f}")
    print(f"scene questions without a look-up: {before[1]:.2f} -> {after[1]:.2f}")

    question = next(q for q in unseen if q.result)
    answer = agent.run(question.question, question.image, trace=out / "trace")
    Console(width=100).print(render_text(answer.trace))  # vpt-agent trace show, in code
    print(f"right: {question.answer}; {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=120, help="optimiser steps")
    parser.add_argument("--out", type=Path, help="a new folder to keep it all in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        main(options.steps, options.out or Path(temporary) / "own_token")
