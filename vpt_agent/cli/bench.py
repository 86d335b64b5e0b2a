"""``vpt-agent bench``: measurements that print whether an aim is met."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpt_agent.cli.ask import Compiled, Decoding, Weights
from vpt_agent.cli.output import clear_errors, note, print_json, writing
from vpt_agent.errors import UserError

if TYPE_CHECKING:
    from vpt_agent.bench.answer import Loaded

app = typer.Typer(no_args_is_help=True, help="Measure, side by side in one run.")

Out = Annotated[Path | None, typer.Option(help="Write the figures here (JSON).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the CPU.")]
Model = Annotated[
    str | None, typer.Option(metavar="DIR", help="A checkpoint; without it, random weights.")
]
Shape = Annotated[str, typer.Option(help="Shape of the random weights: 40m, 300m or 2b.")]
Force = Annotated[str, typer.Option(metavar="KIND", help="The kind that the first turn calls.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


@app.callback()
def _bench() -> None:
    """Measure, side by side in one run."""


@app.command()
@clear_errors
def answer(
    model: Model = None,
    shape: Shape = "40m",
    image: Annotated[int, typer.Option(min=28, metavar="PX", help="Side of the picture.")] = 448,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the second turn.")] = 32,
    force: Force = "clip",
    repeats: Annotated[int, typer.Option(min=1, help="Answers of each procedure, in turn.")] = 7,
    threads: Threads = 1,
    dtype: Dtype = "float32",
    baseline_dtype: Annotated[
        str | None, typer.Option(help="Of the published procedure; without it, the same.")
    ] = None,
    device: Device = "cpu",
    weights: Weights = "own",
    decoding: Decoding = "auto",
    compiled: Compiled = False,
    drawn: Annotated[
        Path | None, typer.Option("--picture", help="Draw where the time goes (PNG).")
    ] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """One answer in two rounds, beside the published procedure written plainly."""
    from vpt_agent.bench.answer import Settings, bench_answer
    from vpt_agent.bench.timeline import check_plots, draw
    from vpt_agent.engine.ahead import check_decoding

    way = check_decoding(decoding)
    _ready(out, drawn)
    _one_thread(compiled, threads, device, dtype)
    if drawn is not None:
        check_plots()
    ours, name = _load(model, shape, force, device, dtype, weights)
    other = None
    if baseline_dtype not in (None, dtype) or weights != "own":
        other = _load(model, shape, force, device, baseline_dtype or dtype)[0]
    settings = Settings(image, new_tokens, force, repeats, threads, decoding=way, compiled=compiled)
    figures = bench_answer(ours, settings, baseline=other, shape=name, tell=_tell)
    if drawn is not None:
        with writing(drawn):
            draw(figures, drawn)
    _done(figures, out, as_json, _answer_lines(figures))


@app.command()
@clear_errors
def throughput(
    model: Model = None,
    shape: Shape = "40m",
    questions: Annotated[int, typer.Option(min=2, help="How many, each with a picture.")] = 16,
    image: Annotated[int, typer.Option(min=28, metavar="PX", help="Side of a picture.")] = 224,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each second turn.")] = 128,
    force: Force = "clip",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each way, in turn.")] = 2,
    threads: Threads = 1,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    weights: Weights = "own",
    decoding: Decoding = "auto",
    compiled: Compiled = False,
    alone: Annotated[
        int, typer.Option(min=1, metavar="N", help="How many are asked one after another, too.")
    ] = 4,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Many questions together, beside one after another."""
    from vpt_agent.bench.throughput import Crowd, bench_throughput
    from vpt_agent.engine.ahead import check_decoding

    way = check_decoding(decoding)
    _ready(out)
    _one_thread(compiled, threads, device, dtype)
    loaded, name = _load(model, shape, force, device, dtype, weights)
    crowd = Crowd(questions, image, new_tokens, force, repeats, threads, way, compiled, alone)
    figures = bench_throughput(loaded, crowd, shape=name, tell=_tell)
    lines = [
        f"{way}: {_seconds(figures[way], figures['timer'])} for {questions} questions"
        for way in ("alone", "together")
    ]
    lines.append(f"rows in a forward, mean: {figures['together']['rows_per_forward']:.1f}")
    limits = figures["limits"]
    for name, limit in (
        ("the machine's rates", limits),
        ("products as measured for these rows", limits["with_measured_products"]),
    ):
        lines.append(f"limit by {name}: {limit['seconds']:.2f} s, share {limit['share']:.2f}")
    parts = figures["together"]["parts"]
    lines.append(", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items()) + " s")
    if not figures["answers_equal"]:
        lines.append("the answers differ between the two ways")
    _done(figures, out, as_json, lines)


@app.command()
@clear_errors
def overlap(
    model: Model = None,
    shape: Shape = "40m",
    image: Annotated[int, typer.Option(min=28, metavar="PX", help="Side of the picture.")] = 448,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 8,
    force: Force = "dino",
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each way, in turn.")] = 5,
    threads: Threads = 2,
    questions: Annotated[int, typer.Option(min=2, help="Of the batch, each a picture.")] = 8,
    large: Annotated[int, typer.Option(min=28, metavar="PX", help="Side of those.")] = 448,
    device: Device = "cpu",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What is done ahead of need, beside the same done when it is needed."""
    from vpt_agent.bench.overlap import Overlap, bench_overlap

    _ready(out)
    loaded, name = _load(model, shape, force, device, "float32")
    asked = Overlap(image, new_tokens, force, repeats, threads, questions, large)
    figures = bench_overlap(loaded, asked, shape=name, tell=_tell)
    lines = [
        f"{what}: {_seconds(figures[what]['when_needed'], 'wall')} when needed, "
        f"{_seconds(figures[what]['ahead'], 'wall')} ahead; "
        f"ratio {figures[what]['ratio']['wall']['median']:.2f}"
        for what in ("features", "pictures")
    ]
    lines.append(f"hidden of the features' computing: {figures['features']['hidden_share']:.0%}")
    _done(figures, out, as_json, lines)


@app.command()
@clear_errors
def kernels(
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turn.")] = 9,
    threads: Threads = 1,
    device: Device = "cpu",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The operators, beside what they stand in for."""
    from vpt_agent.bench.kernels import bench_kernels

    _ready(out)
    figures = bench_kernels(device=_device(device), repeats=repeats, count=threads, tell=_tell)
    timer = figures["timer"]
    lines = [
        f"{row['name']} [{row['kernel']}]: {_seconds(row['ours'], timer)}; {row['against']}: "
        f"{_seconds(row['baseline'], timer)}; ratio {row['ratio'][timer]['median']:.2f}"
        for row in figures["kernels"]
    ]
    _done(figures, out, as_json, lines)


@app.command()
@clear_errors
def report(
    folder: Annotated[Path, typer.Argument(help="Where files of figures lie.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """The aims in files that were written with --out, as a table (markdown)."""
    from vpt_agent.bench.report import report as table

    typer.echo(table(folder))


@app.command("import")
@clear_errors
def import_(
    repeats: Annotated[int, typer.Option(min=1, help="Processes of each kind, in turn.")] = 5,
    answer: Annotated[
        bool, typer.Option(help="Measure the shipped model's first answer, too.")
    ] = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """How long a cold process takes to begin."""
    from vpt_agent.bench.start import bench_import

    _ready(out)
    figures = bench_import(repeats=repeats, answer=answer, tell=_tell)
    lines = [f"{name}: {_seconds(own, 'cpu')}" for name, own in figures["processes"].items()]
    lines += [f"cold answer, {name}: {s:.2f} s" for name, s in figures["stages"].items()]
    if figures["import_loads_torch"]:
        lines.append("import vpt_agent loads torch, and must not")
    _done(figures, out, as_json, lines)


@app.command()
@clear_errors
def train(
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each procedure, in turn.")] = 9,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a batch.")] = 8,
    threads: Threads = 1,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A training step in one pass where one is enough, beside the one with two full passes."""
    from vpt_agent.training.bench import AIM, bench

    _ready(out)
    figures = bench(
        repeats=repeats, rows=rows, threads=threads, say=lambda text: note("bench", text)
    )
    lines = []
    for setting in figures["settings"]:
        met = "" if not setting["counts"] else ", met" if setting["ratio"] >= AIM else ", missed"
        lines.append(
            f"{setting['name']}: {setting['two_ms']:.0f} ms in two full passes, "
            f"{setting['one_ms']:.0f} ms in one, ratio {setting['ratio']:.2f}{met}"
        )
    lines.append(f"padding: {figures['padding']:.1%}; {figures['machine']}")
    _done(figures, out, as_json, lines)


# --- what they share ------------------------------------------------------------------------


def _tell(text: str) -> None:
    note("bench", text)


def _ready(*files: Path | None) -> None:
    """Raise :class:`UserError` for a file that cannot be written: before the measurement, so that
    minutes of it are not lost."""
    for path in files:
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise UserError(
                "the file cannot be written",
                where=path,
                got="a folder" if path.is_dir() else "its folder does not exist",
                expected="a file in a folder that exists",
            )


def _one_thread(compiled: bool, threads: int, device: str, dtype: str) -> None:
    """Raise :class:`UserError` where the routines in C would not be used, and figures would be
    called ``compiled`` nevertheless."""
    known = device.startswith("cpu") and dtype != "float16"
    if compiled and (threads != 1 or not known):
        raise UserError(
            "the routines in C compute on one CPU thread, in float32 or bfloat16",
            where="--compiled",
            got=f"--device {device} --threads {threads} --dtype {dtype}",
            fix="use --threads 1 and such a dtype on a CPU, or leave --compiled out",
        )


def _done(figures: Mapping[str, Any], out: Path | None, as_json: bool, lines: list[str]) -> None:
    """Write the figures, and print them as JSON or as lines with the aims below."""
    if out is not None:
        with writing(out):
            out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        note("written", str(out))
    if as_json:
        print_json(figures)
        return
    for line in lines:
        typer.echo(line)
    for aim in figures.get("aims", ()):
        bound = "at least" if aim["at_least"] else "at most"
        met = "met" if aim["met"] else "missed"
        typer.echo(f"{met}: {aim['aim']}: {aim['figure']:.4g} ({bound} {aim['wanted']:g})")


def _seconds(spread: Mapping[str, Any], timer: str) -> str:
    own = spread[timer]
    return f"{own['median']:.4g} s ({own['low']:.4g} to {own['high']:.4g})"


def _answer_lines(figures: Mapping[str, Any]) -> list[str]:
    """Both ways in seconds and by part, each part as a share of its limit."""
    timer, lines = figures["timer"], []
    for way in ("published", "ours"):
        own = figures[way]
        parts = ", ".join(f"{name} {1000 * s:.1f}" for name, s in own["parts"].items())
        lines.append(
            f"{way}: {_seconds(own, timer)}, {own['passes']} passes over {own['tokens']} tokens; "
            f"in ms: {parts}"
        )
    shares = ", ".join(f"{name} {s:.0%}" for name, s in figures["limits"]["share"].items())
    lines.append(f"limit / time: {shares}, all {figures['limits']['share_of_all']:.0%}")
    if not figures["tokens_equal"]:
        lines.append("the two ways said different tokens")
    return lines


def _device(name: str) -> Any:
    import torch

    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise UserError("unknown device", got=name, expected="cpu, cuda, cuda:0 ...") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError("this machine, or this build of torch, has no CUDA device", got=name)
    return place


def _load(
    model: str | None, shape: str, force: str, device: str, dtype: str, weights: str = "own"
) -> tuple[Loaded, str]:
    """The model to measure, and what it is called."""
    from vpt_agent.model.weights import check_weights, use_weights

    check_weights(weights)
    loaded, name = _made(model, shape, force, device, dtype)
    use_weights(loaded.model, weights)
    return loaded, name if weights == "own" else f"{name}, {weights}"


def _made(model: str | None, shape: str, force: str, device: str, dtype: str) -> tuple[Loaded, str]:
    import torch

    from vpt_agent.bench.answer import Loaded
    from vpt_agent.bench.shapes import SHAPES, load_model, random_model
    from vpt_agent.model.checkpoint import find_checkpoint

    kinds = ("float32", "bfloat16", "float16")
    if dtype not in kinds:
        raise UserError("unknown dtype", got=dtype, expected=", ".join(kinds))
    place, kind = _device(device), getattr(torch, dtype)
    if model is not None:
        path = find_checkpoint(model)
        return Loaded(*load_model(path, device=place, dtype=kind)), Path(model).name
    if shape not in SHAPES:
        raise UserError("unknown shape", got=shape, expected=", ".join(SHAPES))
    encoders = ("clip",) if force == "region" else (force,)
    if not set(encoders) <= {"clip", "dino", "sam"}:
        raise UserError(
            "random weights have no such perception kind",
            where="--force",
            got=force,
            expected="region, clip, dino, sam",
        )
    made = random_model(*SHAPES[shape], encoders=encoders, device=place, dtype=kind)
    return Loaded(*made), f"{shape}, random weights"
