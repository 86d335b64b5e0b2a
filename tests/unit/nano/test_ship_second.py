"""The second version as it ships: whole, small, loaded by default, with figures of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vpt_agent.agent import PerceptionAgent, load
from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.evaluation import FREE, NO_TOOLS, Called, Outcome, figures_of
from vpt_agent.evaluation.store import weights_hash
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.model.inspect import inspect_checkpoint
from vpt_agent.nano import second_ship as shipping
from vpt_agent.nano.domain import make_domain_scene
from vpt_agent.nano.domain.table import TABLE
from vpt_agent.nano.second.model import build_second
from vpt_agent.nano.second.text import second_tokenizer
from vpt_agent.nano.ship import MOST_BYTES, MOST_PARAMETERS


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights, as the recipe's stage export writes it."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(3)
    tokenizer = second_tokenizer()
    build_second(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shipped(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shipped") / "nano"
    shipping.ship_second(trained, out)
    return out


def test_it_is_small_and_says_what_it_is(trained: Path, shipped: Path) -> None:
    report = inspect_checkpoint(shipped)
    assert report.parameters <= MOST_PARAMETERS
    assert report.dtype == "BF16"
    assert [k.name for k in report.kinds if not k.trained] == []
    assert "scenes only" in report.domain
    assert sum(p.stat().st_size for p in shipped.iterdir()) <= MOST_BYTES
    manifest = json.loads((shipped / "manifest.json").read_text())
    assert manifest["table"] == json.loads(json.dumps(TABLE.to_manifest()))
    was, now = (
        VPTForConditionalGeneration.from_pretrained(p, dtype=torch.float32)
        for p in (trained, shipped)
    )
    other = now.state_dict()
    for name, value in was.state_dict().items():
        assert torch.equal(value.to(torch.bfloat16).float(), other[name]), name


def test_the_default_agent_loads_it_and_uses_every_kind(
    shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "shipped_model", lambda: shipped)
    agent = PerceptionAgent.from_pretrained()
    plain = agent.model.compute_logits

    def brief(hidden: torch.Tensor) -> torch.Tensor:
        # Random weights never come to an end of their own.
        logits = plain(hidden)
        logits[..., agent.layout.end] += 1e4
        return logits

    monkeypatch.setattr(agent.model, "compute_logits", brief)
    image = make_domain_scene(4, size=(672, 672)).image
    for kind in TABLE.kinds:
        answer = agent.run("How many tags?", image, tool_choice=kind.tool)
        assert answer.calls[0].kind == kind.name
        assert answer.results[0].ok, answer.results[0].error
        assert answer.status == "answered"
        assert not any("never trained" in w for w in answer.warnings)
        assert any("scenes only" in w for w in answer.warnings)


def test_other_checkpoints_are_refused(trained: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    model: Any = VPTForConditionalGeneration.from_pretrained(trained)
    tokenizer = second_tokenizer()
    model.config.perception = {**model.config.perception, "regions": "published"}
    model.save_pretrained(first)
    tokenizer.save_pretrained(first)
    with pytest.raises(CheckpointError, match="not of the second version"):
        shipping.ship_second(first, tmp_path / "out")
    model.config.perception = {
        **model.config.perception, "regions": "cover", "untrained": ["sam"]
    }  # fmt: skip
    model.save_pretrained(first)
    with pytest.raises(CheckpointError, match="were never trained"):
        shipping.ship_second(first, tmp_path / "out")
    with pytest.raises(UserError, match="no such kind"):
        shipping.ship_second(trained, tmp_path / "out", untrained=["ears"])
    assert not (tmp_path / "out").exists()


def figures(hash_: str | None) -> dict[str, Any]:
    """Figures of a made-up measurement with the weights of a hash."""
    settings = [NO_TOOLS, FREE]
    rows = [
        Outcome(
            f"i{n}",
            setting.name,
            type=("region", "count_tags")[n % 2],
            score=float(setting is FREE),
            calls=(Called("crop_region", "region", "sampled"),) if setting is FREE else (),
            needs=(("region",),) if n % 2 == 0 else (),
        )
        for setting in settings
        for n in range(20)
    ]
    model: dict[str, Any] = {"name": "m", "untrained": [], "weights_sha256": hash_}
    told = {
        "models": {s.name: model for s in settings},
        **figures_of(rows, [], [s.to_dict() for s in settings]),
    }
    return {"benchmark": "perception", "splits": {"train": told}}


def test_figures_are_stamped_on_their_own_weights_only(shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="of other weights"):
        shipping.stamp(shipped, figures("f00"))
    with pytest.raises(CheckpointError, match="no shipped checkpoint"):
        shipping.stamp(tmp_path, figures("f00"))
    with pytest.raises(UserError, match="no figures of"):
        shipping.stamp(shipped, {"benchmark": "ablations"})
    own = weights_hash(PerceptionAgent.from_pretrained(shipped, device="cpu").model)
    told = tmp_path / "figures.json"
    told.write_text(json.dumps(figures(own)))
    assert shipping.main(["--stamp", str(shipped), "--figures", str(told)]) == 0
    kept = json.loads((shipped / "manifest.json").read_text())["figures"]
    assert kept["train"]["exact"][FREE.name]["region"]["value"] == 1.0
    assert kept["train"]["exact"][NO_TOOLS.name]["all"]["n"] == 20
    assert math.isclose(kept["train"]["choices"][FREE.name]["calls_needed"]["value"], 0.5)


def test_the_command_needs_both_ends(shipped: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        shipping.main(["--trained", str(shipped)])
