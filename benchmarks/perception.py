"""Is perception used? One command that measures it and prints the whole table.

    python benchmarks/perception.py --work DIR [--scenes 2000] [--model CHECKPOINT] [--minutes 25]

Asks the model about scenes that no training drew, `--scenes` new ones and as many with fonts and
backgrounds never trained on: without tools, free to choose, forced to each of its kinds, and with
every counterfactual switch of `vpt_agent.evaluation` thrown. Which questions are asked under which
setting, and how many, `benchmarks/cells.py` says. Kinds that the checkpoint calls untrained are not
run, and said to be untrained. `--baseline` adds models that were trained without perception tokens;
`--equal-size` adds the base tower's second look at the size of the first, by the same weights,
which were trained with the larger one.

`--work` keeps every answer, in pieces of 100 scenes: the same command goes on after a kill, after
`--minutes`, or with larger numbers. The figures go to `--out` (JSON) as `vpt-agent nano report`
reads them; what was left unasked is said there, too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

SPLITS = ("train", "unseen")
TITLES = {"train": "new scenes", "unseen": "unseen fonts and backgrounds"}
OUT = Path(__file__).parent / "results" / "perception.json"
SHARD = 100
"""Scenes of a piece of work. Swaps take their donor from the same piece."""
NEW_TOKENS = 48
"""No right answer is half as long; a model that a switch has thrown off may never end."""
EQUAL = "clip, no larger than the first look"
POINTS = 400
"""Of control states so many are kept for the plot; the figures are of all."""


@dataclass(frozen=True)
class Job:
    """One piece of work: ``count`` scenes from number ``start`` of a split on."""

    split: str
    start: int
    count: int
    args: argparse.Namespace
    deadline: float | None

    @property
    def folder(self) -> Path:
        """Where its answers lie."""
        folder: Path = self.args.work / f"{self.split}-{self.start:05d}"
        return folder

    def late(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.time() > self.deadline


@dataclass(frozen=True)
class Done:
    """What a job leaves: unasked pairs of item and setting, asked ones, and the untrained kinds."""

    job: Job
    left: int
    asked: int
    untrained: tuple[str, ...]


@lru_cache(maxsize=8)
def load(name: str | None, device: str) -> Any:
    """An agent on one thread, once a process."""
    import torch

    from vpt_agent.agent import PerceptionAgent

    torch.set_num_threads(1)
    agent = PerceptionAgent.from_pretrained(name, device=device)
    agent.engine.features.capacity = 15 * SHARD  # all views of a piece stay for all settings
    return agent


def plan_of(job: Job, agent: Any, kinds: list[Any], untrained: list[str]) -> tuple[Any, ...]:
    """Settings, items and which of them belong together, of a job."""
    import cells

    from vpt_agent.evaluation import Setting, standard_settings
    from vpt_agent.nano.agent_eval import FIRST_SEED
    from vpt_agent.nano.report import domain_items, scene_items

    args = job.args
    switched = args.switches if job.split in args.switch_splits else 0
    settings = [
        s for s in standard_settings(kinds, untrained=untrained) if switched or not s.switches
    ]
    names = [name for name, _ in baselines(args)]
    settings[1:1] = [Setting(name=name, tool_choice="none") for name in names]
    reencodes = any(k.payload == "control" and k.name not in untrained for k in kinds)
    if args.equal_size:
        same = next(s for s in settings if s.kind == "clip" and not s.switches)
        settings.append(replace(same, name=EQUAL, states=False))
        names.append(EQUAL)
    limits = {"baselines": names, "switched": switched, "others": args.others,
              "baseline": args.baseline_questions}  # fmt: skip
    first, count = FIRST_SEED + job.start, job.count
    if args.domain == "first" or (args.domain == "auto" and not reencodes):
        items = scene_items(count, split=job.split, first=first)  # type: ignore[arg-type]
        plain = scene_items(args.scenes, split=job.split)  # type: ignore[arg-type]
        return settings, items, cells.Cells(cells.alike(plain), **limits)
    per = args.questions
    items = domain_items(count, split=job.split, first=first, per_scene=per)  # type: ignore[arg-type]
    every = domain_items(args.scenes, split=job.split, per_scene=per)  # type: ignore[arg-type]
    return settings, items, cells.Cells(cells.by_type(every), **limits)


def measure(job: Job) -> Done:
    """Ask all of a job, until it is late."""
    os.environ["OMP_NUM_THREADS"] = "1"
    agent = load(job.args.model, job.args.device)

    from vpt_agent.evaluation import evaluate
    from vpt_agent.types import Limits

    kinds = [row.kind for row in agent.engine.table.rows]
    untrained = [k.name for k in kinds if k.name in agent.abilities.untrained]
    settings, items, wanted = plan_of(job, agent, kinds, untrained)
    pairs = {(i, s.name) for i in items for s in settings if wanted(i, s)}
    if job.late() and not job.folder.is_dir():
        return Done(job, len(pairs), 0, tuple(untrained))
    agents = {"": agent}
    agents |= {name: load(path, job.args.device) for name, path in baselines(job.args)}
    if job.args.equal_size:
        agents[EQUAL] = load(str(equal_size(job.args)), job.args.device)
    store = evaluate(
        agents,
        items,
        settings,
        job.folder,
        batch=job.args.batch,
        chunk=SHARD * job.args.questions,
        limits=Limits(new_tokens=NEW_TOKENS),
        progress=_told(job),
        wanted=wanted,
        stop=job.late,
    )
    left = len(pairs - store.done)
    return Done(job, left, len(pairs) - left, tuple(untrained))


def equal_size(args: argparse.Namespace) -> Path:
    """A copy of the checkpoint whose base tower looks again at what it saw first."""
    from vpt_agent.config import shipped_model

    copy: Path = args.work / "equal-size"
    if not (copy / "config.json").is_file():
        source = Path(args.model or shipped_model())
        part = Path(tempfile.mkdtemp(dir=args.work))
        shutil.copytree(source, part, dirs_exist_ok=True)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        (kind,) = (k for k in config["perception"]["table"]["kinds"] if k["name"] == "clip")
        kind["input_size"] = None
        (part / "config.json").write_text(json.dumps(config), encoding="utf-8")
        part.rename(copy)
    return copy


def _told(job: Job) -> Callable[[str], None]:
    last = [0.0]

    def say(line: str) -> None:
        if time.monotonic() - last[0] > 20:
            last[0] = time.monotonic()
            print(f"  {job.folder.name}: {line}", file=sys.stderr, flush=True)

    return say


def baselines(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Names and checkpoints of the models without perception tokens."""
    parts = (text.partition("=") for text in args.baseline)
    return [(name, path) for name, _, path in parts]


