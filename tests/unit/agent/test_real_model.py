"""The agent on a tiny real model: every kind runs, nothing is computed twice, batches agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from vpt_agent.agent import PerceptionAgent, Question
from vpt_agent.model.testing import tiny_model
from vpt_agent.review import replay
from vpt_agent.types import Limits

TOOLS = ("crop_region", "reencode_clip", "reencode_dino", "reencode_sam")
LIMITS = Limits(new_tokens=24, rounds=2)


@pytest.fixture(scope="module")
def agent() -> PerceptionAgent:
    model, processor = tiny_model(encoders=("clip", "dino", "sam"), seed=3)
    return PerceptionAgent.from_model(model, processor.tokenizer)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@contextmanager
def ending(agent: PerceptionAgent, bias: float) -> Iterator[None]:
    """Make the random model likely to end its turns."""
    model, real = agent.model, agent.model.compute_logits

    def biased(hidden: torch.Tensor) -> torch.Tensor:
        logits = real(hidden)
        logits[..., agent.layout.end] += bias
        return logits

    model.compute_logits = biased
    yield
    del model.compute_logits


@contextmanager
def counted(agent: PerceptionAgent) -> Iterator[Counter[str]]:
    """Counts positions of the language model and pictures of each tower while it is open."""
    seen: Counter[str] = Counter()
    model = agent.model

    def positions(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        seen["positions"] += kwargs["inputs_embeds"].shape[1]

    def base(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        seen["base"] += len(grid)

    def other(name: str):
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            pixels = kwargs.get("pixel_values", args[0] if args else None)
            seen[name] += len(pixels)

        return hook

    handles = [
        model.model.register_forward_pre_hook(positions, with_kwargs=True),
        model.visual.register_forward_pre_hook(base, with_kwargs=True),
        model.encoder("dino").register_forward_pre_hook(other("dino"), with_kwargs=True),
        model.encoder("sam").register_forward_pre_hook(other("sam"), with_kwargs=True),
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("tool", "pictures"),
    [
        ("crop_region", {"base": 2}),
        ("reencode_clip", {"base": 1}),
        ("reencode_dino", {"base": 1, "dino": 1}),
        ("reencode_sam", {"base": 1, "sam": 1}),
    ],
)
def test_each_kind_runs_and_nothing_is_computed_twice(
    agent: PerceptionAgent, tool: str, pictures: dict[str, int]
) -> None:
    with counted(agent) as seen, ending(agent, 20.0):
        answer = agent.run("What is it?", image=picture(TOOLS.index(tool)), tool_choice=tool)
    assert [c.name for c in answer.calls] == [tool]
    assert answer.results[0].ok
    ids = answer.trace.record().ids
    # Each token of the conversation was computed once; what was chosen last never needed it.
    computed = answer.usage.forward_tokens
    assert seen.pop("positions") == computed
    assert computed == len(ids) - 1
    assert dict(seen) == pictures
    assert answer.usage.encoder_calls == sum(pictures.values())
    if tool != "crop_region":
        control = answer.calls[0].control
        assert control is not None
        assert control.shape == (1, agent.model.config.get_text_config().hidden_size)
    finished = next(e for e in answer.trace.events if e.type == "tool_finished")
    assert bool(finished.kernels) == (tool != "crop_region"), "the trace names the kernel"
    appended = next(e for e in answer.trace.events if e.type == "perception_appended")
    assert appended.kernels == ("vpt::splice[cpu:plain]",)


def test_batch_equals_single_runs_for_every_kind(agent: PerceptionAgent) -> None:
    questions = [
        Question(f"What is it, number {i}?", picture(10 + i), tool_choice=tool, seed=i)
        for i, tool in enumerate([*TOOLS, "none", "auto"])
    ]
    options = {"limits": LIMITS, "temperature": 1.0}
    with ending(agent, 7.0):
        together = agent.run_batch(questions, **options)
        alone = [agent.run_batch([question], **options)[0] for question in questions]
    assert sum(len(a.results) > 0 and a.results[0].ok for a in together) >= 3
    for batched, single in zip(together, alone, strict=True):
        assert batched.trace.record().ids == single.trace.record().ids
        assert [c.arguments for c in batched.calls] == [c.arguments for c in single.calls]
        # What runs have in common at their beginnings (the system's words) is computed once.
        computed = batched.usage.forward_tokens + batched.usage.cached_tokens
        assert computed == single.usage.forward_tokens
        assert single.usage.cached_tokens == 0
    assert max(agent.engine.counters.rows_per_forward) >= 5


def test_encoders_run_once_for_pictures_of_several_runs(agent: PerceptionAgent) -> None:
    image = picture(50)
    with counted(agent) as seen, ending(agent, 20.0):
        agent.run_batch(
            [Question("a?", image), Question("b?", image), Question("c?", picture(51))],
            tool_choice="reencode_dino",
        )
    assert seen["base"] == 2
    assert seen["dino"] == 2


def test_sampled_runs_replay(agent: PerceptionAgent) -> None:
    answer = agent.run("Is it?", image=picture(60), temperature=1.0, seed=9, limits=LIMITS)
    assert replay(answer.trace, agent).same
    other = agent.run("Is it?", image=picture(60), temperature=1.0, seed=10, limits=LIMITS)
    assert other.trace.record().ids != answer.trace.record().ids
