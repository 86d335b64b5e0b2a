"""VPTForConditionalGeneration: a Qwen-VL with perception kinds, on transformers' own parts.

The base (Qwen2-VL, Qwen2.5-VL, Qwen3-VL) is the config's. Parts carry the published names
(``visual``, ``model``, ``lm_head``, ``{prefix}_model``, ``{prefix}_projector``), so published keys
fit without renaming. B rows, L positions, D the language model's width, V visual tokens of one
picture, k control tokens per call, P patches, W the width of what enters the language model: D, and
more where the base is Qwen3-VL (see ``deepstack``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLPreTrainedModel
from transformers.utils import ModelOutput

from vpt_agent.errors import UserError
from vpt_agent.kernels import condition as condition_op
from vpt_agent.model.attention import ready_mask
from vpt_agent.model.bases import build_parts_of
from vpt_agent.model.checkpoint import load_model
from vpt_agent.model.configuration import (
    VPTConfig,
    VPTQwen3VLConfig,
    VPTQwen25VLConfig,
    register,
)
from vpt_agent.model.deepstack import joined, split
from vpt_agent.model.direct import DirectDecoder, ExplicitCache, times
from vpt_agent.model.encoders import (
    PlainConv,
    Projector,
    XavierLinear,
    build_parts,
    run_encoder,
    stack_segments,
)
from vpt_agent.model.forward import Forward, Inputs, RunWatcher, run_forward
from vpt_agent.model.fresh import FromScratch
from vpt_agent.model.masking import MaskRule
from vpt_agent.model.memory import FeatureMemory
from vpt_agent.model.patchconv import patches_as_products
from vpt_agent.model.positions import Grid, rope_positions
from vpt_agent.tokens.table import PerceptionKind


@dataclass
class VPTOutput(ModelOutput):
    """What ``forward`` gives.

    ``loss`` scalar float32 (with labels), ``logits`` [B, L, vocab] float32 of the last pass,
    ``controls`` [n, D]: the control state of each control token, row by row; ``features`` [m, D]:
    what stands at the placeholders of re-encoded pictures in the last pass, row by row.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    controls: Tensor | None = None
    features: Tensor | None = None


