"""The paper's design choices on a reduced domain, at equal cost: grid, tokens or text, masks.

    python benchmarks/ablations.py --work DIR [--minutes 30] [--total-minutes M] [--part 1/2]

Every run trains a fresh small model on the scenes of `reduced.py` with the library's own training
code, the same steps and rows of batch for all, at most `--minutes` of CPU each, and is measured on
unseen scenes through the agent. One factor changes at a time. The runs stand in a queue: first the
two pairs that decide (grid 8 against 16, masks off against half), with three seeds each, seed by
seed; then the others. Finished runs are kept in `--work` and not run again; one that was killed
goes on from its checkpoint. `--total-minutes` begins no run after so many; `--part 1/2` takes every
second run, for two processes side by side; `--only PART` those whose name holds PART;
`--list` runs nothing and says what there is. Figures: `benchmarks/results/ablations.json`, which
`vpt-agent nano report` shows, with every run's cost; what was not run is said.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "ablations.json"
FIRST_UNSEEN = 10_000_000
EXACT, VALID = "exact match", "valid calls, unconstrained"
RATES = {"region": 1e-3, "box": 1e-3, "dino": 4e-4}
"""Peak learning rates. At 1e-3 many runs with the small DINOv2 end guessing: a group shows it."""


@dataclass(frozen=True)
class Run:
    """One training run. ``mask`` is ``off``, ``embeddings`` or ``attention``; ``rate``: another one
    than those of its kind."""

    kind: str
    grid: int = 8
    controls: int = 1
    mask: str = "off"
    ratio: float = 0.0
    seed: int = 0
    rate: float | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [self.kind]
        parts += [f"k{self.grid}"] if self.kind == "region" else []
        parts += [f"c{self.controls}", f"{self.mask}{self.ratio:g}"] if self.kind == "dino" else []
        parts += [] if self.rate is None else [f"rate{self.rate:g}"]
        return "-".join((*parts, f"s{self.seed}"))


def groups() -> list[dict[str, Any]]:
    """Every question with its runs: (label, run). A run may stand in several groups."""
    seeds = (0, 1, 2)
    plain = [("off", Run("dino", seed=s)) for s in seeds]
    half = [Run("dino", mask="embeddings", ratio=0.5, seed=s) for s in seeds]
    grid = [(f"k = {k}", Run("region", grid=k, seed=s)) for k in (8, 16) for s in seeds]
    grid += [(f"k = {k}", Run("region", grid=k)) for k in (4, 32)]
    return [
        {
            "name": "Region grid",
            "question": "how fine?",
            "measure": EXACT,
            "expected": ["k = 8", "k = 16", "k = 4"],
            "runs": grid,
        },
        {
            "name": "Region tokens or text",
            "question": "how is a region said?",
            "measure": VALID,
            "expected": ["region tokens", "box as text"],
            "runs": [("region tokens", Run("region")), ("box as text", Run("box"))],
        },
        {
            "name": "Control tokens",
            "question": "how many?",
            "measure": EXACT,
            "expected": ["1", "4"],
            "runs": [(str(n), Run("dino", controls=n)) for n in (1, 2, 4)],
        },
        {
            "name": "Mask modelling",
            "question": "how, at ratio 0.5?",
            "measure": EXACT,
            "expected": ["embeddings", "off"],
            "runs": [
                *plain,
                *(("embeddings", run) for run in half),
                ("attention", Run("dino", mask="attention", ratio=0.5)),
            ],
        },
        {
            "name": "Mask ratio",
            "question": "how much, by embeddings?",
            "measure": EXACT,
            "expected": ["0.5", "0.75"],
            "runs": [
                ("0", plain[0][1]),
                *((f"{r:g}", Run("dino", mask="embeddings", ratio=r)) for r in (0.25, 0.5, 0.75)),
            ],
        },
        {
            "name": "Learning rate",
            "question": "what does 1e-3 do to the runs above?",
            "measure": EXACT,
            "expected": [],
            "runs": [
                *(("off", Run("dino", seed=s, rate=1e-3)) for s in seeds),
                *(
                    (f"ratio {r:g}", Run("dino", mask="embeddings", ratio=r, seed=s, rate=1e-3))
                    for r, s in ((0.5, 0), (0.5, 1), (0.25, 0))
                ),
                ("4 control tokens", Run("dino", controls=4, rate=1e-3)),
            ],
        },
    ]


def queue() -> list[Run]:
    """All runs, each once, those that decide first: both sides of a pair before the next seed."""
    decide = [
        run
        for seed in (0, 1, 2)
        for run in (
            Run("region", grid=8, seed=seed),
            Run("region", grid=16, seed=seed),
            Run("dino", seed=seed),
            Run("dino", mask="embeddings", ratio=0.5, seed=seed),
        )
    ]
    others = (run for group in groups() for _, run in group["runs"])
    return list(dict.fromkeys((*decide, *others)))


def config_of(run: Run, folder: Path, rows: Path, args: argparse.Namespace) -> Any:
    """The library's training config of one run."""
    from vpt_agent.training import make_config

    parts = ["visual", "model", *(["detection"] if run.kind == "dino" else [])]
    return make_config(
        {
            "out": str(folder / "training"),
            "stage": "instruction",
            "trainable": parts,
            "model": {"path": str(folder / "fresh")},
            "data": {
                "sources": [{"path": str(rows)}],
                "rows": args.rows,
                "workers": 0,
                "max_length": 512,
            },
            "mask": {
                "paragraphs": 0 if run.mask == "off" else 1,
                "ratio": run.ratio,
                "how": "embeddings" if run.mask == "off" else run.mask,
                "draw": "row",
            },
            "optim": {
                "learning_rate": run.rate or RATES[run.kind],
                "weight_decay": 0.05,
                "betas": [0.9, 0.98],
                "warmup": 0.05,
            },
            "steps": args.steps,
            "save_every": max(1, args.steps // 20),
            "keep": 1,
            "log_every": 50,
            "seed": run.seed,
            "device": "cpu",
        }
    )


def perform(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure ``run``, or read what it gave; a killed one goes on."""
    import reduced

    folder: Path = args.work / run.name
    done = folder / "result.json"
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text())
        return found
    table = reduced.make_table(run.kind, grid=run.grid, controls=run.controls)
    kind = table.kinds[0]
    rows: Path = args.work / f"rows-{run.kind}-{run.grid}-{run.controls}.json"
    if not rows.is_file():
        reduced.write_rows(rows, kind, scenes=args.scenes, controls=run.controls)
    if not (folder / "fresh" / "ready").is_file():
        base = args.work / "base.safetensors"
        reduced.make_model(folder / "fresh", table, seed=run.seed, base=base)
        (folder / "fresh" / "ready").touch()
    trained = _train(run, folder, rows, args)
    began = time.process_time()
    measured = _measure(run, kind, folder, args)
    spent = time.process_time() - began
    result = {"run": run.name, **trained, **measured, "measuring_seconds": spent}
    part = done.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1))
    part.replace(done)
    return result


def _train(run: Run, folder: Path, rows: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Steps done, CPU seconds, and whether the time ended it."""
    from transformers import TrainerCallback

    from vpt_agent.training import train

    told = folder / "trained.json"
    if told.is_file():  # killed while it was measured
        found: dict[str, Any] = json.loads(told.read_text())
        return found
    clock = folder / "cpu_seconds"
    before = float(clock.read_text()) if clock.is_file() else 0.0
    began = time.process_time()
    stopped: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            if before + time.process_time() - began > 60 * args.minutes and not stopped:
                stopped.append(state.global_step)
                control.should_training_stop = True

        def on_save(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            clock.write_text(f"{before + time.process_time() - began:.1f}")

    config = config_of(run, folder, rows, args)
    begun = any((folder / "training").glob("checkpoint-*"))
    result = train(config, resume=begun, callbacks=[Clock()], say=_say(run))
    found = {
        "steps": result.steps,
        "cpu_seconds": before + time.process_time() - began,
        "stopped_by_time": bool(stopped),
        "loss": result.loss,
    }
    told.write_text(json.dumps(found))
    return found


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _say(run: Run) -> Any:
    return lambda line: _print(f"{run.name}: {line}")


def _measure(run: Run, kind: Any, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of the trained model on unseen scenes."""
    from functools import partial

    import reduced

    from vpt_agent.agent import PerceptionAgent
    from vpt_agent.evaluation import NO_TOOLS, Setting, evaluate, share, summarise
    from vpt_agent.types import Limits

    agent = PerceptionAgent.from_pretrained(
        folder / "training" / "final", device="cpu", tools=[look_at_box()]
    )
    seeds = range(FIRST_UNSEEN, FIRST_UNSEEN + args.unseen)
    items = {str(seed): partial(reduced.test_item, seed) for seed in seeds}
    forced = Setting(name=kind.name, tool_choice=kind.tool)
    limits = Limits(calls=1, new_tokens=40)
    evaluate(
        agent, items, [NO_TOOLS, forced], folder / "answers", limits=limits, progress=_say(run)
    )
    figures = summarise(folder / "answers")
    regions = figures["regions"].get(kind.name, {})
    result = figures["results"][kind.name]
    found = {EXACT: result["exact"]}
    for size in ("small", "large"):
        if size in result["by_type"]:
            found[f"{EXACT}, {size} objects"] = result["by_type"][size]
    for size in ("small", "large") if regions else ():
        found[f"IoU, {size} objects"] = regions[size]["iou"]
        found[f"IoGT, {size} objects"] = regions[size]["iogt"]
    if regions:
        found[VALID] = share(free_calls(agent, kind, [make() for make in items.values()])).to_dict()
    blind = figures["results"]["no tools"]["exact"]
    agent.close()
    return {"figures": found, "no_tools": blind}


def look_at_box() -> Any:
    """The tool behind a box that is written as text."""
    import reduced

    from vpt_agent.errors import ModelRetry
    from vpt_agent.tool import ToolContext, perception_tool
    from vpt_agent.types import View

    def look_at_box(context: ToolContext, box: str) -> View:
        """Look closer at a box.

        Args:
            box: left, top, right, bottom in hundredths of the picture
        """
        found = reduced.text_box(box)
        if found is None:
            raise ModelRetry(f"{box} is no box", "box_outside")
        return context.crop(context.require_view(), found)

    look_at_box.__annotations__ |= {"context": ToolContext, "box": str, "return": View}
    return perception_tool(look_at_box)


def free_calls(agent: Any, kind: Any, items: Sequence[Any]) -> list[bool]:
    """Whether each item's call is valid when nothing constrains the model after its start."""
    import reduced
    import torch

    from vpt_agent.engine import Sampler, Sampling, Tokens, TurnRules, Visual, decode_turn
    from vpt_agent.prompt.vpt import Ids
    from vpt_agent.tokens.grammar import Grammar
    from vpt_agent.vision.images import load_views

    layout, engine = agent.layout, agent.engine
    row = engine.table[kind.name]
    rules = TurnRules(
        grammar=Grammar(engine.table, kinds=(kind.name,)),
        end=layout.end,
        stop=layout.stop_ids,
        starts=frozenset((row.start,)),
        max_new_tokens=24,
        max_calls=1,
        first=frozenset((row.start,)),
        constrained=False,
    )
    valid = []
    for item in items:
        (view,) = load_views([item.picture()])
        (seen,) = engine.look("base", (view,))
        slot = Visual(layout.image_pad, seen.tokens, seen.grid, view.id)
        pieces = layout.opening([view.id], item.question)
        session = engine.session()
        with torch.inference_mode():
            parts = [Tokens(p.ids) if isinstance(p, Ids) else slot for p in pieces]
            logits = session.append(parts)[-1]
            turn = engine.drive([decode_turn(session, logits, Sampler(Sampling()), rules)])[0]
        session.close()
        calls = [c.parsed.arguments for c in turn.calls]
        if kind.payload == "text":
            calls = [c for c in calls if reduced.text_box(str(c[kind.argument])) is not None]
        valid.append(len(calls) == 1)
    return valid


def collect(args: argparse.Namespace, failed: Mapping[str, str]) -> dict[str, Any]:
    """All groups with what was run; what was not says so."""
    told = []
    for group in groups():
        runs = []
        for label, run in group["runs"]:
            path = args.work / run.name / "result.json"
            entry: dict[str, Any] = {"name": label, "seed": run.seed}
            if path.is_file():
                result = json.loads(path.read_text())
                keep = ("figures", "no_tools", "steps", "cpu_seconds", "measuring_seconds",
                        "stopped_by_time", "loss")  # fmt: skip
                entry |= {k: result[k] for k in keep if k in result}
            else:
                clock = args.work / run.name / "cpu_seconds"
                spent = f"begun: {float(clock.read_text()):.0f} s" if clock.is_file() else ""
                entry["missing"] = failed.get(run.name, spent or "not run")
            runs.append(entry)
        told.append({**group, "runs": runs})
    from vpt_agent.evaluation.store import machine

    return {
        "benchmark": "ablations",
        "about": f"A reduced domain (benchmarks/reduced.py): {args.steps} steps of {args.rows} "
        f"rows for every run, at most {args.minutes:g} CPU minutes each; measured on {args.unseen} "
        "unseen scenes. What holds here need not hold at full size.",
        "machine": machine(),
        "groups": told,
    }


def main() -> None:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps every run")
    parser.add_argument("--out", type=Path, help=f"JSON of all figures ({OUT.name})")
    parser.add_argument("--minutes", type=float, default=30, help="CPU minutes of a run, at most")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--scenes", type=int, default=6000, help="training scenes")
    parser.add_argument("--base-steps", type=int, default=2700, help="of the model all begin with")
    parser.add_argument("--unseen", type=int, default=500, help="scenes to measure on")
    parser.add_argument("--only", default="", help="only runs whose name holds this")
    parser.add_argument("--part", default="1/1", help="1/2 and 2/2 share the runs")
    parser.add_argument("--total-minutes", type=float, help="begin no run after so many")
    parser.add_argument("--list", action="store_true", help="only print what was run")
    args = parser.parse_args()
    number, _, parts = args.part.partition("/")
    if not (number.isdigit() and parts.isdigit() and 0 < int(number) <= int(parts)):
        parser.error(f"--part is I/N with 1 <= I <= N, not {args.part}")
    args.work = args.work.resolve()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    mine = [run for run in queue()[int(number) - 1 :: int(parts)] if args.only in run.name]
    failed = {} if args.list else run_all(mine, args)
    data = collect(args, failed)
    from vpt_agent.evaluation.runs import orders_table, tables_of_runs

    for table in (*tables_of_runs(data), orders_table(data), costs(data)):
        print(table.to_markdown() + "\n")
    out = args.out if args.list else args.out or OUT  # a look at a folder overwrites no figures
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written: {out}", file=sys.stderr)


def run_all(runs: Sequence[Run], args: argparse.Namespace) -> dict[str, str]:
    """Run them one after the other; gives the reasons of those that failed."""
    import reduced_base
    import torch

    from vpt_agent.errors import VPTError

    torch.set_num_threads(1)  # CPU time is what is compared
    reduced_base.learn_base(
        args.work, scenes=args.scenes, steps=args.base_steps, rate=reduced_base.RATE, say=_print
    )
    began, failed = time.monotonic(), dict[str, str]()
    for place, run in enumerate(runs, start=1):
        spent = (time.monotonic() - began) / 60
        if args.total_minutes is not None and spent > args.total_minutes:
            print(f"{len(runs) - place + 1} runs left: the time is up", file=sys.stderr)
            break
        try:
            result = perform(run, args)
        except VPTError as error:  # one run's trouble is told, and the others go on
            failed[run.name] = str(error)
            print(f"{run.name}: {error}", file=sys.stderr)
            continue
        print(
            f"{place} of {len(runs)}: {run.name}: exact {result['figures'][EXACT]['value']:.3f}, "
            f"{result['steps']} steps in {result['cpu_seconds'] / 60:.1f} CPU minutes",
            file=sys.stderr,
            flush=True,
        )
    return failed


def costs(data: Mapping[str, Any]) -> Any:
    """What every run cost, as a table."""
    from vpt_agent.evaluation import Table

    lines = {}
    for group in data["groups"]:
        for run in group["runs"]:
            if "cpu_seconds" in run:
                lines[group["name"], run["name"], run["seed"]] = (
                    f"{group['name']}: {run['name']}",
                    str(run["seed"]),
                    str(run["steps"]),
                    f"{run['cpu_seconds'] / 60:.1f}",
                    f"{run.get('measuring_seconds', 0.0) / 60:.1f}",
                    "yes" if run["stopped_by_time"] else "no",
                )
    return Table(
        "Costs",
        ("run", "seed", "steps", "CPU minutes of training", "of measuring", "stopped by time"),
        tuple(lines.values()),
    )


if __name__ == "__main__":
    main()
