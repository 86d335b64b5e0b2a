"""All that wants a GPU, in one command: ``python benchmarks/gpu.py --out DIR`` (under 9 minutes).

Steps, each in a process of its own with a limit of its own, so that one that fails or hangs takes
none of the others with it; each writes ``DIR/<step>.json`` with the machine's name:

- ``parity``: golden files and decoding on the device beside the host, float32 without TF32.
- ``one``: a 2B-shaped model of random weights in bfloat16, one stream: seconds a token by each way
  of decoding, as a share of the bandwidth limit, and the kernels of one step.
- ``many``: the same for 2 to 32 streams.
- ``answer``: two rounds beside the published procedure (``vpt-agent bench answer``).
- ``kernels``: the kernels' tests, and their times beside their limits.
- ``eight``: weights of eight bits; ``compiled``: the step compiled by torch first.
- ``throughput``: many questions together beside one after another.

``--dry-run`` does all of it on the CPU with a tiny model, in one process, and only collects tests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vpt_agent.bench.answer import Loaded, Settings, bench_answer
from vpt_agent.bench.kernels import bench_kernels
from vpt_agent.bench.limits import Costs
from vpt_agent.bench.machine import Rates, describe, measure_rates, stamp
from vpt_agent.bench.shapes import TWO_B, TextShape, VisionShape, random_model
from vpt_agent.bench.throughput import Crowd, bench_throughput
from vpt_agent.bench.timing import Spread
from vpt_agent.engine import Engine, Sampler, Sampling, Session, Tokens, TurnRules, decode_turn
from vpt_agent.engine.ahead import Decoding
from vpt_agent.model.weights import use_weights
from vpt_agent.tokens import Grammar

ROOT = Path(__file__).resolve().parents[1]
AIMS = {"share": 0.6, "ratio": 10.0}
"""Of the bandwidth limit, one stream; times faster than the published procedure."""
LIMITS = {"parity": 130, "one": 90, "many": 70, "answer": 110, "kernels": 110, "eight": 80,
          "throughput": 70, "compiled": 150}  # fmt: skip
"""Seconds for each step, most important first; all together ``--seconds``."""
TINY = (TextShape(64, 2, 4, 2, 128, 512, (2, 3, 3)), VisionShape(1, 32, 2))


@dataclass(frozen=True)
class Plan:
    """What is measured: ``tokens`` new ones behind ``prompt``, ``repeats`` times."""

    device: torch.device
    dry: bool
    prompt: int = 512
    tokens: int = 257
    streams: tuple[int, ...] = (2, 4, 8, 16, 32)
    repeats: int = 3
    weights: str = "own"

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float32 if self.dry else torch.bfloat16

    def load(self) -> Loaded:
        """A model of random weights, made on the device."""
        shape = TINY if self.dry else TWO_B
        loaded = Loaded(*random_model(*shape, device=self.device, dtype=self.dtype))
        use_weights(loaded.model, self.weights)
        return loaded

    def rates(self) -> Rates:
        """Bytes a second of one long reading, operations a second of a product."""
        stream = 2**24 if self.dry else 2**32
        return measure_rates(self.dtype, self.device, stream=stream, repeats=3)

    def wait(self) -> None:
        """Until the device has done what was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# --- decoding -------------------------------------------------------------------------------


def turn(
    session: Session, logits: torch.Tensor | None, rules: TurnRules
) -> Generator[Any, Any, float]:
    """One turn of words, greedy."""
    assert logits is not None, "they were asked for"
    told = yield from decode_turn(session, logits[-1], Sampler(Sampling()), rules)
    return told.ahead / told.count


def decode(plan: Plan, loaded: Loaded, rates: Rates, way: Decoding, rows: int) -> dict[str, Any]:
    """Seconds a step of ``rows`` streams, on the wall and of the bare step, beside the limit."""
    engine = Engine(loaded.model, loaded.processor.policy, decoding=way)
    vocab = loaded.model.config.get_text_config().vocab_size
    chance = torch.Generator().manual_seed(rows)
    sessions = [engine.session() for _ in range(rows)]
    prompts = torch.randint(0, min(vocab, 256), (rows, plan.prompt), generator=chance).tolist()
    fed = engine.drive([s.feed([Tokens(ids)]) for s, ids in zip(sessions, prompts, strict=True)])
    starts = frozenset(row.start for row in engine.table.rows)
    rules = TurnRules(Grammar(engine.table), -1, frozenset(), starts, plan.tokens, 0)
    seconds, began_all = [], time.perf_counter()
    shares: list[float] = []
    for _ in range(plan.repeats + 1):  # the first one records graphs, and compiles
        forks = [s.fork() for s in sessions]
        runs = [turn(s, f[-1].logits, rules) for s, f in zip(forks, fed, strict=True)]
        plan.wait()
        began = time.perf_counter()
        shares = engine.drive(runs)
        plan.wait()
        seconds.append((time.perf_counter() - began) / (plan.tokens - 1))
        for fork in forks:
            fork.close()
    costs = Costs.of(loaded.model)
    seen = rows * (plan.prompt + plan.tokens / 2) * engine.cache.shape.bytes_per_token
    least = (costs.decode_bytes + seen) / rates.bytes_per_second
    step = Spread.of(seconds[1:])
    return {
        "decoding": way,
        "rows": rows,
        "seconds_a_step": step.to_dict(),
        "bare_step": bare(plan, engine),
        "tokens_a_second": rows / step.median,
        "first_seconds": seconds[0] * (plan.tokens - 1),
        "limit": least,
        "share_of_limit": least / step.median,
        "chosen_on_device": min(shares),
        "ahead": None if engine.ahead is None else vars(engine.ahead.counters),
        "host_reads": engine.counters.host_reads,
        "whole": time.perf_counter() - began_all,
    }


