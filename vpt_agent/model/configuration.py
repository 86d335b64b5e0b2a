"""VPTConfig: a Qwen-VL config plus what the checkpoint's perception is; one class for each base.

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
from typing import Any, ClassVar, Literal

from transformers import AutoConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

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

    This is the class for Qwen2-VL, and the parent of those for other bases; ``base`` names the base
    (a row of :data:`vpt_agent.model.bases.BASES`). Its ``from_pretrained`` and ``from_dict`` give
    the class that the model type asks for.
    """

    model_type = "vpt_qwen2_vl"
    base: ClassVar[str] = "qwen2_vl"
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
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in transformers; the class is that of the stored config's base."""
        data, _ = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        made = _class_for(data, cls)
        return super(VPTConfig, made).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; a published config comes out as one of ours."""
        if config_dict.get("model_type") in PUBLISHED_MODEL_TYPES:
            config_dict = from_published(config_dict, kwargs.get("name_or_path"))
            return VPTConfig.from_dict(config_dict, **kwargs)
        return super(VPTConfig, _class_for(config_dict, cls)).from_dict(config_dict, **kwargs)


class VPTQwen25VLConfig(VPTConfig):
    """A VPT config on Qwen2.5-VL."""

    model_type = "vpt_qwen2_5_vl"
    base: ClassVar[str] = "qwen2_5_vl"
    # transformers reads the first up to 5.17, the second after.
    sub_configs = Qwen2_5_VLConfig.sub_configs
    sub_configs_defaults = getattr(Qwen2_5_VLConfig, "sub_configs_defaults", {})


class VPTQwen3VLConfig(VPTConfig):
    """A VPT config on Qwen3-VL (the dense models)."""

    model_type = "vpt_qwen3_vl"
    base: ClassVar[str] = "qwen3_vl"
    sub_configs = Qwen3VLConfig.sub_configs
    sub_configs_defaults = getattr(Qwen3VLConfig, "sub_configs_defaults", {})


class PublishedVPTConfig(VPTConfig):
    """Reads the published ``qwen2_vl_vpt`` configs: gives a :class:`VPTConfig`."""

    model_type = "qwen2_vl_vpt"


class PublishedVRTConfig(VPTConfig):
    """Reads the published ``vrt_qwen2_vl`` configs: gives a :class:`VPTConfig`."""

    model_type = "vrt_qwen2_vl"


CONFIGS: Mapping[str, type[VPTConfig]] = {
    made.base: made for made in (VPTConfig, VPTQwen25VLConfig, VPTQwen3VLConfig)
}
"""Config classes by base."""

OUR_MODEL_TYPES = tuple(made.model_type for made in CONFIGS.values())
"""What ``config.json`` says of checkpoints that this package wrote."""


def _class_for(data: Mapping[str, Any], cls: type[VPTConfig]) -> type[VPTConfig]:
    """The class for a stored config; ``cls`` where its model type is of no base."""
    found = (made for made in CONFIGS.values() if made.model_type == data.get("model_type"))
    return next(found, cls)


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
    published: tuple[type[VPTConfig], ...] = (PublishedVPTConfig, PublishedVRTConfig)
    for config in (*CONFIGS.values(), *published):
        AutoConfig.register(config.model_type, config, exist_ok=True)
