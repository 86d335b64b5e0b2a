"""Generated scenes as items of an evaluation, and all measured figures on one page.

``vpt-agent nano report RESULTS... --out DIR`` reads what ``benchmarks/perception.py`` and
``benchmarks/ablations.py`` wrote, or the folder of any evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vpt_agent.errors import UserError
from vpt_agent.evaluation import Item, Table, summarise, tables_of
from vpt_agent.evaluation.plots import plot_all, save_plot
from vpt_agent.evaluation.store import MANIFEST
from vpt_agent.nano.agent_eval import FIRST_SEED
from vpt_agent.nano.aims import aims_table
from vpt_agent.nano.alphabet import COLOURS, SHAPES
from vpt_agent.types import Box

if TYPE_CHECKING:
    from vpt_agent.nano.alphabet import Split
    from vpt_agent.nano.domain import DomainScene
    from vpt_agent.nano.scene import Scene, SceneQuestion

PAGE = "report.html"
_NEXT = 50_000_000
"""From a scene that cannot be asked something to the next: no other item's."""


# --- scenes as items -----------------------------------------------------------------------------


def scene_items(
    count: int, *, split: Split = "train", first: int = FIRST_SEED
) -> dict[str, Callable[[], Item]]:
    """The first question of each of ``count`` scenes that no training draws, by id; a scene is
    drawn when its item is made."""
    ids = (f"{split}-{seed}" for seed in range(first, first + count))
    made = (partial(scene_item, seed, split=split) for seed in range(first, first + count))
    return dict(zip(ids, made, strict=True))


def scene_item(seed: int, *, split: Split = "train") -> Item:
    """The first question of the scene of ``seed``."""
    from vpt_agent.nano.scene import make_scene

    scene = make_scene(seed, split=split)
    return item_of(f"{split}-{seed}", scene, scene.questions[0])


def item_of(id: str, scene: Scene, asked: SceneQuestion) -> Item:
    """A question about a scene. It shows, where asked to show the true place, what training shows.

    The tags are too small to read in the whole view, so every question needs ``region``.
    """
    from vpt_agent.nano.views import asked_cells, crop_box

    image = scene.image
    return Item(
        id=id,
        question=asked.question,
        answer=asked.answer,
        picture=lambda: image,
        type=question_type(asked.question),
        needs=(("region",),),
        boxes=tuple(Box(*region) for region in asked.regions),
        crops=tuple(
            Box(*crop_box(asked_cells(region, *scene.size), *scene.size))
            for region in asked.regions
        ),
        meta={"length": len(asked.answer)},
    )


def domain_items(
    count: int, *, split: Split = "train", first: int = FIRST_SEED, per_scene: int = 1
) -> dict[str, Callable[[], Item]]:
    """Questions of the second version's domain (:mod:`vpt_agent.nano.domain`) about ``count``
    scenes, ``per_scene`` on each, by id: :data:`TURNS` in turn, and in each group its types in
    turn. Which question comes when depends on the scene's seed alone."""
    found: dict[str, Callable[[], Item]] = {}
    for number in range(first * per_scene, (first + count) * per_scene):
        kind, seed = turn_of(number), number // per_scene
        # Of a pair of questions about one scene both may be of one type: asked differently.
        id, again = f"{split}-{kind}-{seed}", 0
        while id in found:
            again += 1
            id = f"{split}-{kind}-{seed}-{again}"
        found[id] = partial(domain_item, kind, seed, split=split, again=again)
    return found


TURNS: Final = ("region", "reencode", "none", "two_looks", "reencode", "either")
"""Groups of questions in turn: twice those on which most of the measured depends."""


def turn_of(number: int) -> str:
    """The type of the question of a number."""
    from vpt_agent.nano.domain import types_of

    round_, place = divmod(number, len(TURNS))
    group = TURNS[place]
    types = types_of([group])
    earlier = TURNS[:place].count(group)
    return types[(round_ * TURNS.count(group) + earlier) % len(types)].name


@lru_cache(maxsize=4)
def _drawn(seed: int, split: Split) -> DomainScene:
    """A scene, drawn once for the questions about it."""
    from vpt_agent.nano.domain import make_domain_scene

    return make_domain_scene(seed, split=split)


def domain_item(kind: str, seed: int, *, split: Split = "train", again: int = 0) -> Item:
    """A question of a type about the scene of ``seed``, or about the next one far above it that
    can be asked it; ``again`` gives another one of the type."""
    from vpt_agent.nano.domain import ask
    from vpt_agent.nano.domain.export import shown_boxes

    id, asked = f"{split}-{kind}-{seed}" + (f"-{again}" if again else ""), None
    while asked is None:
        scene = _drawn(seed, split)
        asked = ask(scene, kind, seed=again)
        seed += _NEXT
    image, needs = scene.image, asked.type.needs
    looks = any("region" in need for need in needs)
    return Item(
        id=id,
        question=asked.question,
        answer=asked.answer,
        picture=lambda: image,
        type=asked.type.name,
        needs=needs,
        boxes=tuple(Box(*box) for box in asked.boxes),
        crops=shown_boxes(asked, scene.size) if looks else (),
        meta={"group": asked.type.group},
    )


