"""The agent with a kind of the user's own: dispatch, trace, replay, and a tool that is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from vpt_agent.agent import PerceptionAgent
from vpt_agent.data import Encoded, RowEncoder, read_row, row_views
from vpt_agent.engine.decode import TurnRules, decode_turn
from vpt_agent.engine.parts import Tokens
from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.errors import ModelRetry, UserError
from vpt_agent.model import add_perception_kind, mark_trained
from vpt_agent.model.testing import tiny_model
from vpt_agent.review import replay
from vpt_agent.tokens import Grammar, PerceptionTable, own_kind
from vpt_agent.tool import ToolRegistry, perception_tool
from vpt_agent.trace import Trace
from vpt_agent.types import Limits

PRICE = own_kind("price", payload="text", pattern=r"[A-Z]\d{1,2}", argument="key")
SUM = own_kind("sum", payload="text", pattern=r"\d{1,3}[\-+*]\d{1,3}", argument="text")


@perception_tool
def price(key: str) -> str:
    """Say what a part costs."""
    if key == "Z9":
        raise ModelRetry("there is no part Z9")
    return f"{key} costs 41"


PLAIN = ToolRegistry.from_entry_points()
RED = Image.new("RGB", (84, 56), "red")


@contextmanager
def ending(agent: PerceptionAgent) -> Iterator[None]:
    """Make the random model end its turns where it can."""
    model, real = agent.model, agent.model.compute_logits

    def biased(hidden: torch.Tensor) -> torch.Tensor:
        logits = real(hidden)
        logits[..., agent.layout.end] += 20.0
        return logits

    model.compute_logits = biased  # type: ignore[method-assign]
    yield
    del model.compute_logits


def scripted(*turns: str) -> PerceptionAgent:
    return PerceptionAgent.from_script(list(turns), [price], table=PerceptionTable((PRICE,)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny_model(encoders=("clip",), seed=1)
    add_perception_kind(model, processor, PRICE, tool=price)
    mark_trained(model, ["price"])
    folder = tmp_path_factory.mktemp("own")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_text_call_is_dispatched_and_its_text_is_the_next_turn(tmp_path: Path) -> None:
    agent = scripted(f"Let me see. {PRICE.call_text(text='K7')}", "41")
    answer = agent.run("What does K7 cost?", image=RED, trace=tmp_path / "run")
    assert answer.text == "41"
    (call,), (result,) = answer.calls, answer.results
    assert (call.name, call.kind, dict(call.arguments)) == ("price", "price", {"key": "K7"})
    assert result.text == "K7 costs 41"
    assert answer.usage.encoder_calls == 1, "no second look"
    said = agent.layout.raw_text(answer.trace.record().ids)
    assert (
        f"{PRICE.call_text(text='K7')}<|im_end|>\n<|im_start|>user\nK7 costs 41<|im_end|>" in said
    )
    again = Trace.read(tmp_path / "run")
    assert again.events == answer.trace.events
    assert replay(again, agent).same
    assert (
        "K7 costs 41"
        in (again.to_html(tmp_path / "run.html") or (tmp_path / "run.html")).read_text()
    )


def test_a_malformed_call_and_a_refused_one_are_told(tmp_path: Path) -> None:
    agent = scripted(PRICE.call_text(text="Z9"), PRICE.call_text(text="A1"), "41")
    answer = agent.run("What?", image=RED)
    assert [r.error.message if r.error else r.text for r in answer.results] == [
        "there is no part Z9",
        "A1 costs 41",
    ]
    assert answer.text == "41"


def test_the_script_cannot_break_a_call() -> None:
    agent = scripted(f"{PRICE.start}this is no part{PRICE.end}", "41")
    answer = agent.run("What?", image=RED)
    assert re.fullmatch(PRICE.pattern, answer.calls[0].arguments["key"])


def test_a_checkpoint_needs_the_tool_only(saved: Path) -> None:
    agent = PerceptionAgent.from_pretrained(saved, device="cpu", tools=[price])
    with ending(agent):
        answer = agent.run("What?", image=RED, tool_choice="price")
    call = answer.calls[0]
    assert call.name == "price"
    assert re.fullmatch(PRICE.pattern, call.arguments["key"])
    assert answer.results[0].text == f"{call.arguments['key']} costs 41"
    assert not [w for w in answer.warnings if "price" in w]
    sampled = agent.run("Is it?", image=RED, tool_choice="price", temperature=1.0, seed=4,
                        limits=Limits(new_tokens=20))  # fmt: skip
    assert replay(sampled.trace, agent).same


def test_a_missing_tool_is_named_with_its_contract_and_the_way_to_give_it(saved: Path) -> None:
    with pytest.raises(UserError) as raised:
        PerceptionAgent.from_pretrained(saved, device="cpu")
    said = str(raised.value)
    assert said.startswith("this model calls a tool that is not here")
    assert "perception kind price" in said
    assert f"price@1, contract {price.contract_hash}" in said
    assert "tools=[price]" in said
    assert "'vpt_agent.tools'" in said
    # A registry says that it is meant: the kind is then not offered, and a warning tells so.
    agent = PerceptionAgent.from_pretrained(saved, device="cpu", tools=PLAIN)
    answer = agent.run("What?", image=RED, limits=Limits(new_tokens=2))
    assert any("its tool price is not registered" in w for w in answer.warnings)


def test_a_changed_tool_is_told(saved: Path) -> None:
    @perception_tool(name="price")
    def other(key: str, currency: str = "EUR") -> str:
        """Say what a part costs."""
        return key + currency

    agent = PerceptionAgent.from_pretrained(saved, device="cpu", tools=[other])
    answer = agent.run("What?", image=RED, limits=Limits(new_tokens=2))
    assert any("price@1 is not the one this model was trained with" in w for w in answer.warnings)


@pytest.mark.slow
def test_forced_text_calls_on_random_weights_are_always_valid() -> None:
    model, processor = tiny_model(encoders=("clip",), seed=1)

    @perception_tool(name="sum")
    def total(text: str) -> str:
        """Add."""
        return text

    add_perception_kind(model, processor, SUM, tool=total)
    agent = PerceptionAgent.from_model(model, processor.tokenizer, [total])
    engine, table = agent.engine, agent.engine.table
    base = engine.session()
    logits = base.append([Tokens(agent.layout.encode_text("How much?"))])[-1]
    rules = TurnRules(
        grammar=Grammar(table),
        end=agent.layout.end,
        stop=frozenset({agent.layout.end}),
        starts=frozenset(r.start for r in table.rows),
        first=frozenset({table["sum"].start}),
        max_new_tokens=9,
        max_calls=1,
    )
    texts = []
    for first in range(0, 1000, 50):
        sessions = [base.fork() for _ in range(50)]
        samplers = [Sampler(Sampling(temperature=1.0, seed=first + i)) for i in range(50)]
        turns = [decode_turn(s, logits, r, rules) for s, r in zip(sessions, samplers, strict=True)]
        for turn in engine.drive(turns):
            texts += [c.parsed.arguments["text"] for c in turn.calls]
        for session in sessions:
            session.close()
    assert len(texts) == 1000
    assert all(re.fullmatch(SUM.pattern, text) for text in texts)
    assert len(set(texts)) > 100


def test_rows_are_spelled_as_the_agent_decodes(saved: Path, tmp_path: Path) -> None:
    agent = PerceptionAgent.from_pretrained(saved, device="cpu", tools=[price])
    RED.save(tmp_path / "a.png")
    with ending(agent):
        answer = agent.run("What?", image=RED, tool_choice="price")
    key = answer.calls[0].arguments["key"]
    row = read_row(
        {
            "messages": [
                {"role": "user", "content": "<image>\nWhat?"},
                {"role": "assistant", "content": PRICE.call_text(text=key)},
                {"role": "user", "content": f"{key} costs 41"},
                {"role": "assistant", "content": "41"},
            ],
            "images": [str(tmp_path / "a.png")],
        }
    )
    encoder = RowEncoder(agent.layout, agent.engine.policy)
    encoded = encoder.encode(row, row_views(row))
    assert isinstance(encoded, Encoded)
    ids = list(encoded.record.ids)
    given = ids[: len(ids) - len(agent.layout.encode_text("41")) - 1]
    assert answer.trace.record().ids[: len(given)] == given
    learnt = [i for i, label in zip(ids, encoded.labels, strict=True) if label != -100]
    assert agent.layout.raw_text(learnt) == PRICE.call_text(text=key) + "<|im_end|>41<|im_end|>"
    assert torch.tensor(ids).max() < agent.model.config.text_config.vocab_size
