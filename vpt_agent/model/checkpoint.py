"""Checkpoint directories: found, checked, and loaded without losing or inventing a weight.

Three kinds are read: published VPT checkpoints as they lie on the hub, those that
``save_pretrained`` writes (the same key names, safetensors), and plain checkpoints of the base
models (Qwen2-VL, Qwen2.5-VL, Qwen3-VL), which become fresh VPT models. transformers loads the
weights; here stands what it would let pass.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open

from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model.bases import BASES
from vpt_agent.model.configuration import OUR_MODEL_TYPES, VPTConfig
from vpt_agent.model.fresh import FromScratch, fresh_config, grow_embeddings, initialise_fresh
from vpt_agent.model.published import PUBLISHED_MODEL_TYPES

if TYPE_CHECKING:
    from vpt_agent.model.modeling import VPTForConditionalGeneration

HUB_OPTIONS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
"""Options of ``from_pretrained`` that say how to get files from the hub."""

PLAIN_MODEL_TYPES = tuple(BASES)
VPT_MODEL_TYPES = (*OUR_MODEL_TYPES, *PUBLISHED_MODEL_TYPES)

KEY_RENAMES: Mapping[str, str] = {
    # The CLIP checkpoint's projector has the name of an earlier stage of the release.
    r"^depth_projector\.": "clip_projector.",
    # transformers' own layout: Qwen3-VL has it on the hub, older ones where they were saved so.
    r"^model\.visual\.": "visual.",
    r"^model\.language_model\.": "model.",
}
"""Key patterns of checkpoints and what they are called here."""

_WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_PATTERNS = ["*.json", "*.txt", "*.jinja", "model*.safetensors", "pytorch_model*.bin"]


def find_checkpoint(name: str | Path, *, subfolder: str = "", **hub: Any) -> Path:
    """The directory of ``name``: itself, or the hub's snapshot of it (downloaded if need be)."""
    folder = Path(name)
    if not folder.is_dir():
        folder = _from_hub(str(name), hub)
    folder /= subfolder
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "this is not a checkpoint directory",
            where=folder,
            got="no config.json",
            expected="config.json, weights and a tokenizer",
        )
    return folder


