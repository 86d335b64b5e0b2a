"""Rows to ids, labels, lengths, freeze sets and accuracies, as the release computes them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.parity.goldens import ROOT
from vpt_agent.data import RowEncoder, Rules, infer_seqlen, parse_image_path, read_row, row_views
from vpt_agent.errors import UserError
from vpt_agent.evaluation import published_score
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.prompt.vpt import VPTLayout
from vpt_agent.tokens import PUBLISHED, PerceptionTable
from vpt_agent.training import ClassAccuracy, trainable_names
from vpt_agent.vision import PUBLISHED_POLICY

DATA: dict[str, Any] = json.loads((ROOT / "data_cases.json").read_text())
REGIONS: dict[str, Any] = json.loads((ROOT / "region_cases.json").read_text())
SPARE = "too_many_re_images (not checked)"


@cache
def layout_of(enc: str) -> VPTLayout:
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / f"{enc}_tied"))
    return VPTLayout(tokenizer, PerceptionTable.published([enc]))


@cache
def model_of(enc: str) -> VPTForConditionalGeneration:
    return VPTForConditionalGeneration.from_pretrained(ROOT / f"{enc}_tied")


def row_of(case: dict[str, Any]) -> dict[str, Any]:
    """The case as a row of the published JSON. ``a:_1,2,3,4`` there is ``a.png_1,2,3,4`` here."""

    def paths(names: list[str]) -> list[str]:
        return [f"{name.split(':')[0]}.png{name[len(name.split(':')[0]) + 1 :]}" for name in names]

    column = PUBLISHED[case["enc"]].tag.strip("<>") + "s"
    images, again = paths(case["images"]), paths(case["re_images"])
    return {"messages": case["messages"], "images": images, column: again}


def encoder_of(case: dict[str, Any], rules: Rules) -> RowEncoder:
    return RowEncoder(
        layout_of(case["enc"]), PUBLISHED_POLICY, max_length=case["cutoff_len"], rules=rules
    )


def name_of(case: dict[str, Any]) -> str:
    return f"{case['enc']}-{case['name'].split()[0]}"


GOOD = [c for c in DATA["encode"] if "error" not in c["supervised"]]
BAD = [c for c in DATA["encode"] if "error" in c["supervised"]]
WHOLE = [c for c in GOOD if "truncated" not in c["name"] and c["name"] != SPARE]


def test_all_cases_are_here() -> None:
    assert (len(GOOD), len(BAD), len(WHOLE)) == (33, 9, 24)
    assert (len(DATA["infer_seqlen"]), len(DATA["classwise_accuracy"])) == (40, 3)
    assert len(DATA["freefreeze"]) == 8
    assert (len(REGIONS["extract_score"]), len(REGIONS["path_suffix_parse"])) == (17, 9)


@pytest.mark.parametrize("case", GOOD, ids=name_of)
def test_published_rules_give_the_published_ids_and_labels(case: dict[str, Any]) -> None:
    encoder = encoder_of(case, "published")
    row = read_row(row_of(case), rules="published")
    views = row_views(row, folder=ROOT / "images")
    encoded, prompt = encoder.encode(row, views), encoder.prompt(row, views)
    assert encoded.record.ids == case["supervised"]["input_ids"]
    assert list(encoded.labels) == case["supervised"]["labels"]
    assert prompt.record.ids == case["prompt_for_generation"]["input_ids"]
    assert list(prompt.answer) == case["prompt_for_generation"]["labels"]


@pytest.mark.parametrize("case", WHOLE, ids=name_of)
def test_strict_rules_give_the_same_where_nothing_is_cut(case: dict[str, Any]) -> None:
    encoder = encoder_of(case, "strict")
    row = read_row(row_of(case))
    views = row_views(row, folder=ROOT / "images")
    encoded, prompt = encoder.encode(row, views), encoder.prompt(row, views)
    assert encoded.record.ids == case["supervised"]["input_ids"]
    assert list(encoded.labels) == case["supervised"]["labels"]
    assert prompt.record.ids == case["prompt_for_generation"]["input_ids"]
    assert list(prompt.answer) == case["prompt_for_generation"]["labels"]


@pytest.mark.parametrize("rules", ["strict", "published"])
@pytest.mark.parametrize("case", BAD, ids=name_of)
def test_what_the_release_refuses_is_one_clear_error(case: dict[str, Any], rules: Rules) -> None:
    assert case["supervised"] == case["prompt_for_generation"] == {"error": "ValueError"}
    with pytest.raises(UserError, match=r"too (few|many) pictures for the tags.*one for each <"):
        read_row(row_of(case), rules=rules)


@pytest.mark.parametrize(
    "case", [c for c in DATA["encode"] if c["name"] == SPARE], ids=lambda c: c["enc"]
)
def test_spare_pictures_are_refused_unless_asked_for(case: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"too many pictures for the tags.*got: 2 pictures"):
        read_row(row_of(case))


@pytest.mark.parametrize("case", [c for c in GOOD if "truncated" in c["name"]], ids=name_of)
def test_strict_rules_drop_what_the_release_tears(case: dict[str, Any]) -> None:
    encoder = encoder_of(case, "strict")
    row = read_row(row_of(case))
    dropped = encoder.encode(row, row_views(row, folder=ROOT / "images"))
    # 40: the release cuts the question; 70: the result of a call.
    assert dropped.reason == ("prompt" if case["cutoff_len"] == 40 else "call")
    assert dropped.length > case["cutoff_len"]


@pytest.mark.parametrize(("source", "target", "budget", "kept"), DATA["infer_seqlen"])
def test_lengths_kept(source: int, target: int, budget: int, kept: list[int]) -> None:
    assert list(infer_seqlen(source, target, budget)) == kept


def _top_levels(names: set[str]) -> set[str]:
    """``model.layers.0...`` to ``model.layers``, others to their first part, as in the golden."""
    parts = [name.split(".") for name in names]
    return {".".join(p[:2]) if p[0] == "model" else p[0] for p in parts}


@pytest.mark.parametrize("name", DATA["freefreeze"])
def test_the_same_parameters_are_frozen(name: str) -> None:
    case = DATA["freefreeze"][name]
    model = model_of(name.split("(")[1].rstrip(")"))
    names = {name for name, _ in model.named_parameters()}
    trainable = trainable_names(names, frozen=case["frozen"], trainable=case["trainable"])
    assert _top_levels(set(trainable)) == set(case["trainable_top_level"])
    frozen = {name.split(".")[0] for name in names - trainable}
    assert frozen == set(case["frozen_top_level"])


@pytest.mark.parametrize("case", DATA["classwise_accuracy"])
def test_accuracy_by_class(case: dict[str, Any]) -> None:
    accuracy = ClassAccuracy(case["class_set"])
    accuracy.update(np.array(case["preds"]), np.array(case["labels"]))
    assert accuracy.result() == pytest.approx(case["result"], abs=1e-12)


@pytest.mark.parametrize(("reply", "score"), REGIONS["extract_score"])
def test_scores_are_read_as_published(reply: str, score: float) -> None:
    assert published_score(reply) == score


@pytest.mark.parametrize(("path", "plain", "crop"), REGIONS["path_suffix_parse"])
def test_crop_suffixes(path: str, plain: str, crop: list[int] | str | None) -> None:
    if isinstance(crop, list) and len(crop) == 4 and min(crop) >= 0:
        assert vars(parse_image_path(path)) == {"path": plain, "crop": tuple(crop)}
    elif isinstance(crop, list) or path == "/a/b.jpg_1.5,2,3,4":
        # The release hands such a box to the picture library, or looks for a file of that name.
        with pytest.raises(UserError, match=r"crop at the end of a picture's path"):
            parse_image_path(path)
    else:  # a path, also where the release fails (no ending, or a dot in a folder's name)
        assert crop in (None, "ValueError")
        assert vars(parse_image_path(path)) == {"path": path, "crop": None}
