"""The conversation layout gives the release's token ids, for whole conversations and prompts."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.parity.goldens import ROOT
from vpt_agent.prompt.vpt import FeatureSlot, Ids, Outcome, PictureSlot, PromptPart, VPTLayout
from vpt_agent.tokens.table import PerceptionTable

NAMES = (
    "two_round_action",
    "round1_only",
    "single_turn",
    "text_only",
    "region_single",
    "region_two",
    "action_inside_text_answer",
)
CASES = [
    case
    for case in json.loads((ROOT / "data_cases.json").read_text())["encode"]
    if case["name"] in NAMES
]


@cache
def tokenizer_of(enc: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ROOT / f"{enc}_tied")


def runs_of(ids: list[int], token: int) -> list[int]:
    """Lengths of the stretches of ``token`` in ``ids``."""
    found, run = [], 0
    for i in [*ids, -1]:
        if i == token:
            run += 1
        elif run:
            found.append(run)
            run = 0
    return found


def flatten(parts: list[PromptPart], image_pad: int, counts: list[int], pad: int, n: int) -> list:
    ids: list[int] = []
    for part in parts:
        if isinstance(part, Ids):
            ids += part.ids
        elif isinstance(part, PictureSlot):
            ids += [image_pad] * counts.pop(0)
        else:
            assert isinstance(part, FeatureSlot)
            ids += [pad] * n
    return ids


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['enc']}-{c['name']}")
def test_ids_equal_the_release(case: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(case["enc"])
    table = PerceptionTable.published([case["enc"]])
    layout = VPTLayout(tokenizer, table)
    kind = table[case["enc"]]
    wanted = case["supervised"]["input_ids"]
    pads = runs_of(wanted, layout.image_pad)
    feature_pad = tokenizer.convert_tokens_to_ids(kind.placeholder)
    features = runs_of(wanted, feature_pad)
    user, said, *rest = (m["content"] for m in case["messages"])
    question = user.removeprefix("<image>\n")
    views = ["image_1"] if user != question else []

    def render(parts: list[PromptPart]) -> list[int]:
        return flatten(parts, layout.image_pad, pads, feature_pad, sum(features))

    ids = render(layout.opening(views, question))
    if not said:
        assert ids == case["prompt_for_generation"]["input_ids"][: len(ids)]
        assert ids == wanted[: len(ids)]
        return
    ids += [*tokenizer.encode(said), layout.end]
    if rest:
        asked, answer = rest
        crops = asked.count("<image>")
        outcome = Outcome(
            "call_1",
            "region" if crops else kind.name,
            tuple(f"crop_{i}" for i in range(crops)),
            features=not crops,
        )
        ids += render(layout.results([outcome]))
        ids += [*tokenizer.encode(answer), layout.end]
    assert ids == wanted
