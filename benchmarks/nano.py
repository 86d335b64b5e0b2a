"""Measures a model on the first version's questions: tags to be read, nothing else.

    python benchmarks/nano.py --out FILE [--model CHECKPOINT] [--baselines EVAL.json]

Asks one question on each of 1000 scenes per split, through the agent: looking, and with looking
forbidden; also the positions that the published procedure would compute for the same answers. The
two splits run in two processes of one thread each. `--baselines` takes the JSON that `python -m
vpt_agent.nano.recipe --stage eval` wrote, whose baselines are not shipped. What the model that
ships can do beyond that, `benchmarks/perception.py` measures. `results/nano.json` is of the second
weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def measure_split(job: tuple[str, int, str | None]) -> dict[str, Any]:
    """One split in a process of its own: looking, and looking forbidden."""
    split, scenes, model = job
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from vpt_agent.agent import PerceptionAgent
    from vpt_agent.nano.agent_eval import evaluate_choices

    torch.set_num_threads(1)
    agent = PerceptionAgent.from_pretrained(model)
    done = 0

    def told(more: int) -> None:
        nonlocal done
        done += more
        print(f"{split}: {done} of {scenes} scenes", file=sys.stderr)

    scores = evaluate_choices(agent, ("auto", "none"), split=split, scenes=scenes, progress=told)
    return {
        "looking": scores["auto"].to_dict(),
        "looking_forbidden": scores["none"].to_dict(),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch
    import transformers

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def measure(args: argparse.Namespace) -> None:
    """Measure both splits and write the file."""
    jobs = [(split, args.scenes, args.model) for split in ("train", "unseen")]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = dict(zip(("train", "unseen"), pool.map(measure_split, jobs), strict=True))
    figures: dict[str, Any] = {"machine": machine(), **results}
    if args.baselines:
        figures["baselines"] = json.loads(args.baselines.read_text())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))


def table(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    rows = ["| | new scenes | new fonts and backgrounds |", "|---|---|---|"]

    def row(name: str, values: list[float]) -> None:
        rows.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in values) + " |")

    splits = [figures["train"], figures["unseen"]]
    row("the model, looking again", [s["looking"]["exact_match"] for s in splits])
    row("the same, forbidden to look", [s["looking_forbidden"]["exact_match"] for s in splits])
    for name, values in _baselines(figures.get("baselines", {})):
        row(name, values)
    look = splits[0]["looking"]
    ratio = look["published_forward_tokens_per_answer"] / look["forward_tokens_per_answer"]
    return "\n".join(rows) + (
        f"\n\nExact match on {look['scenes']} scenes each, one question a scene. "
        f"The tag lay inside the crop in {splits[0]['looking']['tag_inside_crop']:.3f} and "
        f"{splits[1]['looking']['tag_inside_crop']:.3f} of them. An answer computes "
        f"{look['forward_tokens_per_answer']:.0f} positions of the language model; the published "
        f"procedure computes {look['published_forward_tokens_per_answer']:.0f} for the same "
        f"answer, {ratio:.1f} times as many."
    )


def _baselines(told: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """Rows of the recipe's own evaluation, whose baselines are not shipped."""
    stages = {"baseline, same view": "baseline-global", "baseline, larger view": "baseline-large"}
    splits = ("new scenes", "new scenes, unseen fonts and backgrounds")
    return [
        (
            f"{name}, no second look ({told['samples_seen'][stage]:,} samples, "
            f"{told['scenes_per_split']} scenes)",
            [told[split][name]["exact"] for split in splits],
        )
        for name, stage in stages.items()
        if stage in told.get("samples_seen", {})
    ]


def main() -> None:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--model", default=None)
    parser.add_argument("--baselines", type=Path)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
