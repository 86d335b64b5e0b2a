"""From a stock checkpoint to what an agent needs of it: model, tokenizer, layout, image policy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model.chat.families import FAMILIES, Family
from vpt_agent.model.chat.plain import StockPlain
from vpt_agent.model.chat.qwen import StockQwen
from vpt_agent.prompt.chat import ChatLayout, Message, Render, Schema
from vpt_agent.tool.habits import Coordinates
from vpt_agent.vision.policy import ImagePolicy

_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_IMAGES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class StockParts:
    """A stock model as an agent needs it."""

    model: StockQwen | StockPlain
    tokenizer: Any
    layout: ChatLayout
    policy: ImagePolicy
    coordinates: Coordinates
    max_positions: int


def family_of(config: Mapping[str, Any], *, where: object) -> Family | None:
    """The family of a config (as JSON), None for one without an adapter of its own. Raises
    :class:`CheckpointError` if it is no model of pictures and text."""
    name = str(config.get("model_type"))
    if not is_stock_type(name):
        raise CheckpointError(
            "this is no model of pictures and text that transformers knows",
            where=where,
            got=f"model_type {name!r}",
            expected=f"{', '.join(FAMILIES)}, or any other of AutoModelForImageTextToText",
        )
    return FAMILIES.get(name)


def is_stock_type(name: object) -> bool:
    """Whether transformers has a model of pictures and text under this ``model_type``."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN,
    )

    return name in FAMILIES or name in KNOWN


def load_stock(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | str,
    max_pixels: int | None = None,
    coordinates: Coordinates | None = None,
    chat_template: str | None = None,
) -> StockParts:
    """Load the checkpoint in ``folder``. ``max_pixels`` bounds the area of every picture (of a
    known family), ``coordinates`` and ``chat_template`` replace the family's and the checkpoint's.
    A checkpoint that lacks weights, or that transformers cannot read, is a
    :class:`CheckpointError`."""
    family = family_of(_json(folder / "config.json"), where=folder)
    net, reader = _load(folder, dtype, processor=family is None)
    net = net.to(device).eval()
    template = chat_template or read_template(folder)
    if family is None:
        if max_pixels is not None:
            raise UserError(
                "max_pixels is for models whose pictures are resized by us",
                where=folder,
                expected=", ".join(FAMILIES),
                fix="change the size in its processor's file",
            )
        return plain_parts(net, reader, coordinates=coordinates, chat_template=template)
    return stock_parts(
        net,
        reader,
        policy=read_policy(folder, family, patch=_patch(net), max_pixels=max_pixels),
        coordinates=coordinates or family.coordinates,
        chat_template=template,
    )


def _load(folder: Path, dtype: torch.dtype | str, *, processor: bool) -> tuple[Any, Any]:
    """The model, and its processor or its tokenizer."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    try:
        net, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            local_files_only=True,
        )
        reader = AutoProcessor if processor else AutoTokenizer
        made = reader.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        line = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            "transformers cannot load this checkpoint", where=folder, got=line[0]
        ) from error
    lost = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise CheckpointError(
            "the checkpoint lacks weights of its model",
            where=folder,
            got=", ".join(map(str, lost[:3])) + more,
            fix="download its files again",
        )
    return net, made


def plain_parts(
    net: Any,
    processor: Any,
    *,
    coordinates: Coordinates | None = None,
    chat_template: str | None = None,
) -> StockParts:
    """The parts of a model without an adapter of its own, checked by computing a small conversation
    both ways. Boxes are 0 to 1000 unless ``coordinates`` says otherwise."""
    if coordinates == "shown":
        raise UserError(
            "how this model's pictures are resized is not known: boxes cannot be in their pixels",
            where=type(net).__name__,
            got=coordinates,
            expected="norm1000, view",
        )
    tokenizer = processor.tokenizer
    number = getattr(net.config, "image_token_id", None)
    image_token = getattr(processor, "image_token", None) or tokenizer.convert_ids_to_tokens(number)
    layout = ChatLayout(
        tokenizer,
        renderer(tokenizer, chat_template or getattr(processor, "chat_template", None)),
        image_token=str(image_token),
        eos=tokenizer.eos_token_id,
    )
    model = StockPlain(net, processor, str(image_token))
    model.check(layout)
    longest = net.config.get_text_config().max_position_embeddings
    # Only for counting beforehand: the processor decides how pictures are cut.
    policy = ImagePolicy(kind="native")
    return StockParts(model, tokenizer, layout, policy, coordinates or "norm1000", longest)


def stock_parts(
    net: Any,
    tokenizer: Any,
    *,
    policy: ImagePolicy | None = None,
    coordinates: Coordinates | None = None,
    chat_template: str | None = None,
) -> StockParts:
    """The parts of a model in memory; the family's image policy and frame where none is given."""
    family = family_of(net.config.to_dict(), where=type(net).__name__)
    if family is None:
        raise UserError(
            "a model without an adapter of its own needs its processor",
            where=type(net).__name__,
            fix="pass its processor instead of its tokenizer",
        )
    policy = policy or _policy(family, {}, patch=_patch(net), max_pixels=None)
    if policy.patch != _patch(net):
        raise UserError(
            "the image policy cuts other patches than the model's tower takes",
            where=type(net).__name__,
            got=f"{policy.patch} pixels a side",
            expected=f"{_patch(net)}",
        )
    image_token = tokenizer.convert_ids_to_tokens(net.config.image_token_id)
    layout = ChatLayout(
        tokenizer,
        renderer(tokenizer, chat_template),
        image_token=image_token,
        eos=tokenizer.eos_token_id,
    )
    return StockParts(
        StockQwen(net),
        tokenizer,
        layout,
        policy,
        coordinates or family.coordinates,
        net.config.get_text_config().max_position_embeddings,
    )


