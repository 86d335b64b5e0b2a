"""VPTConfig: a Qwen2-VL config plus what the checkpoint's perception is.

``perception`` is the manifest, a JSON-able dict:

| key | what |
|---|---|
| ``table`` | :meth:`PerceptionTable.to_manifest`: the kinds |
| ``ids`` | token spelling → id, for every token of the table |
| ``images`` | image policy, as ``vpt_agent.vision`` reads it |
| ``regions`` | grid → box policy: ``published`` or ``cover`` |
| ``trigger`` | ``phrase``: calls need their trigger phrase; ``free``: the model chooses |
| ``untrained`` | names of kinds whose weights are random |
| ``domain`` | what the model is good for, one sentence, or empty |
| ``tools`` | tool name → hash of its contract when the model was trained |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from transformers import AutoConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig

from vpt_agent.errors import UserError
from vpt_agent.model.published import PUBLISHED_MODEL_TYPES, from_published
from vpt_agent.model.tokenizer import kind_tokens
from vpt_agent.tokens.table import PerceptionTable, ResolvedTable

Positions = Literal["published", "mrope"]
Gradients = Literal["published", "full"]
Control = Literal["published", "causal"]

TRAINING_FIELDS: Mapping[str, Any] = {"para_mask_id": 0, "para_mask_ratio": 1.0}
"""Fields that act in training only, and their inactive values."""

_CHOICES: Mapping[str, tuple[Any, ...]] = {
    "positions": ("published", "mrope"),
    "gradients": ("published", "full"),
    "control": ("published", "causal"),
    "num_inner_forward_run": (1, 2),
    "para_mask_id": (0, 1, 2),
}


class VPTConfig(Qwen2VLConfig):
    """Config of :class:`VPTForConditionalGeneration`.

    ``num_inner_forward_run`` 2 is the model with control states, 1 the alignment stage without;
    ``para_mask_id`` 0, 1, 2 and ``para_mask_ratio`` are mask modelling. ``positions``: what
    ``forward`` uses when it gets none, 0..L-1 (``published``) or M-RoPE. ``gradients``:
    ``published`` gives none to the towers and the input embeddings. ``control``: the one-shot
    forward of the release (``published``), or each control state seeing the earlier ones
    (``causal``), as stepwise decoding does. ``training`` keeps the masks a checkpoint was trained
    with, which do not act after loading. ``{prefix}_config`` are encoder shapes by config prefix,
    in ``encoders``.
    """

    model_type = "vpt_qwen2_vl"
    keys_to_ignore_at_inference = ["past_key_values", "controls", "features"]  # noqa: RUF012

    perception: dict[str, Any] | None = None
    encoders: dict[str, Any] | None = None
    num_inner_forward_run: int = 2
    para_mask_id: int = 0
    para_mask_ratio: float = 1.0
    para_start_id: int | None = None
    para_end_id: int | None = None
    positions: str = "mrope"
    gradients: str = "published"
    control: str = "published"
    training: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the choices, then let transformers set up the rest."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    "a config field has a value that does not exist",
                    where=f"VPTConfig.{name}",
                    got=repr(getattr(self, name)),
                    expected=" or ".join(repr(a) for a in allowed),
                )
        self.encoders = dict(self.encoders or {})
        super().__post_init__(**kwargs)

    @property
    def table(self) -> ResolvedTable:
        """The kinds with their token ids. Empty for a config without ``perception``."""
        if self.perception is None:
            return ResolvedTable((), 1)
        ids = self.perception["ids"]
        return PerceptionTable.from_manifest(self.perception["table"]).resolve(ids.get)

    @property
    def projector_scale(self) -> int:
        """Control tokens per call (the published name)."""
        return self.table.controls

    def rest_training_masks(self) -> None:
        """Make the training masks inactive, keeping their values in ``training``."""
        kept = dict(self.training or {})
        for name, inactive in TRAINING_FIELDS.items():
            value = getattr(self, name)
            if value != inactive:
                kept[name] = value
                setattr(self, name, inactive)
        self.training = kept

    def wake_training_masks(self) -> None:
        """Put the masks kept in ``training`` back into force."""
        for name, value in (self.training or {}).items():
            if name in TRAINING_FIELDS:
                setattr(self, name, value)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; a published config comes out as one of ours."""
        data, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        hub = {k: kwargs[k] for k in ("cache_dir", "revision", "token", "local_files_only")
               if kwargs.get(k) is not None}  # fmt: skip
        if data.get("model_type") in PUBLISHED_MODEL_TYPES:
            data = from_published(data, str(pretrained_model_name_or_path), **hub)
        return data, rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a published config comes out as one of ours."""
        if config_dict.get("model_type") in PUBLISHED_MODEL_TYPES:
            config_dict = from_published(config_dict, kwargs.get("name_or_path"))
            return VPTConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


class PublishedVPTConfig(VPTConfig):
    """Reads the published ``qwen2_vl_vpt`` configs: gives a :class:`VPTConfig`."""

    model_type = "qwen2_vl_vpt"


class PublishedVRTConfig(VPTConfig):
    """Reads the published ``vrt_qwen2_vl`` configs: gives a :class:`VPTConfig`."""

    model_type = "vrt_qwen2_vl"


def perception_manifest(
    table: PerceptionTable,
    ids: Mapping[str, int],
    *,
    images: Mapping[str, Any],
    regions: str = "cover",
    trigger: str = "free",
    untrained: Iterable[str] = (),
    domain: str = "",
    tools: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The ``perception`` dict of a config. ``ids`` must hold every token of ``table``."""
    table.resolve(ids.get)  # a missing token is an error that names it
    return {
        "table": table.to_manifest(),
        "ids": {token: int(ids[token]) for token in kind_tokens(table)},
        "images": dict(images),
        "regions": regions,
        "trigger": trigger,
        "untrained": list(untrained),
        "domain": domain,
        "tools": dict(tools or {}),
    }


def register() -> None:
    """Make AutoConfig know the config types."""
    for config in (VPTConfig, PublishedVPTConfig, PublishedVRTConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
