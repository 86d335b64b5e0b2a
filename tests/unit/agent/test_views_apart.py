"""No tool can see another run's views: tools that try, in runs that go on at the same time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image

from vpt_agent.agent import PerceptionAgent, Question
from vpt_agent.tool import PerceptionTool, ToolArguments, ToolContext, ToolRegistry
from vpt_agent.types import View

COLOURS = [(25 * n, 255 - 25 * n, 7 * n) for n in range(8)]


class Wish(ToolArguments):
    """What to look for."""

    source: str | None = None
    other: str = ""


class Spy(PerceptionTool):
    """Look at whatever can be found."""

    name = "spy"
    arguments = Wish
    needs = frozenset({"view"})
    batch_size = 8
    always_run = True

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.changed = 0

    def run_batch(self, items: Sequence[tuple[Any, ToolContext]]) -> list[Any]:
        """Every call sees the contexts of the batch; what each may look at is its own run's."""
        self.batches.append(len(items))
        return [self.one(arguments, context) for arguments, context in items]

    def one(self, arguments: Wish, context: ToolContext) -> list[Any]:
        """Name all views and their colours, try to put one in, and cut a crop."""
        views: Any = context.views
        try:
            views["planted"] = context.require_view()
        except TypeError:
            self.changed += 1
        found = [f"{name}={view.image.getpixel((0, 0))}" for name, view in views.items()]
        guess = views.get(arguments.other)
        crop = context.crop(context.require_view(), context.require_view().box)
        return [" ".join(found) + f" guess={guess}", crop]


def calls(*wishes: str) -> str:
    return "".join(
        f'<tool_call>{{"name": "spy", "arguments": {wish}}}</tool_call>' for wish in wishes
    )


def pictures_of(views: Sequence[View]) -> set[tuple[int, ...]]:
    return {view.image.getpixel((0, 0)) for view in views}


@pytest.mark.parametrize("together", [True, False])
def test_every_run_sees_its_own_views_only(together: bool) -> None:
    spy = Spy()
    # A second turn names the crops that the other runs made meanwhile: their names are the same.
    script = [calls("{}", '{"other": "call_9.1"}'), calls('{"source": "call_1.1"}'), "Done."]
    agent = PerceptionAgent.from_script(script, ToolRegistry([spy]), written=True)
    asked = [Question("What?", image=Image.new("RGB", (32, 32), colour)) for colour in COLOURS]
    if together:
        answers = agent.run_batch(asked)
        assert max(spy.batches) > 1, "calls of several runs stood in one batch"
    else:
        answers = [agent.run(q.text, image=q.image) for q in asked]
    for answer, colour in zip(answers, COLOURS, strict=True):
        assert [result.error for result in answer.results] == [None] * 3
        assert pictures_of(answer.views) == {colour}
        for result in answer.results:
            seen = set(re.findall(r"=(\([^)]*\))", result.text or ""))
            assert seen == {str(colour)}
            assert (result.text or "").endswith("guess=None")
            assert "planted" not in (result.text or "")
    assert spy.changed == 3 * len(COLOURS), "the views of a run cannot be changed by a tool"
    agent.close()


def test_another_runs_view_is_an_unknown_source() -> None:
    spy = Spy()
    script = [calls('{"source": "call_2.1"}'), "Done."]
    agent = PerceptionAgent.from_script(
        [calls("{}", "{}"), "Done."], ToolRegistry([spy]), written=True
    )
    picture = Image.new("RGB", (32, 32), "red")
    first = agent.run("What?", image=picture)
    assert [view.id for view in first.views][-1] == "call_2.1"
    other = PerceptionAgent.from_script(script, agent.registry, written=True)
    error = other.run("What?", image=picture).results[0].error
    assert error is not None
    assert (error.kind, "call_2.1" in error.message) == ("unknown_source", True)
    agent.close()
    other.close()
