"""Does a price on visual tokens remove needless looks, and nothing else? One command, resumable.

    python benchmarks/reinforce.py --work DIR [--model CHECKPOINT] [--tune-steps 300] [--steps 40]

1. A short supervised tuning (`vpt_agent.training.train`) teaches the model questions that need no
   look (``--none``: types of `vpt_agent.nano.domain`), and to look at some tag on half of them;
   region questions, one type among them, keep their look.
2. The policy gradient (`vpt_agent.training.reinforce`) on fresh scenes: exact match less a price
   for every visual token that a call adds.
3. Both checkpoints answer the same unseen scenes, greedily and sampled at temperature 1; the table
   says exact match and looks a question before and after, by type, with counts and 95 % intervals.

`--work` keeps everything: the same command goes on after a kill. `--out` keeps the figures (JSON).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "reinforce.json"
TUNE_SEED, LEARN_SEED, TEST_SEED = 7_000_000, 7_200_000, 7_400_000
REGION = "region"


@dataclass(frozen=True)
class Asked:
    """One question about scene ``seed``, with its picture and the box of some tag in it."""

    seed: int
    image: Any
    size: tuple[int, int]
    type: str
    question: str
    answer: str
    box: tuple[int, int, int, int]


def plain_scene(seed: int) -> Any:
    """A scene as the shipped model knows them, without marks on its tags."""
    from vpt_agent.nano.domain import DomainScene, MarkedTag
    from vpt_agent.nano.questions import describe
    from vpt_agent.nano.scene import make_scene

    scene = make_scene(seed)
    names = describe([t.style for t in scene.tags], [t.box for t in scene.tags], scene.size)
    tags = [
        MarkedTag(tag, None, None, tuple(dict.fromkeys(own)))
        for tag, own in zip(scene.tags, names, strict=True)
    ]
    return DomainScene(seed, "train", scene.image, scene.size, tuple(tags), scene.questions)


def ask_scene(seed: int, kind: str) -> Asked | None:
    """A question of type ``kind`` about scene ``seed``, if it has one."""
    from vpt_agent.nano.domain import ask

    scene = plain_scene(seed)
    asked = ask(scene, kind)
    if asked is None:
        return None
    tag = random.Random(f"look {seed}").choice(scene.tags).tag
    box = asked.boxes[0] if asked.boxes else tag.box
    return Asked(seed, scene.image, scene.size, kind, asked.question, asked.answer, box)


def turns(none: Sequence[str], *, half: bool = True) -> list[str]:
    """Types in turn: ``half`` of them region questions, or region one among the others."""
    return [k for name in none for k in (REGION, name)] if half else [REGION, *none]


def questions(first: int, count: int, turn: Sequence[str]) -> Iterator[Asked]:
    """``count`` questions about scenes from ``first`` on, of the types in ``turn`` in turn."""
    seed = first
    for number in range(count):
        while (found := ask_scene(seed, turn[number % len(turn)])) is None:
            seed += 1
        seed += 1
        yield found


# --- 1. tuning ------------------------------------------------------------------------------------


def write_rows(folder: Path, asked: Iterator[Asked]) -> Path:
    """Rows to tune on: region rows look, the others in turn look at some tag or do not."""
    from vpt_agent.cli.scenes import region_row

    path = folder / "rows.json"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    looked: dict[str, int] = {}
    for number, a in enumerate(asked):
        name = f"{number}.png"
        a.image.save(folder / name, compress_level=1)
        looked[a.type] = looked.get(a.type, 0) + 1
        row = region_row(name, a.size, a.question, a.box, a.answer)
        if a.type != REGION and looked[a.type] % 2:
            row = {"messages": [row["messages"][0], row["messages"][-1]], "images": [name]}
        rows.append(row | {"meta": {"type": a.type, "answer": a.answer}})
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def tune(args: argparse.Namespace) -> Path:
    """The tuned checkpoint."""
    from vpt_agent.training import make_config, train

    out: Path = args.work / "tuned"
    if (out / "final").exists():
        return out / "final"
    say(f"tuning: {args.tune_steps} steps")
    asked = questions(TUNE_SEED, args.tune_rows, turns(args.none, half=False))
    rows = write_rows(args.work / "rows", asked)
    config = make_config(
        {
            "out": str(out),
            "stage": "instruction",
            "model": {"path": args.model, "positions": "mrope"},
            "data": {
                "sources": [{"path": str(rows)}],
                "rows": args.tune_batch,
                "workers": 0,
                "hold_out": 16,
                "max_length": 1024,
            },
            "optim": {"learning_rate": args.tune_rate, "warmup": 0.05, "schedule": "cosine"},
            "frozen": list(args.frozen),
            "steps": args.tune_steps,
            "log_every": 10,
            "save_every": 50,
            "seed": args.seed,
            "device": args.device,
        }
    )
    return train(config, resume=any(out.glob("checkpoint-*")), say=say).checkpoint


# --- 2. the policy gradient -----------------------------------------------------------------------


class Scenes(Sequence[Any]):
    """Problems drawn when they are taken; every second one is a region question."""

    def __init__(self, count: int, none: Sequence[str]) -> None:
        self.count, self.turn = count, turns(none)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        from vpt_agent.training.reinforce import Problem

        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        seed = LEARN_SEED + index * 10
        kind = self.turn[index % len(self.turn)]
        while (a := ask_scene(seed, kind)) is None:
            seed += 1
        return Problem(a.question, a.answer, (a.image,), a.type)


def learn(args: argparse.Namespace, tuned: Path) -> Path:
    """The checkpoint after the policy gradient."""
    from vpt_agent.training.reinforce import endless, make_reinforce_config, reinforce

    out: Path = args.work / "reinforced"
    if (out / "final").exists():
        return out / "final"
    say(f"policy gradient: {args.steps} steps")
    config = make_reinforce_config(
        {
            "out": str(out),
            "model": str(tuned),
            "steps": args.steps,
            "questions": args.questions,
            "group": args.group,
            "rewards": [
                {"use": "exact_match"},
                {"use": "visual_tokens", "weight": -args.price},
            ],
            "update": {
                "learning_rate": args.rate,
                "warmup": 3,
                "advantage": args.advantage,
                "kl": args.kl,
                "rows": 16,
            },
            "calls": 2,
            "rounds": 2,
            "new_tokens": 32,
            "batch": 64,
            "frozen": list(args.frozen),
            "save_every": 5,
            "seed": args.seed,
            "device": args.device,
        }
    )
    stream = endless([(Scenes(4000, args.none), 1.0)], seed=args.seed)
    begun = any(p.is_dir() for p in out.glob("checkpoint-*") if not p.name.endswith(".draft"))
    return reinforce(config, resume=begun, problems=stream, say=say).checkpoint


# --- 3. before and after --------------------------------------------------------------------------


def measure(args: argparse.Namespace, name: str, checkpoint: Path) -> list[dict[str, Any]]:
    """One line a question and way of decoding; kept in a file."""
    path: Path = args.work / f"{name}.json"
    if path.exists():
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return found
    from vpt_agent.agent import PerceptionAgent, Question
    from vpt_agent.training.reinforce import Problem
    from vpt_agent.training.reinforce.rewards import visual_tokens

    say(f"measuring {name}: {args.eval} questions, greedy and sampled")
    agent = PerceptionAgent.from_pretrained(checkpoint, device=args.device)
    rows: list[dict[str, Any]] = []
    asked = list(questions(TEST_SEED, args.eval, turns(args.none)))
    for first in range(0, len(asked), 25):
        part = asked[first : first + 25]
        for way, heat in (("greedy", 0.0), ("sampled", 1.0)):
            batch = [Question(a.question, a.image, seed=a.seed) for a in part]
            answers = agent.run_batch(batch, temperature=heat)
            for a, answer in zip(part, answers, strict=True):
                rows.append(
                    {
                        "seed": a.seed,
                        "type": a.type,
                        "way": way,
                        "right": answer.text == a.answer,
                        "looks": len(answer.calls),
                        "visual_tokens": visual_tokens(Problem(a.question, a.answer), answer),
                    }
                )
    path.write_text(json.dumps(rows), encoding="utf-8")
    return rows


def table(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Exact match, looks and visual tokens a question, before and after, by way and type."""
    from vpt_agent.evaluation.intervals import difference, mean, share

    kinds = list(dict.fromkeys(row["type"] for row in before))
    needless = [k for k in kinds if k != REGION]
    lines = []
    for way in ("greedy", "sampled"):
        for name, types in (*((k, [k]) for k in kinds), ("all without need", needless)):
            pair = [
                [r for r in rows if r["way"] == way and r["type"] in types]
                for rows in (before, after)
            ]
            line: dict[str, Any] = {"way": way, "type": name, "n": len(pair[0])}
            for when, rows in zip(("before", "after"), pair, strict=True):
                line[when] = {
                    "right": sum(r["right"] for r in rows),
                    "exact": str(share([r["right"] for r in rows])),
                    "looked": sum(r["looks"] > 0 for r in rows),
                    "looks": str(mean([float(r["looks"]) for r in rows])),
                    "visual_tokens": sum(r["visual_tokens"] for r in rows) / max(1, len(rows)),
                }
            line["exact_difference"] = asdict(
                difference(*([float(r["right"]) for r in rows] for rows in reversed(pair)))
            )
            lines.append(line)
    return lines