def question_type(question: str) -> str:
    """What names the tag: its ``colour``, its ``shape``, ``colour and shape``, or its ``place``."""
    words = question.replace("?", "").replace(".", "").split()
    colour = any(w in COLOURS for w in words)
    shape = any(w in SHAPES for w in words)
    if colour and shape:
        return "colour and shape"
    return "colour" if colour else "shape" if shape else "place"


# --- the page ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """One heading of the page: words, tables, and plots by file name."""

    title: str
    about: str
    tables: Sequence[Table]
    plots: Mapping[str, Any]


def report(results: Iterable[Path | str], out: Path | str) -> Path:
    """Write ``report.html`` and its PNGs into ``out``; gives the page's path.

    ``results`` are JSON files of the benchmarks, or folders of evaluations; anything else is a
    :class:`UserError`. Needs the extra ``plots``.
    """
    sections = [s for path in results for s in read_sections(Path(path))]
    if not sections:
        raise UserError("no results were given", where="report", fix="name files or folders")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    body = []
    for number, section in enumerate(sections, start=1):
        pictures = []
        for name, figure in section.plots.items():
            path = save_plot(figure, folder / f"{number:02d}-{name}.png")
            pictures.append(f'<img src="{path.name}" alt="{escape(section.title)}: {name}">')
        tables = "".join(_table(t) for t in section.tables)
        body.append(
            f"<section><h2>{escape(section.title)}</h2><p>{escape(section.about)}</p>"
            f"{''.join(pictures)}{tables}</section>"
        )
    page = folder / PAGE
    page.write_text(_HEAD + "".join(body) + "</body></html>\n", encoding="utf-8")
    return page


def read_sections(path: Path) -> list[Section]:
    """What a file or folder of results says, as sections of the page."""
    if path.is_dir() and (path / MANIFEST).is_file():
        figures = summarise(path)
        return [_section(f"Evaluation {path.name}", figures, _untrained(figures))]
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            "these results cannot be read",
            where=path,
            expected="a JSON file of a benchmark, or the folder of an evaluation",
        ) from error
    kind = data.get("benchmark") if isinstance(data, dict) else None
    if kind == "perception":
        aims = Section("Aims", "", [aims_table(data["splits"])], {})
        return [aims] + [
            _section(f"Is perception used? {_SPLITS.get(split, split)}", figures, data["untrained"])
            for split, figures in data["splits"].items()
        ]
    if kind == "ablations":
        from vpt_agent.evaluation.runs import orders_table, plot_runs, tables_of_runs

        return [
            Section(
                "Experiments on a reduced domain",
                data["about"],
                [orders_table(data), *tables_of_runs(data)],
                plot_runs(data),
            )
        ]
    raise UserError(
        "this file holds no results that a report can show",
        where=path,
        got=f"benchmark = {kind!r}",
        expected="perception or ablations",
    )


_SPLITS = {"train": "New scenes", "unseen": "Fonts and backgrounds never trained on"}


def _untrained(figures: Mapping[str, Any]) -> list[str]:
    return sorted({kind for m in figures["models"].values() for kind in m.get("untrained", ())})


def _section(title: str, figures: Mapping[str, Any], untrained: Sequence[str]) -> Section:
    models = {
        f"{m['name']} ({(m['weights_sha256'] or 'no weights')[:12]})"
        for m in figures["models"].values()
    }
    machine = figures["machine"]
    versions = machine.get("versions", {})
    about = (
        f"Model: {', '.join(sorted(models))}. Measured {machine.get('date', '')[:10]} on "
        f"{machine.get('processor', 'an unknown processor')}, torch {versions.get('torch', '?')}, "
        f"transformers {versions.get('transformers', '?')}."
    )
    return Section(title, about, tables_of(figures, untrained=untrained), plot_all(figures))


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    note = f"<p class='note'>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<h3>{escape(table.title)}</h3><div class='wide'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>vpt-agent: what was measured</title><style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
color: #222; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.2rem; border-top: 2px solid #ccc; padding-top: 1rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem } img { max-width: 100%; display: block }
table { border-collapse: collapse; font-size: .8rem } td, th { text-align: left;
padding: .2rem .7rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap }
.wide { overflow-x: auto } .note { color: #555; font-size: .85rem }
</style></head><body><h1>What was measured</h1>
"""
