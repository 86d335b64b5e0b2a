"""Each switch, seen from inside: what the language model is really given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.unit.evaluation.kit import item, picture, tiny_agent
from vpt_agent.agent import Question
from vpt_agent.errors import UserError
from vpt_agent.evaluation import Counterfactual, Setting, Switches
from vpt_agent.types import Answer, Box, Limits

KINDS = ("clip", "dino", "sam")
SHORT = Limits(calls=1, new_tokens=12)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@dataclass
class Seen:
    """One run: its answer, and the input embeddings [D] or [V, D] by token id."""

    answer: Answer
    embeddings: dict[int, list[Tensor]]

    def of(self, token: int) -> Tensor:
        """All embeddings [n, D] that this token had."""
        return torch.stack(self.embeddings.get(token, []))


def watched(
    tool: str, change: Counterfactual | None, monkeypatch: pytest.MonkeyPatch, *, seed: int = 1
) -> Seen:
    """Ask with ``tool`` forced, and keep every input embedding of the language model."""
    agent = tiny_agent()
    inputs = agent.engine._inputs
    embeddings: dict[int, list[Tensor]] = {}

    def spy(blocks, counts, width):  # type: ignore[no-untyped-def]
        embeds, positions = inputs(blocks, counts, width)
        for b, block in enumerate(blocks):
            for offset, token in enumerate(block.ids):
                embeddings.setdefault(token, []).append(embeds[b, offset].clone())
        return embeds, positions

    with monkeypatch.context() as patch:
        patch.setattr(agent.engine, "_inputs", spy)
        question = Question("What is it?", picture(seed), intervention=change)
        (answer,) = agent.run_batch([question], tool_choice=tool, limits=SHORT)
    assert answer.results[0].ok
    return Seen(answer, embeddings)


def features(kind: str, seed: int = 1) -> Tensor:
    """f [V, D]: what the encoder gives for the picture."""
    agent = tiny_agent()
    view = agent.run("What?", picture(seed), limits=SHORT, tool_choice="none").views[0]
    return agent.engine.look(kind, [view])[0].tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_three_ways_of_cutting_the_control_state(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = tiny_agent()
    row = agent.engine.table[kind]
    assert row.control is not None
    run = partial(watched, f"reencode_{kind}", monkeypatch=monkeypatch)
    plain = run(None)
    state = plain.answer.calls[0].control
    assert state is not None
    f = features(kind)

    def conditioned(control: Tensor) -> Tensor:
        return agent.model.condition(kind, f, control)

    ordinary = agent.model.get_input_embeddings()(torch.tensor([row.control]))
    torch.testing.assert_close(plain.of(row.control), state)
    torch.testing.assert_close(plain.of(row.placeholder), conditioned(state))

    zero_c = run(Counterfactual(Switches(condition="zero")))
    torch.testing.assert_close(zero_c.of(row.control), state)
    torch.testing.assert_close(zero_c.of(row.placeholder), f)

    zero_h = run(Counterfactual(Switches(state="zero")))
    torch.testing.assert_close(zero_h.of(row.control), state)
    torch.testing.assert_close(zero_h.of(row.placeholder), conditioned(torch.zeros_like(state)))

    token = run(Counterfactual(Switches(token="ordinary")))
    torch.testing.assert_close(token.of(row.control), ordinary)
    torch.testing.assert_close(token.of(row.placeholder), conditioned(state))
    # They are different cuts.
    assert not torch.allclose(zero_c.of(row.placeholder), zero_h.of(row.placeholder))


def test_another_state_and_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tiny_agent()
    row = agent.engine.table["dino"]
    assert row.control is not None
    run = partial(watched, "reencode_dino", monkeypatch=monkeypatch)
    own = run(None).answer.calls[0].control
    other = run(None, seed=2).answer.calls[0].control
    assert own is not None
    assert other is not None
    assert not torch.allclose(own, other)
    swap = Switches(state="swap", token="swap")
    swapped = run(Counterfactual(swap, donor=lambda kind: other if kind == "dino" else None))
    torch.testing.assert_close(swapped.of(row.control), other)
    expected = agent.model.condition("dino", features("dino"), other)
    torch.testing.assert_close(swapped.of(row.placeholder), expected)

    noise = Switches(state="noise", token="noise")
    first, again = run(Counterfactual(noise, seed=5)), run(Counterfactual(noise, seed=5))
    drawn = first.of(row.control)
    torch.testing.assert_close(drawn.norm(), own.norm())
    torch.testing.assert_close(drawn, again.of(row.control))
    assert not torch.allclose(drawn, own)
    assert not torch.allclose(drawn, run(Counterfactual(noise, seed=6)).of(row.control))
    expected = agent.model.condition("dino", features("dino"), drawn)
    torch.testing.assert_close(first.of(row.placeholder), expected)


@pytest.mark.parametrize("tool", ["reencode_sam", "crop_region"])
def test_places_without_features_and_markers_only(
    tool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = tiny_agent()
    kind = next(r for r in agent.engine.table.rows if r.kind.tool == tool)
    run = partial(watched, tool, monkeypatch=monkeypatch)
    plain = run(None).of(kind.placeholder)
    empty = run(Counterfactual(Switches(result="empty"))).of(kind.placeholder)
    row = agent.model.get_input_embeddings()(torch.tensor([kind.placeholder]))
    own = empty.shape[0] if tool != "crop_region" else agent_crop_tokens(empty, row)
    assert empty.shape == plain.shape
    torch.testing.assert_close(empty[-own:], row.expand(own, -1))
    assert not torch.allclose(plain[-own:], row.expand(own, -1))
    markers = (
        run(Counterfactual(Switches(result="markers"))).of(kind.placeholder)
        if tool == "crop_region"
        else None
    )
    if markers is not None:
        assert markers.shape[0] == empty.shape[0] - own  # the whole picture's tokens only
    else:
        seen = run(Counterfactual(Switches(result="markers")))
        assert kind.placeholder not in seen.embeddings


def agent_crop_tokens(given: Tensor, row: Tensor) -> int:
    """How many of the last tokens are those of the crop: they equal the ordinary embedding."""
    same = (given - row).abs().amax(-1) < 1e-6
    return int(same.sum())


@pytest.mark.parametrize("how", ["random", "black", "true"])
def test_crops_are_replaced(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = item(1, boxes=(Box(30, 8, 52, 20),))
    plain = watched("crop_region", None, monkeypatch).answer.results[0].views[0]
    change = Counterfactual(
        Switches(crop=how),
        seed=4,
        shown=asked.shown,
        grid=8,
        policy="cover",  # type: ignore[arg-type]
    )
    view = watched("crop_region", change, monkeypatch).answer.results[0].views[0]
    if how == "black":
        assert view.size == plain.size
        assert view.box == plain.box
        assert view.image.getextrema() == ((0, 0),) * 3
        return
    left, top, right, bottom = (int(v) for v in view.box)
    assert view.image.tobytes() == picture(1).crop((left, top, right, bottom)).tobytes()
    assert view.parent is not None
    if how == "random":
        assert view.size == plain.size
    else:
        assert view.box == Box(21, 7, 53, 21)  # cells of 10.5 x 7 pixels around the box


def test_a_changed_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched("reencode_clip", Counterfactual(Switches(condition="zero")), monkeypatch)
    assert "an experiment changes this run: condition=zero" in seen.answer.warnings
    # The trace keeps the state that the model had, not the one it was given.
    plain = watched("reencode_clip", None, monkeypatch).answer
    torch.testing.assert_close(seen.answer.calls[0].control, plain.calls[0].control)


def test_no_intervention_leaves_the_next_question_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tiny_agent()
    black = Counterfactual(Switches(crop="black"))
    pair = [
        Question("What is it?", picture(1), intervention=black),
        Question("What is it?", picture(1)),
    ]
    changed, same = agent.run_batch(pair, tool_choice="crop_region", limits=SHORT)
    assert changed.results[0].views[0].image.getbbox() is None
    assert same.results[0].views[0].image.getbbox() is not None


def test_prompts_that_hold_a_call_already_are_changed_too() -> None:
    from vpt_agent.engine import Tokens, Unconditioned

    agent = tiny_agent()
    row = agent.engine.table["clip"]
    f = features("clip")
    logits = {}
    for name, change in {
        "plain": None,
        "zero": Counterfactual(Switches(condition="zero")),
        "kept": Counterfactual(Switches()),
    }.items():
        session = agent.engine.session()
        session.intervention = change
        call = agent.layout.tokenizer.encode(row.kind.call_text(), add_special_tokens=False)
        session.append([Tokens([5, 6]), Tokens(call)])
        assert session.fork().intervention is change
        logits[name] = session.append([Unconditioned(row.placeholder, f, "clip")])
        session.close()
    torch.testing.assert_close(logits["plain"], logits["kept"])
    assert not torch.allclose(logits["plain"], logits["zero"])


def test_switches_combine_and_name_themselves() -> None:
    both = Switches(condition="zero", token="ordinary")
    assert str(both) == "condition=zero, token=ordinary"
    assert both
    assert not Switches()
    assert str(Switches()) == "nothing"


def test_wrong_switches_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no such switch; where: Switches.crop"):
        Switches(crop="blue")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="what the projector is given cannot matter"):
        Switches(condition="zero", state="noise")
    with pytest.raises(UserError, match="needs the true boxes"):
        Counterfactual(Switches(crop="true"))
    with pytest.raises(UserError, match="a setting needs a name"):
        Setting(name="")
    with pytest.raises(UserError, match="a swap needs control states"):
        Setting(name="s", switches=Switches(state="swap"))
    change = Counterfactual(Switches(state="swap"))
    question = Question("What is it?", picture(1), intervention=change)
    with pytest.raises(UserError, match="no control state of another item"):
        change.condition("clip", torch.zeros(2, 4), torch.zeros(1, 4), lambda *a: a[1])
    (answer,) = tiny_agent().run_batch([question], tool_choice="reencode_clip", limits=SHORT)
    assert not answer.results or not answer.results[0].ok or answer.status == "failed"
