"""VPTProcessor: text and pictures to what ``VPTForConditionalGeneration.forward`` takes.

It needs no torchvision. Pictures go through the checkpoint's own image policy
(`vpt_agent.vision`); the image processor is kept for its numbers and its file, as other libraries
expect one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from vpt_agent.errors import UserError
from vpt_agent.model.configuration import CONFIGS, VPTConfig
from vpt_agent.model.tokenizer import load_tokenizer
from vpt_agent.tokens.table import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    IMAGE_TAG,
    PUBLISHED,
    VISION_END,
    VISION_START,
    PerceptionKind,
    PerceptionTable,
)
from vpt_agent.types import View
from vpt_agent.vision.encoders import encoder_pixels
from vpt_agent.vision.images import Source, load_views
from vpt_agent.vision.patches import look
from vpt_agent.vision.policy import ImagePolicy

Pictures = Source | View | Sequence[Any] | None
HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download", "subfolder")


class VPTProcessor(ProcessorMixin):
    """Text with picture tags to ids, pictures to patches and encoder inputs.

    ``perception`` is the manifest of the model's config: table and image policy. It is read from
    the config on loading and not written a second time.
    """

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.perception: Mapping[str, Any] = {}

    # --- making and loading ---------------------------------------------------------------

    @classmethod
    def for_model(
        cls,
        config: VPTConfig,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil | None = None,
    ) -> VPTProcessor:
        """The processor of a model in memory. Without an image processor, the published values."""
        perception = config.perception or {}
        policy = ImagePolicy.from_manifest(perception.get("images", {}))
        made = image_processor or Qwen2VLImageProcessorPil(
            min_pixels=policy.min_pixels,
            max_pixels=policy.max_pixels,
            image_mean=list(policy.mean),
            image_std=list(policy.std),
            patch_size=policy.patch,
            merge_size=policy.merge,
            temporal_patch_size=policy.temporal,
        )
        table = config.table.table
        # Only a template that came with a processor of this class is of the VPT layout.
        own = tokenizer.init_kwargs.get("processor_class") == cls.__name__
        template = (tokenizer.chat_template if own else None) or chat_template(table)
        processor = cls(made, tokenizer, chat_template=template)
        processor.perception = perception
        return processor

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        config: VPTConfig | None = None,
        **kwargs: Any,
    ) -> VPTProcessor:
        """Read tokenizer, image processor (published values if the file is missing) and config.

        ``config`` is that of a loaded model, where it is at hand; it may have kinds (and so
        tokens) that the directory has not.
        """
        hub = {k: v for k, v in kwargs.items() if k in HUB_OPTIONS and v is not None}
        source = str(pretrained_model_name_or_path)
        if config is None:
            config = VPTConfig.from_pretrained(source, **hub)
        table = config.table.table if config.perception else None
        tokenizer, _ = load_tokenizer(source, table, **hub)
        try:
            found = Qwen2VLImageProcessorPil.from_pretrained(source, **hub)
        except OSError:  # no such file: the published checkpoints come without
            found = None
        return cls.for_model(config, tokenizer, found)

    # --- calling --------------------------------------------------------------------------

    @property
    def policy(self) -> ImagePolicy:
        """How pictures are resized."""
        return ImagePolicy.from_manifest(self.perception["images"])

    @property
    def table(self) -> PerceptionTable:
        """The kinds."""
        return PerceptionTable.from_manifest(self.perception["table"])

    def __call__(
        self,
        images: Pictures = None,
        text: str | Sequence[str] | None = None,
        *,
        again: Mapping[str, Pictures] | None = None,
        padding: bool | str = False,
        padding_side: str | None = None,
        return_tensors: str = "pt",
        add_special_tokens: bool = False,
        **_: Any,
    ) -> BatchFeature:
        """Inputs of the model's ``forward``.

        ``text``: one string or a batch, in which each ``<|image_pad|>`` (or ``<image>``) stands for
        one picture and a kind's placeholder or tag for one re-encoded picture; they are widened to
        the number of visual tokens. ``images``: all pictures in order, nested by row or flat;
        a :class:`View` that is a crop is resized as one. ``again``: pictures by kind.
        Gives ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` [B, L], ``pixel_values``
        [P, 3 * temporal * patch^2], ``image_grid_thw`` [N, 3] and the re-encoding kinds' inputs.
        Counts that do not match are a :class:`UserError`.
        """
        if return_tensors != "pt":
            raise UserError("only torch tensors are made", got=return_tensors, expected="pt")
        if text is None:
            raise UserError("a processor call needs text", where="VPTProcessor")
        data: dict[str, Any] = {}
        counts: dict[str, Iterator[int]] = {}
        shown = _views(images)
        counts[IMAGE_PAD] = self._base(shown, "pixel_values", "image_grid_thw", data)
        for name, pictures in (again or {}).items():
            kind = self.table[name]
            counts[kind.placeholder] = self._again(kind, _views(pictures), data)
        rows = [text] if isinstance(text, str) else list(text)
        widened = [self._widen(row, counts) for row in rows]
        for pad, left in counts.items():
            if next(left, None) is not None:
                raise UserError("more pictures than places for them", where=pad)
        encoded = self.tokenizer(
            widened,
            padding=padding,
            padding_side=padding_side,
            return_tensors="pt" if padding or len(widened) == 1 else None,
            add_special_tokens=add_special_tokens,
        )
        data |= {k: encoded[k] for k in ("input_ids", "attention_mask")}
        if isinstance(data["input_ids"], Tensor):
            pad_id = self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
            data["mm_token_type_ids"] = (data["input_ids"] == pad_id).long()
        return BatchFeature(data)

    def _base(
        self,
        views: list[View],
        pixels: str,
        grids: str,
        data: dict[str, Any],
        *,
        size: int | None = None,
    ) -> Iterator[int]:
        if not views:
            return iter(())
        patches = look(views, self.policy.at_input(size))
        data[pixels], data[grids] = patches.pixel_values, patches.grid_thw
        return iter(patches.visual_tokens)

    def _again(
        self, kind: PerceptionKind, views: list[View], data: dict[str, Any]
    ) -> Iterator[int]:
        prefix = kind.config_prefix
        pixels, grids, pictures = (
            f"{prefix}_{name}" for name in ("pixel_values", "images_grid_thw", "images")
        )
        if kind.name not in PUBLISHED:  # forward has no arguments of their own for these
            data = data.setdefault("perception_inputs", {}).setdefault(kind.name, {})
            pixels, grids, pictures = "pixel_values", "grid_thw", "pixels"
        if kind.encoder == "base":
            return self._base(views, pixels, grids, data, size=kind.input_size)
        if views:
            data[pictures] = torch.stack([encoder_pixels(kind, v, self.policy) for v in views])
        return iter([kind.visual_tokens or 0] * len(views))

    def _widen(self, text: str, counts: Mapping[str, Iterator[int]]) -> str:
        """Each tag or placeholder becomes as many placeholders as it has visual tokens."""
        pads = {IMAGE_TAG: IMAGE_PAD} | {k.tag: k.placeholder for k in self.table.kinds}
        for tag, pad in pads.items():
            text = text.replace(tag, f"{VISION_START}{pad}{VISION_END}")
        for pad in dict.fromkeys(pads.values()):
            pieces = text.split(pad)
            out = pieces[0]
            for piece in pieces[1:]:
                count = next(counts.get(pad, iter(())), None)
                if count is None:
                    raise UserError(
                        "the text has a place for a picture that was not given",
                        where=pad,
                        fix="pass one picture for each place",
                    )
                out += pad * count + piece
            text = out
        return text

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call gives."""
        names = ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"]
        return [*names, "image_grid_thw"]


def _views(pictures: Pictures) -> list[View]:
    """Pictures, flat or nested by row, as views."""
    if pictures is None:
        return []
    if isinstance(pictures, View):
        return [pictures]
    if isinstance(pictures, list | tuple):
        return [v for p in pictures for v in _views(p)]
    return list(load_views(pictures))


def chat_template(table: PerceptionTable) -> str:
    """The published conversation layout as a chat template.

    Content may be a string or parts: ``text``, ``image``, and one type for each re-encoding kind
    (its tag without brackets, such as ``clip_image``).
    """
    slots = {"image": IMAGE_PAD}
    slots |= {k.tag.strip("<>"): k.placeholder for k in table.kinds if k.tag != IMAGE_TAG}
    branches = "".join(
        f"{{%- elif part['type'] == '{name}' -%}}{VISION_START}{pad}{VISION_END}"
        for name, pad in slots.items()
    )
    return (
        "{%- if messages[0]['role'] != 'system' -%}"
        f"{IM_START}system\nYou are a helpful assistant.{IM_END}{{{{ '\\n' }}}}"
        "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}"
        f"{IM_START}{{{{ message['role'] }}}}{{{{ '\\n' }}}}"
        "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{{ part['text'] }}"
        f"{branches}"
        "{%- endif -%}{%- endfor -%}{%- endif -%}"
        f"{IM_END}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '\\n' }}"
        f"{IM_START}assistant{{{{ '\\n' }}}}"
        "{%- endif -%}"
    )


def register() -> None:
    """Make AutoProcessor know the processor."""
    for config in CONFIGS.values():
        AutoProcessor.register(config, VPTProcessor, exist_ok=True)