def _from_hub(name: str, hub: Mapping[str, Any]) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            "no such checkpoint directory",
            where=name,
            fix="give an existing directory, or a hub name such as rp-yu/Qwen2-VL-2b-VPT-CLIP",
        )
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS, **hub))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CheckpointError(
            "the checkpoint is neither a directory nor to be had from the hub",
            where=name,
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            fix="check the name and the network, or give a directory with the files",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of ``folder``; broken JSON and unknown model types are errors."""
    try:
        data: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError("config.json is no JSON", where=folder, got=str(error)) from error
    known = (*VPT_MODEL_TYPES, *PLAIN_MODEL_TYPES)
    if data.get("model_type") not in known:
        raise CheckpointError(
            "this checkpoint is of a kind that cannot become a VPT model",
            where=folder,
            got=f"model_type {data.get('model_type')!r}",
            expected=", ".join(known),
        )
    return data


def weight_files(folder: Path) -> list[Path]:
    """The weight files of ``folder``, each looked at: all there, none cut short."""
    first = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise CheckpointError(
            "the checkpoint has no weights", where=folder, expected=f"one of {', '.join(_WEIGHTS)}"
        )
    if first.suffix == ".json":
        names = sorted(set(_index(first).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                "the checkpoint is incomplete: shards are missing",
                where=folder,
                got=f"no {_some(missing)}",
                expected=f"{len(names)} files, by {first.name}",
                fix="download the missing files",
            )
        files = [folder / name for name in names]
    else:
        files = [first]
    for file in files:
        _check_file(file)
    return files


def _index(file: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError("the index of the shards is broken", where=file) from error
    return found


def _check_file(file: Path) -> None:
    cut = CheckpointError(
        "a weight file is broken or was not written to its end",
        where=file,
        got=f"{file.stat().st_size} bytes",
        fix="download or save it again",
    )
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return
        except SafetensorError as error:
            raise cut from error
    with file.open("rb") as stream:
        magic = stream.read(2)
    # An archive that is cut short has no end record; what does not begin as one is an old pickle.
    if not magic or (magic == b"PK" and not zipfile.is_zipfile(file)):
        raise cut


def stored_keys(files: Iterable[Path]) -> list[str]:
    """Names of the tensors in ``files``, from the headers where there are any."""
    keys: list[str] = []
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stream:
                keys += stream.keys()
        else:
            import torch

            mapped = zipfile.is_zipfile(file)  # the old format cannot be mapped
            with _readable(file):
                keys += torch.load(file, map_location="meta", weights_only=True, mmap=mapped)
    return keys


class _readable:  # noqa: N801 - used as a function
    """Turns what reading ``where`` raises into a :class:`CheckpointError`."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | EOFError | UnpicklingError | SafetensorError):
            raise CheckpointError(
                "the checkpoint's weights cannot be read",
                where=self.where,
                got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
                fix="download or save it again",
            ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' table of missing keys: what it says is checked, and said, here."""

    def wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def load_model(
    load: Callable[..., Any],
    name: str | Path,
    *,
    config: VPTConfig | None,
    scratch: FromScratch,
    for_training: bool,
    **kwargs: Any,
) -> tuple[VPTForConditionalGeneration, Mapping[str, Any]]:
    """Load ``name`` with transformers' ``load``, and refuse what it would let pass.

    Returns the model and transformers' report on the keys.

    ``scratch`` makes a fresh VPT model of a plain Qwen-VL. Training masks act only with
    ``for_training``. Missing, unexpected and misshapen tensors are a :class:`CheckpointError`.
    """
    hub = {k: kwargs.pop(k) for k in HUB_OPTIONS if k in kwargs}
    folder = find_checkpoint(name, subfolder=kwargs.pop("subfolder", ""), **hub)
    fresh = None
    if read_config(folder)["model_type"] in PLAIN_MODEL_TYPES:
        _check_plain(folder, config, scratch)
        config, fresh = fresh_config(folder, scratch)
    else:
        given = config or VPTConfig.from_pretrained(folder, name_or_path=str(name))
        config = copy.deepcopy(given)
        _check_kinds(config, scratch, folder)
    if for_training:
        config.wake_training_masks()
    else:
        config.rest_training_masks()
    keys = stored_keys(weight_files(folder))
    renames = {old: new for old, new in KEY_RENAMES.items() if any(re.match(old, k) for k in keys)}
    with _readable(folder), _quiet():
        model, info = load(
            folder,
            config=config,
            key_mapping=renames or None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    # Renames are for reading: what is saved has the published names.
    vars(model).pop("_weight_conversions", None)
    _check_loaded(folder, info, allowed=() if fresh is None else fresh.parts)
    if fresh is not None:
        initialise_fresh(model, fresh, scratch.weights or {})
    else:
        _check_rows(model, folder)
    model.config.name_or_path = str(name)
    return model, info


def _check_plain(folder: Path, config: VPTConfig | None, scratch: FromScratch) -> None:
    if config is not None:
        raise UserError(
            "a plain Qwen-VL gets its VPT config here, and takes none",
            where=folder,
            fix="pass encoders, controls and grid instead of config",
        )
    if scratch.encoders is None:
        raise CheckpointError(
            "this is a plain Qwen-VL: it has no perception kinds",
            where=folder,
            fix='pass encoders=["clip"] (any of clip, dino, sam, or none of them: []) to make a '
            "fresh VPT model of it, and train that",
        )


def _check_kinds(config: VPTConfig, scratch: FromScratch, folder: Path) -> None:
    """What is said about the kinds of a VPT checkpoint must be so."""
    table = config.table
    grids = [row.kind.grid for row in table.rows if row.kind.payload == "grid"]
    has = {
        "encoders": sorted(row.name for row in table.rows if row.kind.payload == "control"),
        "controls": table.controls,
        "grid": grids[0] if grids else None,
        "encoder_weights": "its own",
    }
    said = {
        "encoders": None if scratch.encoders is None else sorted(scratch.encoders),
        "controls": scratch.controls,
        "grid": scratch.grid,
        "encoder_weights": scratch.weights,
    }
    for name, value in said.items():
        if value is not None and value != has[name]:
            raise UserError(
                "this VPT checkpoint is another one than asked for",
                where=folder,
                got=f"{name}={value!r}",
                expected=f"{name}={has[name]!r}, or nothing said about it",
            )


def _check_loaded(folder: Path, info: Mapping[str, Any], *, allowed: tuple[str, ...]) -> None:
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(allowed or ("\0",)))
    for what, found in (
        ("are missing from the checkpoint", missing),
        ("of the checkpoint have no place in the model", sorted(info["unexpected_keys"])),
        (
            "have another shape than the config says",
            sorted(
                f"{k} {list(stored)} (config: {list(wanted)})"
                for k, stored, wanted in info["mismatched_keys"]
            ),
        ),
    ):
        if found:
            raise CheckpointError(
                f"{len(found)} tensors {what}",
                where=folder,
                got=_some(found),
                fix="the weights and config.json must come from the same checkpoint",
            )


def _check_rows(model: VPTForConditionalGeneration, folder: Path) -> None:
    """Every perception token has an embedding row; tokens that were just added may need new ones.

    A published alignment checkpoint knows no calls yet: its tokenizer grows on loading.
    """
    perception = model.config.perception or {"ids": {}, "untrained": []}
    rows = model.config.text_config.vocab_size
    beyond = sorted(token for token, at in perception["ids"].items() if at >= rows)
    if beyond and not perception["untrained"]:
        raise CheckpointError(
            "perception tokens have ids beyond the embedding rows",
            where=folder,
            got=_some(beyond),
            expected=f"ids below {rows}",
            fix="the tokenizer and the weights must come from the same checkpoint",
        )
    if beyond:
        grow_embeddings(model, max(perception["ids"].values()) + 1)


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", and {len(names) - 10} more" if len(names) > 10 else "")
