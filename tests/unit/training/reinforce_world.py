"""A tiny real model that likes to call, an agent on it, and pictures to ask about."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from vpt_agent.agent import PerceptionAgent, Question
from vpt_agent.data import RowEncoder
from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.testing import tiny_model
from vpt_agent.training import Collator
from vpt_agent.training.reinforce import Scorer
from vpt_agent.types import Answer, Limits

LIMITS = Limits(new_tokens=40, calls=3, rounds=3)
ASKED = "Where is it?"


def picture(seed: int, size: tuple[int, int] = (84, 56)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def eager_model(
    *, controls: int = 1, encoders: tuple[str, ...] = ("clip", "dino", "sam")
) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """Random weights whose output head leans towards starting calls and ending turns."""
    model, processor = tiny_model(encoders, tied=False, controls=controls)
    agent = PerceptionAgent.from_model(model, processor.tokenizer)
    seen: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda _, a, __: seen.append(a[0][-1].clone()))
    for seed in range(3):
        agent.run(ASKED, picture(seed), limits=Limits(new_tokens=8))
    handle.remove()
    agent.close()
    mean = torch.stack([s.detach() for s in seen]).mean(0)
    with torch.no_grad():
        for token in (*(row.start for row in model.table.rows), agent.layout.end):
            model.lm_head.weight[token] += mean / mean.norm() ** 2 * 2
    return model, processor


def sampled(agent: PerceptionAgent, count: int, *, temperature: float = 1.3) -> list[Answer]:
    questions = [Question(ASKED, picture(i), seed=i) for i in range(count)]
    return agent.run_batch(questions, temperature=temperature, limits=LIMITS)


def scorer_of(agent: PerceptionAgent) -> Scorer:
    encoder = RowEncoder(agent.layout, agent.engine.policy, max_length=4096)
    return Scorer(Collator(encoder), torch.device("cpu"))