def show(lines: Sequence[dict[str, Any]]) -> None:
    """The table on standard output."""
    head = ("decoding", "type", "n", "exact before", "exact after", "looks before", "looks after")
    rows = [
        (
            line["way"],
            line["type"],
            str(line["n"]),
            *(f"{line[when]['exact']} ({line[when]['right']})" for when in ("before", "after")),
            *(line[when]["looks"] for when in ("before", "after")),
        )
        for line in lines
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def say(text: str) -> None:
    """Progress, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="keeps everything; resumes")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--model", default="shipped")
    parser.add_argument("--none", nargs="+", default=["is_there", "count_tags"])
    parser.add_argument("--tune-steps", type=int, default=300)
    parser.add_argument("--tune-rows", type=int, default=1500)
    parser.add_argument("--tune-batch", type=int, default=16)
    parser.add_argument("--tune-rate", type=float, default=8e-4)
    parser.add_argument("--frozen", nargs="+", default=["visual"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--questions", type=int, default=6)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--price", type=float, default=0.002, help="a visual token")
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--advantage", choices=("none", "std"), default="none")
    parser.add_argument("--kl", type=float, default=None, help="weight; without it not measured")
    parser.add_argument("--eval", type=int, default=240, help="questions, half of them region")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu"), default="cpu")
    return parser.parse_args()


def main() -> None:
    """Run what is not done yet, and print the table."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    began = time.time()
    tuned = tune(args)
    before = measure(args, "before", tuned)
    reinforced = learn(args, tuned)
    after = measure(args, "after", reinforced)
    lines = table(before, after)
    show(lines)
    told = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    told = {k: v for k, v in told.items() if k not in ("work", "out")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made = {"arguments": told, "seconds_this_time": time.time() - began, "table": lines}
    args.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
