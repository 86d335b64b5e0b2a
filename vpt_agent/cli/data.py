"""``vpt-agent data``: rows to train on, checked, shown, counted, built and converted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vpt_agent.cli.output import RUN_FAILED, clear_errors, note, print_json
from vpt_agent.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vpt_agent.data import Depth, Row, RowEncoder, Rows
    from vpt_agent.data.builder import Annotation
    from vpt_agent.data.rows import RowError
    from vpt_agent.model import VPTProcessor
    from vpt_agent.tokens import PerceptionTable

app = typer.Typer(no_args_is_help=True, help="Rows to train on: check, show, build, convert.")

RowsFile = Annotated[Path, typer.Argument(metavar="ROWS", help="A .json or .jsonl file of rows.")]
Folder = Annotated[
    Path | None, typer.Option(help="Where relative paths begin (default: the file's folder).")
]
Remap = Annotated[
    list[str] | None,
    typer.Option(metavar="OLD=NEW", help="Folder OLD in paths is NEW here; repeatable."),
]
Column = Annotated[
    list[str] | None, typer.Option(metavar="KEY=AS", help="Read key KEY as AS; repeatable.")
]
Ignore = Annotated[
    list[str] | None, typer.Option(metavar="KEY", help="A key to pass over; repeatable.")
]
Grid = Annotated[int, typer.Option(help="Cells a side of regions: 4, 8, 16 or 32.")]
Controls = Annotated[int, typer.Option(min=1, help="Control tokens of a call.")]
Model = Annotated[
    str | None, typer.Option(help="Checkpoint folder or hub name: its kinds, grids and controls.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out, and count them.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Write over files that are there.")]
ENCODERS = ("clip", "dino", "sam")


def _pairs(values: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for value in values or ():
        old, mark, new = value.partition("=")
        if not mark or not old or not new:
            raise UserError("this option takes OLD=NEW", where=option, got=value)
        pairs[old] = new
    return pairs


def _table(grid: int, controls: int, model: str | None = None) -> PerceptionTable:
    """A checkpoint's kinds, or the published ones."""
    if model is not None:
        return _processor(model).table
    from vpt_agent.tokens import PerceptionTable

    return PerceptionTable.published(ENCODERS, grid=grid, controls=controls)


def _processor(model: str) -> VPTProcessor:
    from vpt_agent.model import VPTProcessor
    from vpt_agent.model.checkpoint import find_checkpoint

    return VPTProcessor.from_pretrained(find_checkpoint(model))


def _load(
    file: Path,
    folder: Path | None,
    remap: list[str] | None,
    column: list[str] | None,
    ignore: list[str] | None,
    *,
    table: PerceptionTable | None = None,
    skip: bool = False,
) -> Rows:
    from vpt_agent.data import load_rows

    return load_rows(
        file,
        folder=folder,
        remap=_pairs(remap, "--remap"),
        columns=_pairs(column, "--column"),
        ignore=ignore or (),
        own_tags=[kind.tag for kind in table.kinds] if table is not None else (),
        on_error="skip" if skip else "raise",
    )


def _told_bad(rows: Rows) -> None:
    bad = rows.report.rows - rows.report.good
    if bad:
        note("warning", f"{bad} of {rows.report.rows} rows are left out: see vpt-agent data check")


