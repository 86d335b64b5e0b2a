"""What a user sets of the engine reaches it, and what makes no sense is said."""

from __future__ import annotations

from typing import Any

import pytest

from vpt_agent import PerceptionAgent
from vpt_agent.engine import EngineOptions, Measures
from vpt_agent.errors import UserError
from vpt_agent.model.testing import tiny_model


def test_options_reach_the_engine() -> None:
    model, processor = tiny_model(("clip",))
    measures = Measures(chunk=48, most=96, patience=0.0)
    options = EngineOptions(max_runs=3, measures=measures, block=8, feature_cache=2)
    agent = PerceptionAgent.from_model(model, processor.tokenizer, options=options)
    engine = agent.engine
    assert engine.measures == measures
    assert engine.cache.block == 8
    assert engine.loop.most == 3
    assert engine.loop.patience == 0.0
    assert engine.features.capacity == 2
    agent.close()


def test_a_checkpoint_takes_them() -> None:
    agent = PerceptionAgent.from_pretrained(device="cpu", options=EngineOptions(max_runs=2))
    assert agent.engine.loop.most == 2
    agent.close()


@pytest.mark.parametrize("name", ["max_runs", "block", "feature_cache"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "4"])
def test_numbers_that_make_no_sense_are_said(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{name} must be a whole number from 1 on"):
        EngineOptions(**{name: value})


@pytest.mark.parametrize("name", ["chunk", "most"])
def test_a_step_of_no_tokens_would_never_end(name: str) -> None:
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(UserError, match=f"{name} must be a whole number from 1 on"):
        Measures(**wrong)


@pytest.mark.parametrize("patience", [-1, float("nan"), float("inf"), "1"])
def test_patience_is_a_time(patience: Any) -> None:
    with pytest.raises(UserError, match="patience must be seconds, 0 or more"):
        Measures(patience=patience)


def test_measures_are_measures() -> None:
    wrong: Any = {"chunk": 5}
    with pytest.raises(UserError, match="measures must be Measures"):
        EngineOptions(measures=wrong)
