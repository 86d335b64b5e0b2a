"""The model that ships: its manifest, its size, and that it needs its second look."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vpt_agent.agent import PerceptionAgent
from vpt_agent.config import shipped_model
from vpt_agent.model.configuration import VPTConfig
from vpt_agent.model.inspect import inspect_checkpoint
from vpt_agent.nano.agent_eval import evaluate
from vpt_agent.nano.scene import make_scene
from vpt_agent.nano.ship import MOST_BYTES, MOST_PARAMETERS, TABLE, image_policy
from vpt_agent.tool import ToolRegistry
from vpt_agent.vision.policy import ImagePolicy

EXAMPLE = Path("examples/scene.png")
SCENES = 60


@pytest.fixture(scope="module")
def agent() -> PerceptionAgent:
    return PerceptionAgent.from_pretrained()


def test_manifest_is_that_of_the_table_and_the_weights() -> None:
    folder = shipped_model()
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = folder / "model.safetensors"
    assert manifest["table"] == json.loads(json.dumps(TABLE.to_manifest()))
    assert manifest["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert manifest["bytes"] == weights.stat().st_size <= MOST_BYTES
    perception = VPTConfig.from_pretrained(folder).perception
    assert perception is not None
    assert perception["table"] == manifest["table"]
    now = ImagePolicy.from_manifest(image_policy())
    assert ImagePolicy.from_manifest(perception["images"]) == now
    contracts = ToolRegistry.from_entry_points().contracts()
    changed = {n for n, hash_ in perception["tools"].items() if contracts.get(n) != hash_}
    assert not changed, "a tool's contract changed: train again, or raise its version"


def test_it_is_small_and_says_what_it_is_for(agent: PerceptionAgent) -> None:
    report = inspect_checkpoint()
    assert report.parameters <= MOST_PARAMETERS
    assert report.dtype == "BF16"
    assert {k.name for k in report.kinds if not k.trained} == {"clip", "dino", "sam"}
    assert "scenes only" in report.domain
    answer = agent.run("What is this?", image=make_scene(5).image.resize((300, 200)))
    assert any("scenes only" in w for w in answer.warnings)


@pytest.mark.parametrize("tool", ["reencode_clip", "reencode_dino", "reencode_sam"])
def test_the_untrained_kinds_run(agent: PerceptionAgent, tool: str) -> None:
    answer = agent.run("What is it?", image=make_scene(6).image, tool_choice=tool)
    assert answer.calls[0].name == tool
    assert answer.results[0].ok
    assert any("never trained" in w for w in answer.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "unseen"])
def test_it_reads_by_looking_again(
    agent: PerceptionAgent, split: str, figures: Callable[..., None]
) -> None:
    looking = evaluate(agent, split=split, scenes=SCENES).to_dict()
    blind = evaluate(agent, split=split, scenes=SCENES, tool_choice="none").to_dict()
    figures(
        f"the shipped model on {SCENES} scenes it never saw",
        split="new scenes" if split == "train" else "new fonts and backgrounds",
        looking=looking["exact_match"],
        looking_forbidden=blind["exact_match"],
        tag_inside_crop=looking["tag_inside_crop"],
        positions_an_answer=looking["forward_tokens_per_answer"],
        published_procedure=looking["published_forward_tokens_per_answer"],
    )
    recorded = json.loads((shipped_model() / "manifest.json").read_text())["figures"]
    expected = recorded[split]["looking"]["exact_match"]
    # Sixty scenes: three standard deviations around the figure that was measured on a thousand.
    spread = 3 * (expected * (1 - expected) / SCENES) ** 0.5
    assert looking["exact_match"] >= expected - spread - 0.02
    assert blind["exact_match"] < looking["exact_match"] / 2
    assert looking["looked"] > 0.95


def test_the_example_of_the_readme(agent: PerceptionAgent) -> None:
    facts = json.loads(EXAMPLE.with_suffix(".json").read_text())
    for row in facts["questions"]:
        if row["question"] == "What is written on the red tag?":
            answer = agent.run(row["question"], image=EXAMPLE)
            assert answer.text == row["answer"]
            assert [c.name for c in answer.calls] == ["crop_region"]
            return
    pytest.fail("the example picture has no red tag")