class VPTForConditionalGeneration(Qwen2VLPreTrainedModel, GenerationMixin):
    """The VPT model. Use it through :class:`vpt_agent.PerceptionAgent`, or train its ``forward``.

    The methods below ``forward`` are what an engine builds a run from, without gradients and state.
    """

    config_class = VPTConfig
    config: VPTConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = False  # the loss is the mean over one batch's labels, as published
    steps_on_device = True  # its passes decide nothing by values: an engine can record them
    runs: RunWatcher | None = None  # is told of the runs of a forward (sharded weights)

    def __init__(self, config: VPTConfig) -> None:
        super().__init__(config)
        self.visual, self.model = build_parts_of(config.base, config)
        patches_as_products(self.visual)
        # Which layers stay whole when the model is spread or sharded: its parts know.
        self._no_split_modules = None
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.table = config.table
        self._encoders: dict[str, str] = {}  # kind -> attribute
        self._projectors: dict[str, str] = {}
        self._direct: tuple[Any, DirectDecoder | None] = (None, None)  # and whose it is
        for row in self.table.rows:
            kind = row.kind
            if kind.payload != "control" or kind.projector is None:
                continue
            encoder, projector = build_parts(
                kind, config.encoders or {}, text.hidden_size, self.table.controls
            )
            self._hold(kind, encoder, projector)
        self.post_init()

    def _hold(self, kind: PerceptionKind, encoder: nn.Module | None, projector: Projector) -> None:
        self._projectors[kind.name] = str(kind.projector)
        setattr(self, str(kind.projector), projector)
        if encoder is not None:
            self._encoders[kind.name] = f"{kind.config_prefix}_model"
            setattr(self, f"{kind.config_prefix}_model", encoder)

    def add_parts(
        self, kind: PerceptionKind, encoder: nn.Module | None, projector: Projector
    ) -> None:
        """Hold the parts of a new kind; see :func:`vpt_agent.model.add_perception_kind`."""
        for part in (projector, encoder):
            if part is not None:
                part.to(device=self.device, dtype=self.dtype).train(self.training)
        self._hold(kind, encoder, projector)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, XavierLinear | PlainConv):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *model_args: Any,
        config: VPTConfig | None = None,
        encoders: Iterable[str] | None = None,
        encoder_weights: Mapping[str, str | Path] | None = None,
        controls: int | None = None,
        grid: int | None = None,
        for_training: bool = False,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> VPTForConditionalGeneration:
        """Load a published VPT checkpoint, one of ours, or a plain Qwen-VL with ``encoders``.

        The name is a directory or a hub name. ``encoders`` (any of clip, dino, sam; may be empty)
        makes a fresh VPT model of a plain Qwen2-VL, Qwen2.5-VL or dense Qwen3-VL (whatever class
        of this module it is called on): ``controls`` control tokens per call (1),
        ``grid`` cells a side (8), ``encoder_weights`` directories of DINOv2 and SAM models by
        kind (for sam an original ``.pth`` file, too), random without. ``for_training`` puts the
        masks of a checkpoint's training into force; without it they rest. ``device`` moves the
        model; ``dtype``, ``device_map`` and the rest go to transformers. A missing, unexpected or
        misshapen tensor is a
        :class:`~vpt_agent.errors.CheckpointError` that names it.
        """
        info: Mapping[str, Any] = {}
        reported = kwargs.pop("output_loading_info", False)
        if pretrained_model_name_or_path is None:  # a state dict in memory: transformers' business
            made = super().from_pretrained(None, *model_args, config=config, **kwargs)
        else:
            names = None if encoders is None else tuple(encoders)
            made, info = load_model(
                super().from_pretrained,
                pretrained_model_name_or_path,
                config=config,
                scratch=FromScratch(names, controls, grid, encoder_weights),
                for_training=for_training,
                **kwargs,
            )
        model: VPTForConditionalGeneration = made if device is None else made.to(device)
        return (model, info) if reported else model  # type: ignore[return-value]

    # --- parts, by kind -----------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings [vocab, D]."""
        embeddings: nn.Module = self.model.embed_tokens
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.model.embed_tokens = value

    def projector(self, kind: str) -> Projector:
        """The projector of a re-encoding kind."""
        if kind not in self._projectors:
            raise UserError(
                "this model cannot re-encode with that kind",
                got=kind,
                expected=", ".join(self._projectors) or "no kind at all",
            )
        part = getattr(self, self._projectors[kind])
        assert isinstance(part, Projector)
        return part

    def encoder(self, kind: str) -> nn.Module | None:
        """The kind's own encoder, or None where the base tower is its encoder."""
        self.projector(kind)
        name = self._encoders.get(kind)
        return None if name is None else getattr(self, name)

    # --- what an engine calls -----------------------------------------------------------------

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        """Visual tokens of N pictures from the base tower and merger: N tensors [V_i, W].

        ``pixel_values`` [P, C*T*p*p] float: the patches of all pictures, one after the other;
        ``grid_thw`` [N, 3] int64: their grids in patches, whose products sum to P.
        """
        vision = self.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        if pixel_values.shape[1] != width:
            raise UserError(
                "patches of another size than this model's tower reads",
                where="encode_images",
                got=f"{pixel_values.shape[1]} values",
                expected=f"{width}: patches of {vision.patch_size} x {vision.patch_size} pixels",
                fix=f"an image policy with patch={vision.patch_size}, as in the model's config",
            )
        expected = int(grid_thw.prod(-1).sum())
        if pixel_values.shape[0] != expected:
            raise UserError(
                "patches and grids of the pictures do not fit",
                got=f"{pixel_values.shape[0]} patches",
                expected=f"{expected}, by the grids {grid_thw.tolist()}",
            )
        weight = self.visual.patch_embed.proj.weight
        output = self.visual(pixel_values.to(weight.dtype), grid_thw=grid_thw, return_dict=True)
        levels = getattr(output, "deepstack_features", None)
        tokens = joined(output.pooler_output, levels)  # [sum V_i, W]
        counts = grid_thw.prod(-1) // self.visual.spatial_merge_size**2
        return torch.split(tokens, counts.tolist())

    def run_tower(self, kind: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Encoder output of a kind, before its projector: one tensor per picture.

        Kinds of the base tower take ``pixel_values`` and ``grid_thw``, the others ``pixels``
        [N, 3, S, S] float, normalised, S being the row's ``input_size``.
        """
        module = self.encoder(kind)
        wanted = {"pixels"} if module is not None else {"pixel_values", "grid_thw"}
        if set(inputs) != wanted:
            raise UserError(
                "wrong inputs for this kind's encoder",
                where=kind,
                got=", ".join(sorted(inputs)) or "nothing",
                expected=", ".join(sorted(wanted)),
            )
        if module is None:
            return self.encode_images(**inputs)
        return tuple(run_encoder(self.table[kind].kind, module, inputs["pixels"]))

    def encode(self, kind: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        """Unconditioned features f of a re-encoding kind: one [V, D] per picture.

        Inputs as :meth:`run_tower`.
        """
        projector = self.projector(kind)
        return tuple(projector.features(encoded) for encoded in self.run_tower(kind, **inputs))

    def features_from_base(self, kind: str, tower_tokens: Tensor) -> Tensor:
        """Features f [V, D] of a kind of the base tower from tokens [V, W] it already gave."""
        if self.encoder(kind) is not None:
            raise UserError(
                "this kind does not use the base tower, so its tokens cannot be reused",
                got=kind,
                fix="call encode()",
            )
        return self.projector(kind).features(tower_tokens)

    def condition(self, kind: str, features: Tensor, control: Tensor) -> Tensor:
        """Features [V, D] of one picture conditioned on the control states [k, D] of its call."""
        return self.condition_many(kind, [features], control[None])

    def condition_many(self, kind: str, features: Sequence[Tensor], controls: Tensor) -> Tensor:
        """Features of M pictures, each on its own control states [M, k, D]: [sum V_i, D].

        Paper section 3.3: c = linear(LN(control states)), result f + (f . c) c.
        """
        k, width = self.table.controls, self.config.text_config.hidden_size
        if tuple(controls.shape) != (len(features), k, width):
            raise UserError(
                "control states of the wrong shape",
                where=kind,
                got=tuple(controls.shape),
                expected=f"{len(features)} pictures of [{k}, {width}]",
            )
        projector = self.projector(kind)
        conditions = projector.condition(controls.to(projector.linear_condition.weight.dtype))
        segments = stack_segments([len(f) for f in features], conditions.device)
        return condition_op(torch.cat(list(features)), conditions, segments)

    def run_language_model(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Final-norm hidden states [B, L, D] of ``inputs_embeds`` [B, L, D] or [B, L, W].

        ``position_ids`` [3, B, L] int64. ``attention_mask``: bool [B, 1, L, S] as it is (True may
        be seen, S the cache's length), or [B, L] (1 for tokens, 0 for padding), or None for
        plain causal; with a cache None means that the caller vouches for it (one query a row, or
        a block at the start). ``past_key_values`` is updated in place.
        """
        text = self.config.text_config
        embeds, levels = split(inputs_embeds, text.hidden_size)
        if isinstance(past_key_values, ExplicitCache) and not levels:
            direct = self.direct_decoder()
            if direct is not None:
                return direct(embeds, position_ids, attention_mask, past_key_values)
        mask: Any = attention_mask
        ready = past_key_values is not None if mask is None else mask.dim() == 4
        if ready and (mask is not None or embeds.shape[1] > 1):
            mask = ready_mask(mask, embeds, text._attn_implementation)
        if ready and mask is None:
            # Ready masks, of which there are none: transformers would build one from the cache.
            # A model without layer types takes no such thing: it asks the cache, and needs none.
            types = getattr(text, "layer_types", None)
            mask = None if types is None else dict.fromkeys(types)
        deep: dict[str, Any] = {}
        if levels:  # everywhere: what text adds is zero
            deep["visual_pos_masks"] = embeds.new_ones(embeds.shape[:2], dtype=torch.bool)
            deep["deepstack_visual_embeds"] = [level.flatten(0, 1) for level in levels]
        output = self.model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            return_dict=True,
            **deep,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def direct_decoder(self, *, gradients: bool = False) -> DirectDecoder | None:
        """The pass written out, where it computes the same; None where transformers must."""
        if torch.is_grad_enabled() and not gradients:
            return None
        if self._direct[0] is not self.model:
            self._direct = self.model, DirectDecoder.of(self.model)
        direct = self._direct[1]
        return direct if direct is not None and direct.fits() else None

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] float32 of final-norm hidden states [..., D]."""
        head = self.lm_head
        if type(head) is nn.Linear and not torch.is_grad_enabled() and not head._forward_hooks:
            return times(hidden, head.weight, head.bias).float()
        logits: Tensor = head(hidden)
        return logits.float()

    def rope_positions(self, input_ids: Tensor, grids: Sequence[Grid] | Tensor) -> Tensor:
        """M-RoPE positions [3, L] of one unpadded sequence [L]; ``grids`` of its base pictures."""
        rows = grids.tolist() if isinstance(grids, Tensor) else grids
        return rope_positions(
            input_ids,
            [(int(t), int(h), int(w)) for t, h, w in rows],
            self.config.image_token_id,
            merge=self.visual.spatial_merge_size,
        )

    # --- training and scoring -----------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        detection_images: Tensor | None = None,
        seg_images: Tensor | None = None,
        clip_pixel_values: Tensor | None = None,
        clip_images_grid_thw: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        perception_inputs: Mapping[str, Mapping[str, Tensor]] | None = None,
        control: str | None = None,
        passes: str = "two",
        masking: MaskRule | None = None,
        labelled_only: bool = False,
        picture_keys: Mapping[str, Sequence[str]] | None = None,
        memory: FeatureMemory | None = None,
        logits_to_keep: int = 0,
        mm_token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
        **unsupported: Any,
    ) -> VPTOutput | tuple[Any, ...]:
        """Logits and loss of whole sequences (paper section 3.3; FACTS section 4).

        ``input_ids`` [B, L] int64, ``attention_mask`` [B, L], ``position_ids`` [3, B, L] or [B, L]
        (None: by ``config.positions``), ``labels`` [B, L] with -100 where there is none: the loss
        is the mean over the others, shifted by one. Pictures row by row: ``pixel_values`` and
        ``image_grid_thw`` of the base tower, ``clip_pixel_values`` [P, 1176] and
        ``clip_images_grid_thw`` [N, 3], ``detection_images`` [N, 3, 224, 224], ``seg_images``
        [N, 3, 1024, 1024] for re-encoding; ``perception_inputs`` maps any kind's name to the
        inputs of :meth:`run_tower`. ``control`` overrides ``config.control``.
        ``passes`` ``one`` gives the same with about half the work, for training. ``masking`` stands
        in for the config's masks. With ``labelled_only`` the logits are [n, vocab]: those of the
        positions whose next token is a label, row by row; nothing else is computed for the loss.
        ``picture_keys`` (by kind; ``image`` for the base tower's own) name the pictures: equal ones
        are encoded once, and not at all where ``memory`` has them.
        ``mm_token_type_ids`` is what the processor also gives; positions follow from the ids.
        Anything else that is not None is a :class:`UserError`: nothing is ignored.
        """
        ids = _checked(input_ids, unsupported)
        named = (detection_images, seg_images, clip_pixel_values, clip_images_grid_thw)
        looks = _looks(perception_inputs, named)
        inputs = Inputs(ids, attention_mask, position_ids, pixel_values, image_grid_thw, looks,
                        picture_keys or {}, memory)  # fmt: skip
        control = control or self.config.control
        output = run_forward(self, inputs, control=control, passes=passes, masking=masking,
                             scored=labels if labelled_only else None)  # fmt: skip
        if labelled_only:
            return self._labelled(output, labels)
        hidden = output.hidden[:, -logits_to_keep:] if logits_to_keep else output.hidden
        logits = self.compute_logits(hidden)
        loss = None
        if labels is not None:
            scored = logits if not logits_to_keep else self.compute_logits(output.hidden)
            loss = token_mean_loss(scored, labels)
        result = VPTOutput(loss, logits, output.controls, output.features)
        return result if return_dict is not False else result.to_tuple()

    def _labelled(self, output: Forward, labels: Tensor | None) -> VPTOutput:
        if labels is None:
            raise UserError("labelled_only needs labels", where="forward")
        following = labels[:, 1:].to(output.hidden.device)
        here = following != -100
        logits = self.compute_logits(output.hidden[:, :-1][here])  # [n, vocab]
        loss = nn.functional.cross_entropy(logits, following[here])
        return VPTOutput(
            loss=loss, logits=logits, controls=output.controls, features=output.features
        )

    def generate(self, *_: object, **__: object) -> Tensor:
        """Not offered: transformers' loop would neither run calls nor append their results."""
        raise UserError(
            "generate() cannot run perception calls",
            where="VPTForConditionalGeneration.generate",
            fix="use vpt_agent.PerceptionAgent, or vpt_agent.engine for raw sessions",
        )


_NAMED_INPUTS = (("dino", "pixels"), ("sam", "pixels"), ("clip", "pixel_values"),
                 ("clip", "grid_thw"))  # fmt: skip
"""Kind and encoder input of the published arguments, in the order of ``forward``'s."""


def _checked(input_ids: Tensor | None, unsupported: Mapping[str, Any]) -> Tensor:
    given = sorted(k for k, v in unsupported.items() if v is not None and v is not False)
    if given:
        raise UserError(
            "forward cannot use this",
            where="VPTForConditionalGeneration.forward",
            got=", ".join(given),
            fix="videos are not supported; for embeddings or a cache use run_language_model",
        )
    if input_ids is None:
        raise UserError("forward needs input_ids", fix="pass input_ids [B, L]")
    return input_ids


def _looks(
    inputs: Mapping[str, Mapping[str, Tensor]] | None, named: Sequence[Tensor | None]
) -> dict[str, dict[str, Tensor]]:
    """Encoder inputs by kind, the published arguments among them."""
    looks = {kind: dict(values) for kind, values in (inputs or {}).items()}
    for (kind, name), value in zip(_NAMED_INPUTS, named, strict=True):
        if value is not None:
            looks.setdefault(kind, {})[name] = value
    return looks


def token_mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of ``logits`` [B, L, vocab] float32 for the next labels, mean over tokens."""
    flat = logits[:, :-1].reshape(-1, logits.shape[-1])  # [B*(L-1), vocab]
    target = labels[:, 1:].reshape(-1).to(flat.device)
    return nn.functional.cross_entropy(flat, target, ignore_index=-100)


class VPTQwen25VLForConditionalGeneration(VPTForConditionalGeneration):
    """The same model for transformers' Auto classes, which want one class for each config class."""

    config_class = VPTQwen25VLConfig


class VPTQwen3VLForConditionalGeneration(VPTForConditionalGeneration):
    """The same model for transformers' Auto classes, which want one class for each config class."""

    config_class = VPTQwen3VLConfig


register()
for _model in (
    VPTForConditionalGeneration,
    VPTQwen25VLForConditionalGeneration,
    VPTQwen3VLForConditionalGeneration,
):
    AutoModelForImageTextToText.register(_model.config_class, _model, exist_ok=True)