def run(args: argparse.Namespace) -> list[Done]:
    """All jobs, the splits in turn, so that what a stop leaves is of both."""
    deadline = None if args.minutes is None else time.time() + 60 * args.minutes
    jobs = [
        Job(split, start, min(SHARD, args.scenes - start), args, deadline)
        for start in range(0, args.scenes, SHARD)
        for split in args.splits
    ]
    began, found = time.monotonic(), list[Done]()

    def count(done: Done) -> None:
        found.append(done)
        spent = (time.monotonic() - began) / 60
        ahead = spent / len(found) * (len(jobs) - len(found))
        print(
            f"{len(found)} of {len(jobs)} pieces, {spent:.1f} min, about {ahead:.0f} more"
            + (f"; {done.left} answers left out: the time is up" if done.left else ""),
            file=sys.stderr,
            flush=True,
        )

    if args.processes == 1:
        for job in jobs:
            count(measure(job))
    else:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            for done in pool.imap_unordered(measure, jobs, chunksize=1):
                count(done)
    return found


def figures_of(args: argparse.Namespace, found: list[Done]) -> dict[str, Any]:
    """What all answers in the work folder say."""
    from vpt_agent.evaluation import summarise

    splits = {}
    for split in args.splits:
        folders = [d.job.folder for d in found if d.job.split == split and d.asked]
        if not folders:
            continue
        told = summarise(sorted(folders))
        for model in told["models"].values():  # the folder's name, not where it lies
            model["name"] = Path(str(model["name"])).name
        for states in told["states"].values():
            for key in ("points", "types"):
                states[key] = states.get(key, [])[:POINTS]
        splits[split] = told
    return {
        "benchmark": "perception",
        "scenes": args.scenes,
        "questions_a_scene": args.questions,
        "questions_by_cell": {
            "switched": args.switches, "elsewhere": args.others,
            "baselines": args.baseline_questions,
        },
        "unasked": sum(d.left for d in found),
        "untrained": list(found[0].untrained),
        "splits": splits,
    }  # fmt: skip


def parsed() -> argparse.Namespace:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps every answer")
    parser.add_argument("--out", type=Path, default=OUT, help="JSON of all figures")
    parser.add_argument("--scenes", type=int, default=2000, help="scenes of each split")
    parser.add_argument("--questions", type=int, default=1, help="questions a scene")
    parser.add_argument("--minutes", type=float, help="stop then; the same command goes on")
    parser.add_argument("--switches", type=int, default=300, help="questions for every switch")
    parser.add_argument("--switch-splits", nargs="*", choices=SPLITS, default=["train"])
    parser.add_argument(
        "--others", type=int, default=40, help="questions of each type for kinds it does not need"
    )
    parser.add_argument("--model", help="checkpoint folder or hub name; default: the shipped one")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="NAME=CHECKPOINT",
        help="a model without perception tokens, asked without tools (may be repeated)",
    )
    parser.add_argument("--equal-size", action="store_true", help="clip as large as the first look")
    parser.add_argument(
        "--baseline-questions", type=int, default=80, help="of each type for the baselines"
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
    if args.model and Path(args.model).exists():
        args.model = str(Path(args.model).resolve())
    if args.equal_size:  # before there are several processes
        args.work.mkdir(parents=True, exist_ok=True)
        equal_size(args)
    return args


def main() -> None:
    """Measure, write the figures, print them."""
    args = parsed()
    figures = figures_of(args, run(args))
    from vpt_agent.evaluation import tables_of
    from vpt_agent.nano.aims import aims_table

    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for split, told in figures["splits"].items():
        print(f"\n# {TITLES[split]}\n")
        for table in tables_of(told, untrained=figures["untrained"]):
            print(table.to_markdown() + "\n")
    print(aims_table(figures["splits"]).to_markdown())
    if figures["unasked"]:
        print(f"{figures['unasked']} answers were not asked for: the same command goes on.")
    print(f"written: {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
