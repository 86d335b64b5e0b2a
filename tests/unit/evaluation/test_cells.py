"""Which questions the benchmark asks under which setting."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vpt_agent.evaluation import NO_TOOLS, Setting, standard_settings
from vpt_agent.nano.domain.table import TABLE
from vpt_agent.nano.report import domain_items, scene_items

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("cells")
    sys.modules.pop("cells", None)


def asked(cells: ModuleType, setting: Setting, ids: list[str], **limits: object) -> Counter[str]:
    wanted = cells.Cells(cells.by_type(ids), **limits)
    return Counter(id.split("-")[1] for id in ids if wanted(id, setting))


def test_cells_of_the_second_domain(cells: ModuleType) -> None:
    ids = list(domain_items(600))
    settings = {s.name: s for s in standard_settings(TABLE.kinds)}
    every = asked(cells, NO_TOOLS, ids)
    assert sum(every.values()) == 600
    assert asked(cells, settings["free choice"], ids) == every
    clip = asked(cells, settings["clip"], ids, others=7)
    region = asked(cells, settings["region"], ids, others=7)
    for type, count in every.items():
        encoded = type in ("count_marks", "same_mark", "which_tag", "most_mark", "mark_of")
        assert clip[type] == (count if encoded else 7)
        assert region[type] == (count if type in ("region", "two_looks", "mark_of") else 7)
    thrown = asked(cells, settings["dino, condition zero"], ids, switched=50)
    assert dict(thrown) == dict.fromkeys(
        ("count_marks", "same_mark", "which_tag", "most_mark", "mark_of"), 10
    )
    thrown = asked(cells, settings["region, black"], ids, switched=50)
    assert dict(thrown) == dict.fromkeys(("region", "two_looks", "mark_of"), 17)
    other = Setting(name="no tokens", tool_choice="none")
    assert set(asked(cells, other, ids, baselines=["no tokens"], baseline=5).values()) == {5}


def test_a_swap_has_the_states_that_it_takes(cells: ModuleType) -> None:
    """Whatever is asked with another's state is asked plainly, too: so there are donors."""
    ids = list(domain_items(300))
    wanted = cells.Cells(cells.by_type(ids), switched=100)
    settings = {s.name: s for s in standard_settings(TABLE.kinds)}
    for setting in settings.values():
        if setting.donors:
            assert all(wanted(id, settings[setting.donors]) for id in ids if wanted(id, setting))


def test_cells_of_the_first_domain(cells: ModuleType) -> None:
    ids = list(scene_items(40))
    wanted = cells.Cells(cells.alike(ids), switched=12)
    settings = {s.name: s for s in standard_settings(TABLE.kinds)}
    assert sum(wanted(id, settings["region"]) for id in ids) == 40
    assert sum(wanted(id, settings["region, random region"]) for id in ids) == 12
