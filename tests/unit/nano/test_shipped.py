"""The model that ships: its manifest, its size, and that it needs its second look."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vpt_agent.agent import PerceptionAgent
from vpt_agent.config import shipped_model
from vpt_agent.evaluation import FREE, iogt
from vpt_agent.model.configuration import VPTConfig
from vpt_agent.model.inspect import inspect_checkpoint
from vpt_agent.nano.agent_eval import FIRST_SEED, evaluate, published_forward_tokens
from vpt_agent.nano.alphabet import Split
from vpt_agent.nano.domain.table import TABLE as SECOND
from vpt_agent.nano.report import domain_item
from vpt_agent.nano.scene import make_scene
from vpt_agent.nano.ship import MOST_BYTES, MOST_PARAMETERS, TABLE, image_policy
from vpt_agent.tokens.table import PerceptionTable
from vpt_agent.tool import ToolRegistry
from vpt_agent.vision.policy import ImagePolicy

EXAMPLE = Path("examples/scene.png")
SCENES = 60
MEASURED = ("exact_match", "looked", "tag_inside_crop", "forward_tokens_per_answer",
            "published_forward_tokens_per_answer")  # fmt: skip


def plain(table: PerceptionTable) -> Any:
    """A table's manifest as JSON has it."""
    return json.loads(json.dumps(table.to_manifest()))


def second() -> bool:
    """Whether the second version lies in the package: all kinds trained, other figures."""
    table = json.loads((shipped_model() / "manifest.json").read_text())["table"]
    return bool(table == plain(SECOND))


@pytest.fixture(scope="module")
def agent() -> PerceptionAgent:
    return PerceptionAgent.from_pretrained()


def test_manifest_is_that_of_the_table_and_the_weights() -> None:
    folder = shipped_model()
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = folder / "model.safetensors"
    assert manifest["table"] in (plain(TABLE), plain(SECOND))
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
    untrained = set() if second() else {"clip", "dino", "sam"}
    assert {k.name for k in report.kinds if not k.trained} == untrained
    assert "scenes only" in report.domain
    answer = agent.run("What is this?", image=make_scene(5).image.resize((300, 200)))
    assert any("scenes only" in w for w in answer.warnings)


@pytest.mark.parametrize("tool", ["reencode_clip", "reencode_dino", "reencode_sam"])
def test_the_reencoding_kinds_run(agent: PerceptionAgent, tool: str) -> None:
    answer = agent.run("What is it?", image=make_scene(6).image, tool_choice=tool)
    assert answer.calls[0].name == tool
    assert answer.results[0].ok
    assert any("never trained" in w for w in answer.warnings) != second()


def recorded_exact(figures: dict[str, Any]) -> float:
    """Exact match on questions that a tag be read, choosing freely, as the manifest says."""
    if second():
        return float(figures["exact"][FREE.name]["region"]["value"])
    return float(figures["looking"]["exact_match"])


def measured(agent: PerceptionAgent, split: Split, tool_choice: str) -> dict[str, Any]:
    """Figures of such questions about SCENES scenes of the version's own world."""
    if not second():
        return evaluate(agent, split=split, scenes=SCENES, tool_choice=tool_choice).to_dict()
    found: dict[str, float] = dict.fromkeys(MEASURED, 0.0)
    for n in range(SCENES):
        item = domain_item("region", FIRST_SEED + n, split=split)
        (answer,) = agent.run_batch([(item.question, item.picture())], tool_choice=tool_choice)
        boxes = [v.box for r in answer.results for v in r.views]
        inside = any(iogt(box, item.boxes[0]) >= 1 for box in boxes)
        sums = (answer.text == item.answer, bool(boxes), inside, answer.usage.forward_tokens,
                published_forward_tokens(answer))  # fmt: skip
        for name, value in zip(MEASURED, sums, strict=True):
            found[name] += value / SCENES
    return found


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "unseen"])
def test_it_reads_by_looking_again(
    agent: PerceptionAgent, split: Split, figures: Callable[..., None]
) -> None:
    looking = measured(agent, split, "auto")
    blind = measured(agent, split, "none")
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
    expected = recorded_exact(recorded[split])
    # Sixty scenes: three standard deviations around the figure that was measured on many more.
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
