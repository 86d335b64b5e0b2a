"""How long a cold process takes to begin: imports, the help text, the shipped model's first answer.

Each is a process of its own, in turn, with one thread; what counts is CPU time (user and system),
which other processes do not change much. The first round, which fills the file cache, is not
counted.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vpt_agent.bench.machine import stamp
from vpt_agent.bench.timing import Sample, Spread, spreads
from vpt_agent.errors import InternalError

IMPORT_AIM, HELP_AIM, ANSWER_AIM = 0.15, 0.4, 1.5
"""Seconds: ``import vpt_agent``, ``vpt-agent --help``, and what the shipped model's cold answer
takes beyond importing torch and transformers' Qwen2-VL classes."""

CLASSES = "import torch; from transformers import Qwen2VLForConditionalGeneration"
STAGES = """
import json, sys, time
at = [time.process_time()]
{classes}
at.append(time.process_time())
from vpt_agent import PerceptionAgent
at.append(time.process_time())
agent = PerceptionAgent.from_pretrained(device="cpu")
at.append(time.process_time())
answer = agent.run("What is written on the red tag?", image=sys.argv[1])
at.append(time.process_time())
print(json.dumps([b - a for a, b in zip([0.0, *at], at)]))
"""
ANSWER = """
import sys
from vpt_agent import PerceptionAgent
agent = PerceptionAgent.from_pretrained(device="cpu")
agent.run("What is written on the red tag?", image=sys.argv[1])
"""


def bench_import(
    *,
    repeats: int = 5,
    answer: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Seconds of each beginning, and the aims. ``answer`` False leaves the shipped model out."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "picture.png"
        _picture(file)
        commands: dict[str, list[str]] = {
            "nothing": ["-c", "pass"],
            "import": ["-c", "import vpt_agent"],
            "help": ["-c", "from vpt_agent.cli import main; main()", "--help"],
        }
        if answer:
            commands["classes"] = ["-c", CLASSES]
            commands["answer"] = ["-c", ANSWER, str(file)]
        samples: dict[str, list[Sample]] = {name: [] for name in commands}
        for number in range(-1, repeats):
            for name, command in commands.items():
                tell(f"{name}, round {number + 1} of {repeats}")
                sample, _ = _run(command)
                if number >= 0:
                    samples[name].append(sample)
        loaded = _run(["-c", "import sys, vpt_agent; print('torch' in sys.modules)"])[1]
        stages = _stages(file) if answer else {}
    return _figures(samples, loaded.strip() == "True", stages)


def _picture(file: Path) -> None:
    from vpt_agent.bench.answer import picture

    file.write_bytes(picture(448))


def _run(command: Sequence[str]) -> tuple[Sample, str]:
    """One process of this interpreter: its time, and what it printed."""
    before, began = _children(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wall = time.perf_counter() - began
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InternalError(
            "a measured process failed", where=command[1].strip().splitlines()[0], got=last
        )
    return Sample(wall, _children() - before), done.stdout


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _stages(file: Path) -> dict[str, float]:
    """CPU seconds of the cold answer by stage."""
    printed = _run(["-c", STAGES.format(classes=CLASSES), str(file)])[1]
    names = ("Python", "torch and transformers' classes", "the agent's own modules",
             "loading the model", "answer")  # fmt: skip
    return dict(zip(names, json.loads(printed.strip().splitlines()[-1]), strict=True))


def _figures(
    samples: Mapping[str, Sequence[Sample]], torch_loaded: bool, stages: Mapping[str, float]
) -> dict[str, Any]:
    # Starting Python costs what it costs: it is not the library's, and stands beside.
    begun = {
        name: [one.cpu - none.cpu for one, none in zip(own, samples["nothing"], strict=True)]
        for name, own in samples.items()
    }
    rows = [("import vpt_agent, seconds", Spread.of(begun["import"]).median, IMPORT_AIM),
            ("vpt-agent --help, seconds", Spread.of([s.cpu for s in samples["help"]]).median,
             HELP_AIM)]  # fmt: skip
    if "answer" in samples:
        pairs = zip(samples["answer"], samples["classes"], strict=True)
        more = Spread.of([one.cpu - other.cpu for one, other in pairs]).median
        rows.append(("cold answer beyond torch and transformers' classes, seconds", more,
                     ANSWER_AIM))  # fmt: skip
    aims = [
        {"aim": text, "figure": figure, "wanted": wanted, "at_least": False,
         "met": figure <= wanted}
        for text, figure, wanted in rows
    ]  # fmt: skip
    return {
        "what": "import",
        "when": stamp(),
        "timer": "cpu",
        "processes": {name: spreads(own) for name, own in samples.items()},
        "import_loads_torch": torch_loaded,
        "stages": dict(stages),
        "aims": aims,
    }