@app.command()
@clear_errors
def check(
    file: RowsFile,
    folder: Folder = None,
    remap: Remap = None,
    column: Column = None,
    ignore: Ignore = None,
    pictures: Annotated[
        str, typer.Option(help="none; headers: there, and crops inside; pixels: decode them all.")
    ] = "headers",
    grid: Grid = 8,
    controls: Controls = 1,
    model: Model = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only so many rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read every row and say what is wrong. Ends with 1 if anything is."""
    table = _table(grid, controls, model)
    report = _load(file, folder, remap, column, ignore, table=table).check(
        pictures=_depth(pictures),
        table=table,
        limit=limit,
    )
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))
    if not report.ok:
        raise typer.Exit(RUN_FAILED)


def _depth(value: str) -> Depth:
    depths: dict[str, Depth] = {"none": "none", "headers": "headers", "pixels": "pixels"}
    if value not in depths:
        raise UserError("unknown depth of checking", got=value, expected=", ".join(depths))
    return depths[value]


@app.command()
@clear_errors
def show(
    file: RowsFile,
    out: Annotated[Path, typer.Option(help="Folder for row_N.png and index.html.")] = Path("rows"),
    row: Annotated[
        list[int] | None, typer.Option(help="Number of a row, from 0; repeatable.")
    ] = None,
    first: Annotated[int, typer.Option(min=1, help="Without --row: the first so many.")] = 8,
    folder: Folder = None,
    remap: Remap = None,
    column: Column = None,
    ignore: Ignore = None,
    grid: Grid = 8,
    model: Model = None,
) -> None:
    """Draw the regions and crops of rows on their pictures."""
    table = _table(grid, 1, model)
    from vpt_agent.data.draw import show_rows

    rows = _load(file, folder, remap, column, ignore, table=table)
    numbers = row or list(range(min(first, len(rows))))
    outside = [n for n in numbers if not 0 <= n < len(rows)]
    if outside:
        raise UserError("there is no such row", got=outside, expected=f"0..{len(rows) - 1}")
    for path in show_rows({n: rows[n] for n in numbers}, out, table=table):
        note("written", str(path))


@app.command()
@clear_errors
def stats(
    file: RowsFile,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or hub name: count its tokens too.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Longest row, in tokens.")] = 2048,
    folder: Folder = None,
    remap: Remap = None,
    column: Column = None,
    ignore: Ignore = None,
    grid: Grid = 8,
    controls: Controls = 1,
    skip_bad: SkipBad = False,
    as_json: AsJson = False,
) -> None:
    """Count rows, calls and pictures; with a checkpoint, tokens."""
    from vpt_agent.data.stats import row_stats

    table = _table(grid, controls, model)
    rows = _load(file, folder, remap, column, ignore, table=table, skip=skip_bad)
    if model is None:
        found = row_stats(rows, table=table).to_dict()
    else:
        found = row_stats(rows, encoder=_encoder(model, max_length)).to_dict()
    _told_bad(rows)
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        if value != "":
            typer.echo(f"{name.replace('_', ' ')}: {value}")


def _encoder(model: str, max_length: int) -> RowEncoder:
    from vpt_agent.data import RowEncoder
    from vpt_agent.prompt.vpt import VPTLayout

    processor = _processor(model)
    layout = VPTLayout(processor.tokenizer, processor.table)
    return RowEncoder(layout, processor.policy, max_length=max_length)


Share = Annotated[
    list[str] | None,
    typer.Option(metavar="KIND=N", help="region, clip, dino, sam or direct; repeatable."),
]
Field = Annotated[
    list[str] | None,
    typer.Option(metavar="FIELD=KEY", help="Which key holds image, question, answer, boxes ..."),
]
Boxes = Annotated[
    str, typer.Option(help="xyxy or xywh in pixels, xyxy_1 fractions, xyxy_1000 thousandths.")
]
Source = Annotated[
    str,
    typer.Argument(
        help="Annotations (.jsonl, .json), a COCO file (with --texts), a folder of recorded runs, "
        "or a dataset's name (with --dataset)."
    ),
]
Pictures = Annotated[Path | None, typer.Option(help="Folder for pictures that are no files yet.")]
Trigger = Annotated[
    float, typer.Option(help="Share of rows with the trigger phrase; 0: free choice.")
]
Count = Annotated[int | None, typer.Option(help="How many (default: as many as fit).")]


@app.command()
@clear_errors
def build(
    source: Source,
    out: Annotated[Path, typer.Option(help="The rows to write: .json or .jsonl.")],
    share: Share = None,
    texts: Annotated[Path | None, typer.Option(help="COCO: questions or captions.")] = None,
    answers: Annotated[Path | None, typer.Option(help="COCO, VQA: the file of answers.")] = None,
    dataset: Annotated[bool, typer.Option("--dataset", help="SOURCE is a dataset's name.")] = False,
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "train",
    config: Annotated[str | None, typer.Option(help="Of the dataset.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Read only so many.")] = None,
    column: Field = None,
    box_format: Boxes = "xyxy",
    folder: Folder = None,
    pictures: Pictures = None,
    grid: Grid = 8,
    controls: Controls = 1,
    model: Model = None,
    trigger: Trigger = 1.0,
    instruction: Annotated[str, typer.Option(help="A line after each question.")] = "",
    cover: Annotated[bool, typer.Option("--cover", help="Crops without a cell of margin.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="One region for all boxes.")] = False,
    rows: Count = None,
    seed: Annotated[int, typer.Option(help="The same seed builds the same rows.")] = 0,
    absolute: Annotated[bool, typer.Option("--absolute", help="Write absolute paths.")] = False,
    skip_bad: SkipBad = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make rows: of questions and answers with boxes, or of recorded runs."""
    from vpt_agent.data.builder import Recipe, build_rows, write_rows

    table = _table(grid, controls, model)
    runs = Path(source).is_dir() and not dataset
    _check_options(runs, share=share, column=column, texts=texts, answers=answers, dataset=dataset)
    if runs:
        made, told = _from_runs(Path(source), pictures, table, skip_bad=skip_bad)
    else:
        shares, fields = _shares(share), _pairs(column, "--column")
        recipe = Recipe(
            shares=shares, table=table, trigger=trigger, instruction=instruction, merge=merge,
            regions="cover" if cover else "published", rows=rows, seed=seed,
        )  # fmt: skip
        found = _annotations(
            source, (texts, answers), (split, config) if dataset else None, limit, fields,
            box_format, folder, pictures,
        )  # fmt: skip
        built = build_rows(found, recipe, on_error="skip" if skip_bad else "raise")
        made, told = list(built.rows), built.to_dict()
    write_rows(made, out, absolute=absolute, overwrite=force)
    _tell_built(told | {"written": str(out)}, as_json=as_json)


def _check_options(runs: bool, **given: Any) -> None:
    """Options that would be passed over are refused."""
    lost = [name for name, value in given.items() if value] if runs else []
    if given["texts"] is None:
        lost += ["answers"] if given["answers"] is not None and not runs else []
    elif not runs:
        lost += [name for name in ("column", "dataset") if given[name]]
    if lost:
        raise UserError(
            "this source takes no such option",
            got=", ".join(f"--{name}" for name in lost),
            expected="for recorded runs no shares or columns; --answers with --texts; "
            "--column and --dataset without it",
        )


def _tell_built(told: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(told)
        return
    note("written", f"{told['rows']} rows to {told['written']}")
    for name in ("kinds", "triggers"):
        if told.get(name):
            typer.echo(f"{name}: " + ", ".join(f"{k} {v}" for k, v in told[name].items()))
    for name in ("unused", "forced_calls"):
        if told.get(name):
            typer.echo(f"{name.replace('_', ' ')}: {told[name]}")
    problems = told.get("annotations", {}).get("problems", {})
    for problem, seen in problems.items():
        note("warning", f"left out, {problem}: {seen['count']}; the first: {seen['examples'][0]}")
    for reason in told.get("left_out", ()):
        note("warning", f"left out: {reason}")


def _shares(values: list[str] | None) -> dict[str, float]:
    shares = {}
    for name, number in _pairs(values, "--share").items():
        try:
            shares[name] = float(number)
        except ValueError as error:
            raise UserError("a share is a number", where=f"--share {name}", got=number) from error
    if not shares:
        raise UserError(
            "say what rows to make", fix="--share region=0.6 --share clip=0.3 --share direct=0.1"
        )
    return shares


def _annotations(
    source: str,
    files: tuple[Path | None, Path | None],
    dataset: tuple[str, str | None] | None,
    limit: int | None,
    columns: dict[str, str],
    box_format: Any,
    folder: Path | None,
    pictures: Path | None,
) -> Iterable[Annotation | RowError]:
    from itertools import islice

    from vpt_agent.data import open_dataset
    from vpt_agent.data.builder import Annotations, CocoAnnotations

    found: Iterable[Annotation | RowError]
    texts, answers = files
    if texts is not None:
        found = CocoAnnotations(source, texts, answers=answers, folder=folder)
    else:
        items: Any = source
        if dataset is not None:
            split, config = dataset
            items = open_dataset(source, split=split, config=config)
        found = Annotations(
            items, columns=columns, box_format=box_format, folder=folder, pictures=pictures
        )
    return islice(found, limit)


def _from_runs(
    source: Path, pictures: Path | None, table: PerceptionTable, *, skip_bad: bool
) -> tuple[list[Row], dict[str, Any]]:
    from vpt_agent.data.builder import rows_from_trace, run_folders
    from vpt_agent.data.rows import RowError

    made: list[Row] = []
    left_out: list[str] = []
    for folder in run_folders(source):
        for item in rows_from_trace(folder, table=table, pictures=pictures):
            if not isinstance(item, RowError):
                made.append(item)
            elif skip_bad:
                left_out.append(str(item))
            else:
                raise item
    forced = sum(len(row.meta.get("forced_calls", ())) for row in made)
    kinds = dict(Counter(row.meta["kind"] for row in made))
    return made, {"rows": len(made), "kinds": kinds, "forced_calls": forced, "left_out": left_out}


@app.command()
@clear_errors
def convert(
    file: RowsFile,
    to: Annotated[str, typer.Option(help="llamafactory, llamafactory-vpt, trl or trl-prompt.")],
    out: Annotated[Path, typer.Option(help="The file to write: .json or .jsonl.")],
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for crops (default: beside the file).")
    ] = None,
    reencoded: Annotated[
        str, typer.Option(help="Pictures for encoders: refuse, or picture (shown once more).")
    ] = "refuse",
    folder: Folder = None,
    remap: Remap = None,
    column: Column = None,
    ignore: Ignore = None,
    skip_bad: SkipBad = False,
    force: Force = False,
) -> None:
    """Write rows in the layout of another trainer."""
    from vpt_agent.data.builder import write_json
    from vpt_agent.data.convert import TARGETS, convert_rows, dataset_info

    target = next((t for t in TARGETS if t == to), None)
    if target is None:
        raise UserError("unknown layout", got=to, expected=", ".join(TARGETS))
    rows = _load(file, folder, remap, column, ignore, skip=skip_bad)
    crops = out.parent / f"{out.stem}_pictures" if pictures is None else pictures
    values = convert_rows(rows, target, pictures=crops, reencoded=reencoded)  # type: ignore[arg-type]
    count = write_json(values, out, overwrite=force)
    _told_bad(rows)
    note("written", f"{count} objects to {out}")
    if target.startswith("llamafactory"):
        print_json(dataset_info(out.stem, out.name, target))
