"""Is perception used? One command that measures it and prints the whole table.

    python benchmarks/perception.py --work DIR [--scenes 2000] [--model CHECKPOINT]

Asks the model about unseen scenes (new ones, and new ones with fonts and backgrounds never trained
on): without tools, free to choose, forced to each of its kinds, and with every counterfactual
switch of `vpt_agent.evaluation` thrown. Kinds that the checkpoint calls untrained are not run, and
said to be untrained. `--baseline` adds models that were trained without perception tokens.
`--work` keeps every answer: the same command goes on after a kill. The figures go to `--out` (JSON)
as `vpt-agent nano report` reads them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

SPLITS = ("train", "unseen")
OUT = Path(__file__).parent / "results" / "perception.json"


@dataclass(frozen=True)
class Job:
    """One process's share: scenes ``first`` to ``first + count`` of a split."""

    split: str
    first: int
    count: int
    switched: int
    folder: Path
    model: str | None
    batch: int
    device: str
    baselines: tuple[str, ...]
    domain: str


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Equal shares of every split for the processes."""
    from vpt_agent.nano.agent_eval import FIRST_SEED

    jobs = []
    shards = max(1, args.processes // len(args.splits))
    size = -(-args.scenes // shards)
    for split in args.splits:
        for number in range(shards):
            start = number * size
            count = min(size, args.scenes - start)
            if count > 0:
                name = f"{split}-{start}-{count}"
                switched = -(-args.switch_scenes // shards)
                jobs.append(
                    Job(split, FIRST_SEED + start, count, switched, args.work / name, args.model,
                        args.batch, args.device, tuple(args.baseline), args.domain)
                )  # fmt: skip
    return jobs


def measure(job: Job) -> list[str]:
    """Ask all of a share; gives the kinds that the checkpoint calls untrained."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from vpt_agent.agent import PerceptionAgent
    from vpt_agent.evaluation import Setting, evaluate, standard_settings
    from vpt_agent.nano.report import domain_items, scene_items

    torch.set_num_threads(1)
    agent = PerceptionAgent.from_pretrained(job.model, device=job.device)
    agent.engine.features.capacity = 400  # the whole views of a chunk stay for all settings
    kinds = [row.kind for row in agent.engine.table.rows]
    untrained = [k.name for k in kinds if k.name in agent.abilities.untrained]
    settings = [
        replace(s, most=job.switched) if s.switches else s
        for s in standard_settings(kinds, untrained=untrained)
    ]
    agents = {"": agent}
    for baseline in job.baselines:
        name, _, path = baseline.partition("=")
        settings.insert(1, Setting(name=name, tool_choice="none"))
        agents[name] = PerceptionAgent.from_pretrained(path, device=job.device)
    reencodes = any(k.payload == "control" and k.name not in untrained for k in kinds)
    second = job.domain == "second" or (job.domain == "auto" and reencodes)
    make = domain_items if second else scene_items
    items = make(job.count, split=job.split, first=job.first)  # type: ignore[arg-type]

    def told(line: str) -> None:
        print(f"{job.folder.name}: {line}", file=sys.stderr, flush=True)

    evaluate(agents, items, settings, job.folder, batch=job.batch, progress=told)
    return untrained


def main() -> None:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps every answer")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON of all figures")
    parser.add_argument("--scenes", type=int, default=2000, help="scenes of each split")
    parser.add_argument("--switch-scenes", type=int, default=500, help="scenes for switches")
    parser.add_argument("--model", help="checkpoint folder or hub name; default: the shipped one")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="NAME=CHECKPOINT",
        help="a model without perception tokens, asked without tools (may be repeated)",
    )
    parser.add_argument(
        "--domain",
        choices=("auto", "first", "second"),
        default="auto",
        help="first: tags to be read; second: with marks, and questions of all needs; "
        "auto: the second for a model that was trained to re-encode",
    )
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    jobs = jobs_of(args)
    if args.processes == 1:
        found = [measure(job) for job in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            found = pool.map(measure, jobs, chunksize=1)
    from vpt_agent.evaluation import summarise, tables_of
    from vpt_agent.nano.aims import aims_table

    figures: dict[str, Any] = {
        "benchmark": "perception",
        "scenes": args.scenes,
        "switch_scenes": args.switch_scenes,
        "untrained": found[0],
        "splits": {
            split: summarise([j.folder for j in jobs if j.split == split]) for split in args.splits
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for split, told in figures["splits"].items():
        print(f"\n# {'new scenes' if split == 'train' else 'unseen fonts and backgrounds'}\n")
        for table in tables_of(told, untrained=found[0]):
            print(table.to_markdown() + "\n")
    print(aims_table(figures["splits"]).to_markdown())
    print(f"written: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
