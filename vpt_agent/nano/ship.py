"""Turns trained nano weights into the checkpoint that ships with the package.

``python -m vpt_agent.nano.ship --trained DIR --out DIR [--figures FILE]``. The trained directory is
a plain Qwen2-VL; shipping adds the re-encoding kinds in small (they run, and are said to be
untrained), writes one bf16 safetensors file, and a manifest that a test holds against the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt_agent.errors import CheckpointError
from vpt_agent.nano.views import CROP_LONGEST, GLOBAL_LONGEST, GRID
from vpt_agent.tokens.table import CLIP, DINO, REGION, SAM, PerceptionTable

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration

    from vpt_agent.model import VPTConfig, VPTForConditionalGeneration

DOMAIN = (
    "this small model knows its own generated scenes only (coloured tags with short strings, "
    "see `vpt-agent nano scene`); on photographs and other questions its answer means nothing"
)
MOST_PARAMETERS = 7_000_000
MOST_BYTES = 15_000_000

TABLE = PerceptionTable(
    (
        # The release's prefix of region answers was not trained, so none is expected.
        replace(REGION, grid=GRID, answer_prefix=""),
        CLIP,
        replace(DINO, visual_tokens=16, input_size=56),
        replace(SAM, visual_tokens=16, input_size=256),
    )
)
ENCODERS: dict[str, dict[str, Any]] = {
    "detection": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 14,
        "image_size": 56,
    },
    "seg": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_dim": 128,
        "patch_size": 16,
        "image_size": 256,
        "output_channels": 64,
        "window_size": 8,
        "global_attn_indexes": [1],
    },
}


def image_policy() -> dict[str, Any]:
    """How pictures become patches: as in training (`nano.views`)."""
    return {
        "kind": "fit",
        "longest": GLOBAL_LONGEST,
        "crop_longest": CROP_LONGEST,
        "upscale": True,
        "min_pixels": 28 * 28,
    }


def build_config(trained: Qwen2VLForConditionalGeneration, ids: dict[str, int]) -> VPTConfig:
    """The VPT config around a trained Qwen2-VL's sizes."""
    from vpt_agent.model.configuration import VPTConfig, perception_manifest

    data = trained.config.to_dict()
    perception = perception_manifest(
        TABLE,
        ids,
        images=image_policy(),
        regions="cover",
        trigger="free",
        untrained=("clip", "dino", "sam"),
        domain=DOMAIN,
        tools=contracts_of(TABLE),
    )
    keep = ("text_config", "vision_config", "image_token_id", "video_token_id",
            "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings")  # fmt: skip
    return VPTConfig(
        **{k: data[k] for k in keep}, perception=perception, encoders=ENCODERS, positions="mrope"
    )


def contracts_of(table: PerceptionTable) -> dict[str, str]:
    """The contracts' hashes of the tools that the kinds of ``table`` call, by full name."""
    from vpt_agent.tool import ToolRegistry

    registry = ToolRegistry.from_entry_points()
    wanted = {k.tool for k in table.kinds}
    return {t.full_name: t.contract_hash for t in registry if t.name in wanted}


def convert(trained: Path, *, seed: int = 0) -> tuple[VPTForConditionalGeneration, Any]:
    """The VPT model in bf16, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    from vpt_agent.model import VPTForConditionalGeneration
    from vpt_agent.model.tokenizer import token_ids

    base = Qwen2VLForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    torch.manual_seed(seed)
    model = VPTForConditionalGeneration(build_config(base, token_ids(tokenizer, TABLE)))
    renamed = {}
    for name, value in base.state_dict().items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        renamed[name] = value
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    own = ("clip_projector.", "detection_", "seg_", "lm_head.")
    lost = [k for k in missing if not k.startswith(own)]
    if lost or unexpected:
        raise CheckpointError(
            "the trained weights do not fit", where=trained, got=[*lost, *unexpected][:10]
        )
    model.tie_weights()
    return model.to(torch.bfloat16).eval(), tokenizer


def ship(trained: Path, out: Path, figures: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write the checkpoint to ``out`` and give its manifest. Too large is a CheckpointError."""
    model, tokenizer = convert(trained)
    return write_checkpoint(model, tokenizer, out, table=TABLE, figures=figures)


def write_checkpoint(
    model: VPTForConditionalGeneration,
    tokenizer: Any,
    out: Path,
    *,
    table: PerceptionTable,
    figures: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a model as it is (bf16 or not) to ``out``, with the manifest, which is returned.

    More than :data:`MOST_PARAMETERS`, or than :data:`MOST_BYTES` for all files together, is a
    :class:`CheckpointError`; what lay in ``out`` then stays.
    """
    count = sum(p.numel() for p in model.parameters())
    if count > MOST_PARAMETERS:
        raise CheckpointError(
            "the model is too large to ship", got=count, expected=f"at most {MOST_PARAMETERS}"
        )
    check_target(out)
    # Beside it first: what lies there stays until the new one is whole.
    with tempfile.TemporaryDirectory(dir=_existing(out.parent)) as folder:
        new = Path(folder) / "checkpoint"
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        weights = new / "model.safetensors"
        weights.chmod(0o644)  # written for its owner only, it could not be read once installed
        manifest = {
            "parameters": count,
            "bytes": weights.stat().st_size,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "table": table.to_manifest(),
            "figures": figures or {},
        }
        write_manifest(new, manifest)
        size = sum(path.stat().st_size for path in new.iterdir())
        if size > MOST_BYTES:
            raise CheckpointError(
                "the checkpoint is too large to ship",
                got=size,
                expected=f"at most {MOST_BYTES} bytes in all its files",
            )
        if out.exists():
            shutil.rmtree(out)
        new.replace(out)
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``manifest.json`` of a shipped checkpoint."""
    text = json.dumps(manifest, indent=1) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


def check_target(out: Path) -> None:
    """Raise :class:`CheckpointError` unless ``out`` is new, empty, or a checkpoint that
    :func:`ship` wrote: nothing else is written over."""
    if not out.exists() or (out / "manifest.json").is_file():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise CheckpointError(
            "this is no place for a shipped checkpoint",
            where=out,
            expected="a new or empty directory, or a shipped checkpoint with its manifest.json",
        )


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--figures", type=Path, help="JSON to keep in the manifest")
    args = parser.parse_args(argv)
    figures = json.loads(args.figures.read_text()) if args.figures else None
    manifest = ship(args.trained, args.out, figures)
    del manifest["table"]
    json.dump(manifest, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