def bare(plan: Plan, engine: Engine) -> float | None:
    """Seconds of a step alone, many in a row without a look of the host."""
    stepper = None if engine.ahead is None else engine.ahead.latest
    if stepper is None:
        return None
    count = 4 if plan.dry else 64
    with torch.inference_mode():
        stepper.load([], 0)
        stepper.launch(2)
        plan.wait()
        began = time.perf_counter()
        stepper.launch(count)
        plan.wait()
    return (time.perf_counter() - began) / count


def kernels_of_a_step(plan: Plan, engine: Engine) -> list[dict[str, Any]]:
    """What runs on the device in 8 steps, the longest first."""
    stepper = None if engine.ahead is None else engine.ahead.latest
    if stepper is None or plan.device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode(), profile(activities=[ProfilerActivity.CUDA]) as found:
        stepper.launch(8)
        plan.wait()
    rows = sorted(found.key_averages(), key=lambda e: -e.self_device_time_total)
    return [
        {"kernel": e.key[:120], "microseconds": e.self_device_time_total / 8, "calls": e.count / 8}
        for e in rows[:25]
    ]


def ways(plan: Plan, choices: tuple[Decoding, ...], counts: tuple[int, ...]) -> dict[str, Any]:
    """Every way of decoding with every number of streams."""
    loaded, rates = plan.load(), plan.rates()
    found = [decode(plan, loaded, rates, way, n) for n in counts for way in choices]
    best = max(found, key=lambda f: f["share_of_limit"] if f["rows"] == counts[0] else 0.0)
    return {"rates": rates.to_dict(), "decode": found, "best_share": best["share_of_limit"]}


# --- steps ----------------------------------------------------------------------------------


def one(plan: Plan) -> dict[str, Any]:
    """One stream, by host and device, and what a step is made of."""
    found = ways(plan, ("host", "device"), (1,))
    loaded = plan.load()
    engine = Engine(loaded.model, loaded.processor.policy, decoding="device")
    session = engine.session()
    logits = session.append([Tokens(range(10, 40))])
    starts = frozenset(row.start for row in engine.table.rows)
    rules = TurnRules(Grammar(engine.table), -1, frozenset(), starts, 20, 0)
    engine.drive([turn(session, logits, rules)])
    aim = {"aim": "decode, share of the bandwidth limit", "figure": found["best_share"],
           "wanted": AIMS["share"], "met": found["best_share"] >= AIMS["share"]}  # fmt: skip
    return found | {"kernels": kernels_of_a_step(plan, engine), "aims": [aim]}


def many(plan: Plan) -> dict[str, Any]:
    """Several streams on the device."""
    return ways(plan, ("device",), plan.streams)


def eight(plan: Plan) -> dict[str, Any]:
    """Weights of eight bits, as torch runs them and compiled."""
    if plan.dry:
        return ways(plan, ("device",), (1,)) | {"weights": "own: no torchao is asked for here"}
    found: dict[str, Any] = {}
    for weights in ("int8", "float8"):
        try:
            found[weights] = ways(replace(plan, weights=weights), ("device",), (1,))
        except Exception as error:  # the other may do; what went wrong is in the file
            found[weights] = {"failed": f"{type(error).__name__}: {error}"}
    return found


def compiled(plan: Plan) -> dict[str, Any]:
    """The step compiled by torch, with own and with eight-bit weights."""
    if plan.dry:
        return {"left out": "compiling takes a minute"}
    found = {"own": ways(plan, ("compiled-device",), (1,))}
    found["int8"] = ways(replace(plan, weights="int8"), ("compiled-device",), (1,))
    return found