def renderer(tokenizer: Any, chat_template: str | None = None) -> Render:
    """The chat template as a function; None is the tokenizer's own. What it refuses is a
    :class:`UserError`."""
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the checkpoint has no chat template",
            where=type(tokenizer).__name__,
            fix="pass chat_template=, a Jinja text",
        )

    def render(messages: Sequence[Message], tools: Sequence[Schema] | None, opened: bool) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else [dict(tool) for tool in tools],
                chat_template=chat_template,
                add_generation_prompt=opened,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(
                "the chat template refuses this conversation",
                got=f"{type(error).__name__}: {error}",
                fix="use the chat template that belongs to the checkpoint",
            ) from error
        return text

    return render


def read_template(folder: Path) -> str | None:
    """The chat template that lies beside the weights: a processor's, which knows pictures, goes
    before a tokenizer's (None: only that one is there)."""
    for name in _TEMPLATES:
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix == ".jinja":
            return file.read_text(encoding="utf-8")
        found = _json(file).get("chat_template")
        if isinstance(found, str):
            return found
    return None


def read_policy(
    folder: Path, family: Family, *, patch: int, max_pixels: int | None = None
) -> ImagePolicy:
    """How the checkpoint's image processor resizes pictures; the family's numbers without it.
    ``patch`` is the tower's."""
    for name in _IMAGES:
        if (folder / name).is_file():
            data = _json(folder / name)
            inner = data.get("image_processor", data)
            if isinstance(inner, dict) and {"patch_size", "size", "image_mean"} & set(inner):
                return _policy(family, inner, patch=patch, max_pixels=max_pixels)
    return _policy(family, {}, patch=patch, max_pixels=max_pixels)


def _policy(
    family: Family, data: Mapping[str, Any], *, patch: int, max_pixels: int | None
) -> ImagePolicy:
    """``data`` is an image processor's file; what it does not say is the family's."""
    size = data.get("size") or {}
    least = data.get("min_pixels") or size.get("shortest_edge") or family.min_pixels
    most = data.get("max_pixels") or size.get("longest_edge") or family.max_pixels
    if max_pixels is not None:
        most = min(most, max_pixels)
        least = min(least, most)
    return ImagePolicy(
        kind="native",
        min_pixels=least,
        max_pixels=most,
        patch=data.get("patch_size") or patch,
        merge=data.get("merge_size") or 2,
        temporal=data.get("temporal_patch_size") or 2,
        mean=tuple(data.get("image_mean") or family.base.mean),
        std=tuple(data.get("image_std") or family.base.std),
    )


def _patch(net: Any) -> int:
    return int(net.config.vision_config.patch_size)


def _json(file: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError("a file of the checkpoint is no JSON", where=file) from error
    return data
