"""From outcomes to figures and tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpt_agent.errors import UserError
from vpt_agent.evaluation import (
    FREE,
    NO_TOOLS,
    Called,
    Outcome,
    crop_settings,
    figures_of,
    summarise,
    tables_of,
)
from vpt_agent.evaluation.store import ResultStore
from vpt_agent.tokens.table import REGION

PLAIN, RANDOM = crop_settings(REGION)[:2]
SETTINGS = [s.to_dict() for s in (NO_TOOLS, FREE, PLAIN, RANDOM)]
CALL = Called("crop_region", "region", "forced")


def rows(setting: str, right: int, count: int = 40, **values: object) -> list[Outcome]:
    return [
        Outcome(f"i{n}", setting, type="a" if n % 2 else "b", score=float(n < right), **values)  # type: ignore[arg-type]
        for n in range(count)
    ]


def test_settings_are_compared_on_the_same_items() -> None:
    outcomes = [*rows("no tools", 0), *rows("region", 30, calls=(CALL,))]
    outcomes += rows("region, random region", 10, calls=(CALL,))
    outcomes += [Outcome("i99", "region, random region", status="skipped", why="no true boxes")]
    figures = figures_of(outcomes, [], SETTINGS)
    assert figures["results"]["region"]["exact"]["value"] == 0.75
    assert figures["results"]["region"]["by_type"]["a"]["n"] == 20
    gain, lost = figures["differences"]
    assert (lost["setting"], lost["against"]) == ("region, random region", "region")
    assert lost["all"]["value"] == -0.5
    assert (lost["all"]["only_first"], lost["all"]["only_second"]) == (0, 20)
    assert lost["all"]["p"] == pytest.approx(2 / 2**20)
    assert (gain["setting"], gain["against"]) == ("region", "no tools")
    assert figures["results"]["region, random region"]["skipped"] == 1


def test_invalid_calls_are_counted() -> None:
    bad = Called("crop_region", "region", "sampled", "box_outside")
    slow = Called("crop_region", "region", "sampled", "timeout")
    outcomes = [
        *rows("region", 1, 8, calls=(CALL,)),
        *rows("region", 1, 1, calls=(bad, slow), rejected=1),
    ]
    figures = figures_of(outcomes, [], SETTINGS)["results"]["region"]
    assert figures["calls"] == 11
    assert figures["invalid"]["value"] == pytest.approx(2 / 11)


def test_regions_by_size_of_the_object() -> None:
    found = [
        Outcome("i0", "region", boxes=((0, 0, 80, 80),), true=((0, 0, 40, 80),), size=(400, 400)),
        Outcome("i1", "region", boxes=(), true=((0, 0, 9, 9),), size=(400, 400)),
        Outcome("i2", "region, random region", boxes=((0, 0, 9, 9),), true=((0, 0, 9, 9),),
                size=(400, 400)),
        Outcome("i3", "region", boxes=((0, 0, 9, 9),), true=((50, 0, 59, 9),), size=(400, 400),
                needs=(("clip",),), calls=(CALL,)),
    ]  # fmt: skip
    figures = figures_of(found, [], SETTINGS)["regions"]
    assert list(figures) == ["region"]  # not where crops were replaced
    groups = figures["region"]
    assert groups["large"]["iou"]["value"] == 0.5
    assert groups["large"]["iogt"]["value"] == 1
    assert groups["small"]["iogt"]["value"] == 0
    assert groups["all"]["objects"] == 2
    assert groups["all"]["inside"]["value"] == 0.5


def test_free_choices_against_needs() -> None:
    clip = Called("reencode_clip", "clip", "sampled")
    either = (("clip", "dino"),)
    found = [
        Outcome("0", "free choice", needs=(("region",),), calls=(CALL,)),
        Outcome("1", "free choice", needs=(("region",),), calls=(clip,)),
        Outcome("2", "free choice", needs=either, calls=(clip,)),
        Outcome("3", "free choice", needs=(("region",), ("clip",)), calls=(CALL,)),
        Outcome("4", "free choice", needs=(), calls=()),
        Outcome("5", "free choice", needs=(), calls=(CALL,)),
        Outcome("6", "free choice", needs=None, calls=(CALL,)),
        Outcome("7", "free choice", needs=(("region",), ("region",)), calls=(CALL, CALL)),
        Outcome("8", "free choice", needs=(("region",), ("region",)), calls=(CALL,)),
    ]
    figures = figures_of(found, [], SETTINGS)["choices"]["free choice"]
    assert figures["calls_needed"]["value"] == pytest.approx(5 / 7)  # 0, 2, 3, 7, 8; not 1, 5
    assert figures["needed_called"]["value"] == 0.5  # items 0, 2 and 7; not 1, 3, 8
    assert figures["needless_avoided"]["value"] == 0.5
    region, other = figures["by_kind"]["region"], figures["by_kind"]["clip"]
    assert region["precision"]["value"] == 0.8  # 0, 3, 7, 8; not 5
    assert region["recall"]["value"] == 0.8  # 0, 3, 7, 8; not 1
    assert other["precision"]["value"] == 0.5  # 2; not 1
    assert other["recall"]["value"] == 0  # only item 3 needs just this kind


def test_tables_say_what_was_not_measured() -> None:
    outcomes = [*rows("no tools", 0), *rows("region", 30, calls=(CALL,), needs=(("region",),))]
    tables = tables_of(figures_of(outcomes, [], SETTINGS), untrained=["dino"])
    exact = tables[0].to_markdown()
    assert "| dino " in exact
    assert "untrained" in exact
    assert "0.750 [0.60, 0.86]" in exact
    assert "free choice           | 0  | -" in exact
    assert "McNemar" in tables[1].to_markdown()


def test_folders_of_one_evaluation_are_read_together(tmp_path: Path) -> None:
    manifest = {"models": {"region": {"name": "m"}}, "settings": SETTINGS, "machine": {}}
    for part in range(2):
        store = ResultStore(tmp_path / str(part), {**manifest, "seed": 0})
        store.add(Outcome(f"{part}-{n}", "region", score=1.0) for n in range(3))
    figures = summarise([tmp_path / "0", tmp_path / "1"])
    assert figures["results"]["region"]["n"] == 6
    ResultStore(tmp_path / "2", {**manifest, "models": {"region": {"name": "other"}}})
    with pytest.raises(UserError, match="different evaluations: other models"):
        summarise([tmp_path / "0", tmp_path / "2"])
    with pytest.raises(UserError, match="no folder of results"):
        summarise([])


def test_losses_where_the_kind_is_needed() -> None:
    needs = [(("region",),), (), None, (("clip", "region"),)]  # the last: either will do
    found = [
        Outcome(f"i{n}", setting, score=float(setting == "region" and n % 4 in (0, 3)), needs=need)
        for setting in ("region", "region, random region")
        for n, need in enumerate(needs * 5)
    ]
    figures = figures_of(found, [], SETTINGS)
    (lost,) = figures["differences"]
    assert lost["kind"] == "region"
    assert lost["all"]["value"] == -0.5
    assert lost["needed"]["value"] == -1
    assert lost["needed"]["n"] == 5
    by_need = figures["results"]["region"]["by_need"]
    assert {k: (v["value"], v["n"]) for k, v in by_need.items()} == {
        "clip or region": (1.0, 5),
        "nothing": (0.0, 5),
        "region": (1.0, 5),
    }