def answer(plan: Plan) -> dict[str, Any]:
    """Two rounds beside the published procedure."""
    small = Settings(image=84, new_tokens=4, repeats=1, splits=1, decoding="device")
    settings = small if plan.dry else Settings(repeats=3, splits=1, decoding="device")
    return bench_answer(plan.load(), settings, shape="2b, random weights")


def throughput(plan: Plan) -> dict[str, Any]:
    """Many questions together."""
    small = Crowd(2, 84, 4, repeats=1, decoding="device")
    crowd = small if plan.dry else Crowd(32, 224, 128, repeats=1, decoding="device")
    return bench_throughput(plan.load(), crowd, shape="2b, random weights")


def kernels(plan: Plan) -> dict[str, Any]:
    """Tests, times beside what they stand in for, and beside their limits."""
    found = {"tests": run_tests(plan, ["tests/unit/kernels"])}
    if plan.dry:
        return found
    found["times"] = bench_kernels(device=plan.device, repeats=5)
    out = Path(os.environ.get("TMPDIR", "/tmp")) / f"limits_{os.getpid()}.json"
    command = [sys.executable, "benchmarks/kernel_limits.py", "--device", str(plan.device),
               "--repeats", "7", "--out", str(out)]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    found["limits"] = json.loads(out.read_text(encoding="utf-8"))
    return found


def parity(plan: Plan) -> dict[str, Any]:
    """Golden files, and device against host, in float32 without TF32."""
    paths = ["tests/parity/test_on_device.py", "tests/unit/engine/test_ahead.py",
             "tests/unit/engine/test_ahead_rows.py"]  # fmt: skip
    return {"tests": run_tests(plan, paths, LIMITS["parity"] - 15)}


def run_tests(plan: Plan, paths: list[str], seconds: float = 60) -> dict[str, Any]:
    """The last lines of a test run, as far as it came in ``seconds``; a dry run collects only."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    if plan.dry:
        command.append("--collect-only")
    here = os.environ | {"VPT_TEST_DEVICE": plan.device.type, "NVIDIA_TF32_OVERRIDE": "0"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=here, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace").splitlines()
        return {"passed": False, "stopped_after": seconds, "output": said[-60:]}
    return {"passed": done.returncode == 0, "output": done.stdout.splitlines()[-60:]}


STEPS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    "parity": parity, "one": one, "many": many, "answer": answer, "kernels": kernels,
    "eight": eight, "throughput": throughput, "compiled": compiled,
}  # fmt: skip


# --- running them ---------------------------------------------------------------------------


def run_step(name: str, plan: Plan, out: Path) -> bool:
    """Do one step, and write what came of it, a failure too."""
    began = time.perf_counter()
    head = {"what": f"gpu, {name}", "when": stamp(), "machine": describe(plan.device).to_dict()}
    try:
        found, fine = STEPS[name](plan), True
    except Exception as error:  # a step's trouble is its own, and stands in its file
        found = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc()}
        fine = False
    whole = head | {"dry_run": plan.dry, "seconds": time.perf_counter() - began} | found
    (out / f"{name}.json").write_text(json.dumps(whole, indent=1, default=str) + "\n", "utf-8")
    print(f"{name}: {'done' if fine else found['failed']} ({whole['seconds']:.0f} s)", flush=True)
    return fine


def run_apart(name: str, out: Path, device: str, seconds: float) -> bool:
    """Do one step in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--step", name, "--out", str(out),
               "--device", device]  # fmt: skip
    try:
        return subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        place = out / f"{name}.json"
        if not place.exists():
            failed = {"what": f"gpu, {name}", "failed": f"took longer than {seconds:.0f} s"}
            place.write_text(json.dumps(failed, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: stopped after {seconds:.0f} s", flush=True)
        return False


def main(arguments: list[str] | None = None) -> int:
    """Run the steps that are asked for; how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--step", choices=STEPS, action="append")
    parser.add_argument("--seconds", type=float, default=525, help="for all steps together")
    given = parser.parse_args(arguments)
    names = given.step or list(LIMITS)
    if not given.dry_run and given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this machine, or this build of torch, has no CUDA device; try --dry-run")
    given.out.mkdir(parents=True, exist_ok=True)
    if given.dry_run:
        dry = Plan(torch.device("cpu"), True, prompt=20, tokens=12, streams=(2, 3), repeats=1)
        return sum(not run_step(name, dry, given.out) for name in names)
    if given.step:
        plan = Plan(torch.device(given.device), False)
        return sum(not run_step(name, plan, given.out) for name in names)
    began, failed = time.perf_counter(), 0
    for name in names:
        left = given.seconds - (time.perf_counter() - began)
        if left < 15:
            print(f"{name}: no time left", flush=True)
            failed += 1
            continue
        failed += not run_apart(name, given.out, given.device, min(LIMITS[name], left))
    return failed


if __name__ == "__main__":
    sys.exit(main())
