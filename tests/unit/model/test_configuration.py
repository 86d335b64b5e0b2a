"""VPTConfig: what it holds, what it refuses, and that nothing is lost on the way to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vpt_agent.errors import UserError
from vpt_agent.model import VPTConfig, perception_manifest
from vpt_agent.model.configuration import PublishedVPTConfig, PublishedVRTConfig
from vpt_agent.model.testing import byte_tokenizer, tiny_config, tiny_table
from vpt_agent.model.tokenizer import extend, token_ids
from vpt_agent.tokens.table import PerceptionTable


def tiny(**table: Any) -> VPTConfig:
    tokenizer = byte_tokenizer()
    rows = tiny_table(("clip", "dino"), **table)
    extend(tokenizer, rows)
    return tiny_config(tokenizer, rows)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("positions", "rope"),
        ("gradients", "some"),
        ("control", "stepwise"),
        ("num_inner_forward_run", 3),
        ("para_mask_id", 4),
    ],
)
def test_values_that_do_not_exist(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"value that does not exist.*VPTConfig\.{field}.*{value}"):
        VPTConfig(**{field: value})


def test_an_empty_config_has_no_kinds() -> None:
    config = VPTConfig()
    assert config.table.rows == ()
    assert config.positions == "mrope"


def test_saved_and_read_back(tmp_path: Path) -> None:
    config = tiny(controls=2, grid=4)
    config.para_mask_id, config.para_mask_ratio = 1, 0.5
    config.save_pretrained(tmp_path)
    again = VPTConfig.from_pretrained(tmp_path)
    assert again.perception == config.perception
    assert again.table == config.table
    assert again.projector_scale == 2
    assert again.encoders == config.encoders
    assert (again.para_mask_id, again.para_mask_ratio) == (1, 0.5)


def test_training_masks_rest_and_wake() -> None:
    config = VPTConfig(para_mask_id=2, para_mask_ratio=0.25)
    config.rest_training_masks()
    config.rest_training_masks()  # a second time loses nothing
    assert (config.para_mask_id, config.para_mask_ratio) == (0, 1.0)
    config.wake_training_masks()
    assert (config.para_mask_id, config.para_mask_ratio) == (2, 0.25)


def test_a_manifest_needs_every_token() -> None:
    tokenizer = byte_tokenizer()
    table = PerceptionTable.published(["clip"])
    extend(tokenizer, table)
    ids = token_ids(tokenizer, table)
    del ids[table["clip"].end]
    with pytest.raises(UserError, match=r"lacks a perception token.*action_end"):
        perception_manifest(table, ids, images={})


def test_one_class_for_each_model_type() -> None:
    types = {c.model_type for c in (VPTConfig, PublishedVPTConfig, PublishedVRTConfig)}
    assert types == {"vpt_qwen2_vl", "qwen2_vl_vpt", "vrt_qwen2_vl"}
