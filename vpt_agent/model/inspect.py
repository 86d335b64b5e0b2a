"""What a checkpoint is, told without loading its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from vpt_agent.config import shipped_model
from vpt_agent.errors import CheckpointError
from vpt_agent.model.configuration import OUR_MODEL_TYPES, VPTConfig
from vpt_agent.tokens.table import ResolvedKind

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class KindReport:
    """One kind: its tokens' ids, and how it looks again. ``text`` is how a text payload reads:
    the argument and its pattern."""

    name: str
    tool: str
    start: int
    end: int
    control: int | None
    placeholder: int
    grid: int | None
    encoder: str
    visual_tokens: int | None
    input_size: int | None
    trained: bool
    payload: str = ""
    text: str = ""


@dataclass(frozen=True)
class CheckpointReport:
    """What :func:`inspect_checkpoint` found. ``parts`` are parameters by part of the model."""

    path: str
    form: str
    base: str
    kinds: tuple[KindReport, ...]
    controls: int
    parts: Mapping[str, int]
    dtype: str
    images: Mapping[str, Any]
    regions: str
    trigger: str
    positions: str
    training: Mapping[str, Any]
    domain: str
    tools: Mapping[str, str]
    missing: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """All parameters; a tied head counts once."""
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"parameters": self.parameters}

    def to_text(self) -> str:
        """For a terminal."""
        lines = [self.path, f"form: {self.form} on {self.base}, {self.dtype}"]
        lines.append(f"parameters: {self.parameters:,}")
        lines += [f"  {name}: {count:,}" for name, count in self.parts.items()]
        lines.append(f"perception kinds, {self.controls} control token(s) a call:")
        for k in self.kinds:
            ids = f"start {k.start}, end {k.end}"
            if k.control is not None:
                ids += f", control {k.control}, placeholder {k.placeholder}"
            how = f"grid {k.grid} x {k.grid}" if k.grid else k.text or f"encoder {k.encoder}"
            if k.visual_tokens:
                how += f", {k.visual_tokens} visual tokens from {k.input_size} px"
            state = "" if k.trained else "  (untrained: runs, but its result means nothing)"
            lines.append(f"  {k.name}: tool {k.tool}; {how}; {ids}{state}")
        images = ", ".join(f"{k} {v}" for k, v in self.images.items())
        lines.append(f"pictures: {images}; regions: {self.regions}; positions: {self.positions}")
        phrase = "calls its tools only after the trigger phrase (use --tool-choice)"
        free = "chooses freely when to look again"
        lines.append(f"trigger: {self.trigger}: {phrase if self.trigger == 'phrase' else free}")
        if self.training:
            said = ", ".join(f"{k} {v}" for k, v in self.training.items())
            lines.append(f"trained with (does not act now): {said}")
        lines.append(f"good for: {self.domain or 'not said in the checkpoint'}")
        lines += [f"missing: {what}" for what in self.missing]
        return "\n".join(lines)


def inspect_checkpoint(path: str | Path | None = None, **hub: Any) -> CheckpointReport:
    """Read the config, the weights' headers and the list of files. None is the shipped model.

    What cannot be read at all is a :class:`CheckpointError`; what is missing is in the report.
    """
    source = str(shipped_model() if path is None else path)
    raw = _read_config(source, hub)
    config = VPTConfig.from_pretrained(source, **hub)
    if config.perception is None:
        raise CheckpointError(
            "this checkpoint has no perception kinds",
            where=source,
            got=f"model type {raw.get('model_type')!r}",
            fix="load it with encoders=[...] to make a VPT model of it",
        )
    p = config.perception
    sizes, missing = _sizes(source, hub)
    ours = raw.get("model_type") in OUR_MODEL_TYPES
    return CheckpointReport(
        path=source,
        form="vpt_agent" if ours else f"published ({raw.get('model_type')})",
        base=config.base,
        kinds=tuple(_kind(row, p["untrained"]) for row in config.table.rows),
        controls=config.table.controls,
        parts=_parts(sizes),
        dtype=", ".join(sorted({dtype for _, dtype in sizes.values()})) or "no weights",
        images=p["images"],
        regions=p["regions"],
        trigger=p["trigger"],
        positions=config.positions,
        training=config.training or {},
        domain=p.get("domain", ""),
        tools=p.get("tools", {}),
        missing=(*missing, *_missing_parts(config, sizes)),
    )


def _kind(row: ResolvedKind, untrained: Iterable[str]) -> KindReport:
    kind = row.kind
    return KindReport(
        name=row.name,
        tool=kind.tool,
        start=row.start,
        end=row.end,
        control=row.control,
        placeholder=row.placeholder,
        grid=kind.grid if kind.payload == "grid" else None,
        encoder=kind.encoder,
        visual_tokens=kind.visual_tokens,
        input_size=kind.input_size,
        trained=row.name not in set(untrained),
        payload=kind.payload,
        text=f"text {kind.argument}: {kind.pattern}" if kind.payload == "text" else "",
    )


def _find(source: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    """A file of the checkpoint, local or in the hub's cache."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **hub,
    )
    return Path(found) if found else None


