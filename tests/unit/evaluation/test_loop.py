"""The loop: all settings, batches, swaps, and going on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.evaluation.kit import item, tiny_agent
from vpt_agent.agent import PerceptionAgent, Question
from vpt_agent.errors import UserError
from vpt_agent.evaluation import (
    FREE,
    NO_TOOLS,
    Item,
    Outcome,
    Setting,
    State,
    Switches,
    control_settings,
    evaluate,
    read_rows,
    read_states,
    standard_settings,
    summarise,
)
from vpt_agent.evaluation.store import ROWS, STATES, ResultStore, read_manifest, weights_hash
from vpt_agent.tokens.table import CLIP, PUBLISHED, REGION
from vpt_agent.types import Answer, Limits

LIMITS = Limits(calls=1, new_tokens=12)
SETTINGS = [NO_TOOLS, *control_settings(CLIP)[:2], *control_settings(CLIP)[-2:]]
ITEMS = [item(n, answer="" if n < 3 else "x") for n in range(5)]


def run(out: Path, items: list[Item] = ITEMS, settings: list[Setting] = SETTINGS) -> ResultStore:
    return evaluate(tiny_agent(), items, settings, out, batch=3, limits=LIMITS, seed=1)


def told(folder: Path) -> list[tuple[object, ...]]:
    return sorted(
        (r.setting, r.item, r.answer, r.score, r.status, r.calls, r.boxes)
        for r in read_rows(folder)
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluation") / "all"
    run(out)
    return out


def test_every_item_under_every_setting(done: Path) -> None:
    rows = list(read_rows(done))
    assert len(rows) == len(ITEMS) * len(SETTINGS)
    assert {(r.item, r.setting) for r in rows} == {(i.id, s.name) for i in ITEMS for s in SETTINGS}
    for row in rows:
        assert row.status == "answered"
        assert row.score == (row.item in ("i0", "i1", "i2"))  # their expected answer is empty
        assert [c.name for c in row.calls] == (
            [] if row.setting == "no tools" else ["reencode_clip"]
        )
        assert row.size == (84, 56)
        assert row.needs == (("region",),)


def test_the_manifest_says_who_and_with_what(done: Path) -> None:
    manifest = read_manifest(done)
    assert manifest["models"]["clip"]["weights_sha256"] == weights_hash(tiny_agent().model)
    assert manifest["machine"]["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert [s["name"] for s in manifest["settings"]] == [s.name for s in SETTINGS]
    assert manifest["count"] == 5


def test_states_are_those_of_the_calls(done: Path) -> None:
    states = {s.item: s for s in read_states(done)}
    assert sorted(states) == [i.id for i in ITEMS]
    answer = tiny_agent().run(
        ITEMS[2].question, ITEMS[2].picture(), tool_choice="reencode_clip", limits=LIMITS
    )
    control = answer.calls[0].control
    assert control is not None
    np.testing.assert_allclose(states["i2"].values, control.numpy(), atol=1e-5)
    assert states["i2"].type == "t0"


def test_a_killed_evaluation_goes_on(done: Path, tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / ROWS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:11]) + lines[11][:20])  # killed while writing a line
    states = (tmp_path / STATES).read_bytes()
    (tmp_path / STATES).write_bytes(states + b'{"item": "i')
    store = run(tmp_path)
    assert len(store.done) == len(lines)
    assert told(tmp_path) == told(done)  # swaps took the donors that they had before
    assert path.read_bytes().startswith(b"".join(lines[:11]))
    before = path.read_bytes()
    run(tmp_path)
    assert path.read_bytes() == before


def test_nothing_is_drawn_that_is_done(tmp_path: Path) -> None:
    drawn = []

    def make(n: int) -> Item:
        drawn.append(n)
        return item(n)

    items = {f"i{n}": (lambda n=n: make(n)) for n in range(4)}
    for _ in range(2):
        evaluate(tiny_agent(), items, [NO_TOOLS], tmp_path, chunk=2, limits=LIMITS)
    assert drawn == [0, 1, 2, 3]


def test_another_evaluation_is_not_mixed_in(done: Path) -> None:
    with pytest.raises(UserError, match=r"this folder holds another evaluation.*settings"):
        run(done, settings=[NO_TOOLS])
    with pytest.raises(UserError, match=r"another evaluation.*seed"):
        evaluate(tiny_agent(), ITEMS, SETTINGS, done, seed=2)
    script = PerceptionAgent.from_script(["x"])
    with pytest.raises(UserError, match=r"another evaluation.*models"):
        evaluate(script, ITEMS, SETTINGS, done, seed=1)


def test_settings_may_be_added_later(tmp_path: Path) -> None:
    run(tmp_path, settings=SETTINGS[:2])
    before = (tmp_path / ROWS).read_bytes()
    run(tmp_path)
    assert (tmp_path / ROWS).read_bytes().startswith(before)  # nothing asked again
    told = {row.setting for row in read_rows(tmp_path)}
    assert told == {s.name for s in SETTINGS} == set(summarise(tmp_path)["models"])


def test_what_cannot_be_asked_is_skipped_with_its_reason(tmp_path: Path) -> None:
    alone = Item("a", "What?", "x", item(1).picture, type="t")
    true = Setting(name="true", tool_choice="crop_region", switches=Switches(crop="true"))
    settings = [*control_settings(CLIP)[:1], *control_settings(CLIP)[-2:], true]
    run(tmp_path, [alone], settings)
    rows = {r.setting: r for r in read_rows(tmp_path)}
    assert rows["clip"].status == "answered"
    assert rows["true"].why == "no true boxes"
    skipped = [r.why for n, r in rows.items() if "state of" in n]
    assert skipped == ["no item to swap with"] * 2
    figures = summarise(tmp_path)
    assert figures["results"]["true"]["n"] == 0
    assert figures["results"]["true"]["skipped"] == 1


def test_an_agent_without_batches_is_asked_one_by_one(tmp_path: Path) -> None:
    class Plain:
        asked = 0

        def run(self, question: str, image: object = None, *, tool_choice: str = "auto") -> Answer:
            self.asked += 1
            return PerceptionAgent.from_script(["x"]).run(question)

    plain = Plain()
    evaluate(plain, ITEMS[:2], [FREE], tmp_path / "a")
    assert plain.asked == 2
    assert [r.score for r in read_rows(tmp_path / "a")] == [0.0, 0.0]
    with pytest.raises(TypeError, match="limits"):  # not dropped in silence
        evaluate(plain, ITEMS[:1], [FREE], tmp_path / "limited", limits=LIMITS)
    changed = Setting(name="s", switches=Switches(crop="black"))
    with pytest.raises(UserError, match="forward pass cannot be changed"):
        evaluate({"s": plain}, ITEMS[:1], [changed], tmp_path / "b")
    with pytest.raises(UserError, match="a setting has no agent"):
        evaluate({"other": plain}, ITEMS[:1], [FREE], tmp_path / "c")


def test_wrong_settings_are_told(tmp_path: Path) -> None:
    swap = control_settings(CLIP)[-1]
    with pytest.raises(UserError, match="keeps them and comes before"):
        run(tmp_path, settings=[swap])
    with pytest.raises(UserError, match="two settings have the same name"):
        run(tmp_path, settings=[FREE, FREE])
    with pytest.raises(UserError, match="two items have the same id"):
        run(tmp_path, items=[item(1), item(1)])
    with pytest.raises(UserError, match="must be 1 or more"):
        evaluate(tiny_agent(), ITEMS, SETTINGS, tmp_path, batch=0)


def test_broken_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this is no evaluation"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest of an evaluation cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="of another version"):
        read_manifest(tmp_path)
    (tmp_path / ROWS).write_text("nonsense\n")
    with pytest.raises(UserError, match="a line of results cannot be read"):
        list(read_rows(tmp_path))
    with pytest.raises(UserError, match="unknown fields"):
        Outcome.of_dict({"item": "a", "setting": "b", "colour": 1})


def test_rows_and_states_read_back() -> None:
    row = Outcome("a", "s", needs=(("region",), ("clip", "dino")), boxes=((0.0, 1.0, 2.0, 3.0),))
    assert Outcome.of_dict(json.loads(row.to_line())) == row
    control = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    state = State.of("a", "s", "dino", "t", control.to(torch.bfloat16))
    back = State.of_dict(json.loads(state.to_line()))
    np.testing.assert_array_equal(back.values, control.to(torch.bfloat16).float().numpy())


def test_the_standard_settings_leave_untrained_kinds_out() -> None:
    settings = standard_settings(PUBLISHED.values(), untrained=("dino", "sam"))
    choices = {s.tool_choice for s in settings}
    assert choices == {"none", "auto", REGION.tool, CLIP.tool}
    assert len({s.name for s in settings}) == len(settings)
    thrown = {str(s.switches) for s in settings}
    for wanted in ("condition=zero", "state=zero", "token=ordinary", "crop=random", "crop=black",
                   "crop=true", "result=empty", "result=markers"):  # fmt: skip
        assert wanted in thrown


def test_a_setting_for_the_first_items_only(tmp_path: Path) -> None:
    few = Setting(name="few", tool_choice="none", most=2)
    told: list[str] = []
    items = [item(n) for n in range(5)]
    evaluate(
        tiny_agent(), items, [NO_TOOLS, few], tmp_path, chunk=2, limits=LIMITS, progress=told.append
    )
    rows = list(read_rows(tmp_path))
    assert sorted(r.item for r in rows if r.setting == "few") == ["i0", "i1"]
    assert len(rows) == 7
    assert told[-1].startswith("7 of 7 asked")


def test_a_call_that_the_donor_did_not_make_is_no_wrong_answer(tmp_path: Path) -> None:
    plain, *_, swap = control_settings(CLIP)
    other = Setting(
        name="dino", tool_choice="reencode_dino", switches=swap.switches, donors=plain.name
    )
    run(tmp_path, ITEMS[:2], [plain, other])
    rows = [r for r in read_rows(tmp_path) if r.setting == "dino"]
    assert [r.status for r in rows] == ["skipped"] * 2
    assert rows[0].why == "no state of dino to swap with"


def test_a_setting_limits_the_turns_that_call(tmp_path: Path) -> None:
    class Watched:
        limits: list[Limits | None] = []  # noqa: RUF012 - one instance

        def run(self, question: str, image: object = None, *, tool_choice: str = "auto") -> Answer:
            raise AssertionError("asked one by one")

        def run_batch(
            self, questions: list[Question], *, tool_choice: str, limits: Limits | None
        ) -> list[Answer]:
            self.limits.append(limits)
            return PerceptionAgent.from_script(["x"] * len(questions)).run_batch(
                [q.text for q in questions]
            )

    agent = Watched()
    settings = [FREE, Setting(name="one", rounds=1)]
    evaluate(agent, ITEMS[:1], settings, tmp_path / "a", limits=Limits(calls=5, new_tokens=9))
    evaluate(agent, ITEMS[:1], settings, tmp_path / "b")
    given = Limits(calls=5, new_tokens=9)
    wanted = [given, Limits(calls=5, new_tokens=9, rounds=1), None, Limits(rounds=1)]
    assert agent.limits == wanted
    assert {s.rounds for s in control_settings(CLIP)} == {1}  # a second look would hide the switch


def test_pairs_that_are_not_wanted_can_be_asked_later(tmp_path: Path) -> None:
    few = Setting(name="few", tool_choice="none")

    def wanted(id: str, setting: Setting) -> bool:
        return setting is NO_TOOLS or id in ("i1", "i4")

    told: list[str] = []

    def ask(**more: Any) -> ResultStore:
        return evaluate(
            tiny_agent(), ITEMS, [NO_TOOLS, few], tmp_path, chunk=2, limits=LIMITS,
            progress=told.append, **more,
        )  # fmt: skip

    ask(wanted=wanted)
    rows = list(read_rows(tmp_path))
    assert sorted(r.item for r in rows if r.setting == "few") == ["i1", "i4"]
    assert len(rows) == 7
    assert told[-1].startswith("7 of 7 asked")
    assert len(ask().done) == 10
    assert told[-1].startswith("10 of 10 asked")


def test_a_stopped_evaluation_goes_on_as_if_it_had_not_stopped(done: Path, tmp_path: Path) -> None:
    batches: list[int] = []

    def stop() -> bool:
        batches.append(1)
        return len(batches) > 6

    evaluate(tiny_agent(), ITEMS, SETTINGS, tmp_path, batch=3, limits=LIMITS, seed=1, stop=stop)
    some = list(read_rows(tmp_path))
    assert 0 < len(some) < len(ITEMS) * len(SETTINGS)
    assert all(r.counts for r in some)  # a swap without its donor yet is no skipped item
    run(tmp_path)
    assert told(tmp_path) == told(done)