def _read_config(source: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    try:
        path = _find(source, "config.json", hub)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "there is no such checkpoint", where=source, got=str(error).splitlines()[0]
        ) from error
    if path is None:
        raise CheckpointError(
            "there is no checkpoint here",
            where=source,
            expected="a folder with a config.json, or the name of a repository on the hub",
            fix="check the path; offline, only what was downloaded before can be read",
        )
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError("config.json is no JSON", where=path, got=error) from error
    return data


def _sizes(source: str, hub: Mapping[str, Any]) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """Elements and dtype by key, from headers alone; and what is missing."""
    missing = []
    for name in WEIGHT_FILES:
        path = _find(source, name, hub)
        if path is None:
            continue
        files = [path]
        if name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            found = {shard: _find(source, shard, hub) for shard in shards}
            missing += [f"the shard {shard}" for shard, at in found.items() if at is None]
            files = [at for at in found.values() if at is not None]
        sizes: dict[str, tuple[int, str]] = {}
        for file in files:
            sizes |= _header(file)
        return sizes, missing
    return {}, [*missing, f"weights (looked for {', '.join(WEIGHT_FILES)})"]


def _header(path: Path) -> dict[str, tuple[int, str]]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            found = {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                piece = file.get_slice(key)
                count = 1
                for side in piece.get_shape():
                    count *= side
                found[key] = (count, str(piece.get_dtype()))
            return found
    tensors = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    return {k: (v.numel(), str(v.dtype).removeprefix("torch.")) for k, v in tensors.items()}


def _part(key: str) -> str:
    """Which part of the model a key of any layout belongs to."""
    bare = (
        key.removeprefix("model.") if key.startswith(("model.visual.", "model.language")) else key
    )
    head = bare.split(".")[0]
    if head == "visual":
        return "vision tower"
    if head in ("model", "language_model", "lm_head"):
        return "output head" if head == "lm_head" else "language model"
    return head.replace("depth_projector", "clip_projector")


def _parts(sizes: Mapping[str, tuple[int, str]]) -> dict[str, int]:
    parts: dict[str, int] = {}
    for key, (count, _) in sizes.items():
        parts[_part(key)] = parts.get(_part(key), 0) + count
    return parts


def _missing_parts(config: VPTConfig, sizes: Mapping[str, tuple[int, str]]) -> list[str]:
    """Parts of kinds that the weights do not hold."""
    have = {_part(key) for key in sizes}
    wanted = []
    for row in config.table.rows:
        if row.kind.projector:
            wanted.append(row.kind.projector)
        if row.kind.encoder not in ("base", "none"):
            wanted.append(f"{row.kind.config_prefix}_model")
    return [f"weights of {part}" for part in wanted if sizes and part not in have]
