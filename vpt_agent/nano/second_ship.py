"""Turns the second version's trained checkpoint into the one that ships with the package.

``python -m vpt_agent.nano.second_ship --trained CHECKPOINT --out DIR [--figures FILE]`` takes what
``vpt-agent train configs/nano-second.yaml`` or the recipe's stage ``export`` left, and writes it in
bf16 with a manifest that a test holds against the table. Figures are measured on what ships, so
they come afterwards: ``--stamp DIR --figures FILE`` puts them into the manifest of a checkpoint
that is there, and refuses those of other weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.nano.domain.table import TABLE
from vpt_agent.nano.ship import contracts_of, image_policy, write_checkpoint, write_manifest

if TYPE_CHECKING:
    from vpt_agent.model import VPTForConditionalGeneration

DOMAIN = (
    "this small model knows its own generated scenes only (coloured tags with short strings and "
    "hatched marks, see `vpt-agent nano scenes`); on photographs and other questions its answer "
    "means nothing"
)
_CHOICES = ("calls_needed", "needed_called", "needless_avoided")
_KEPT = ("value", "low", "high", "n")


def convert_second(
    trained: Path, *, untrained: Collection[str] = ()
) -> tuple[VPTForConditionalGeneration, Any]:
    """The trained checkpoint's model in bf16, with the manifest that ships, and its tokenizer.

    A checkpoint of another table, image policy or region policy than
    :mod:`vpt_agent.nano.domain.table` says is a :class:`CheckpointError`. ``untrained`` names kinds
    that are to be said to be untrained.
    """
    import torch

    from vpt_agent.model import VPTForConditionalGeneration
    from vpt_agent.model.configuration import perception_manifest
    from vpt_agent.model.tokenizer import load_tokenizer, token_ids

    unknown = sorted(set(untrained) - {k.name for k in TABLE.kinds})
    if unknown:
        raise UserError(
            "there is no such kind",
            where="untrained",
            got=", ".join(unknown),
            expected=", ".join(k.name for k in TABLE.kinds),
        )
    model = VPTForConditionalGeneration.from_pretrained(trained, dtype=torch.float32)
    tokenizer, added = load_tokenizer(str(trained), TABLE)
    perception = perception_manifest(
        TABLE,
        token_ids(tokenizer, TABLE),
        images=image_policy(),
        regions="cover",
        trigger="free",
        untrained=sorted(untrained),
        domain=DOMAIN,
        tools=contracts_of(TABLE),
    )
    _check(model.config.perception or {}, perception, added, trained)
    model.config.perception = perception
    return model.to(torch.bfloat16).eval(), tokenizer


def _check(
    had: Mapping[str, Any], wanted: Mapping[str, Any], added: Collection[str], trained: Path
) -> None:
    """Raise unless the checkpoint was trained for what its manifest will say."""
    other = [key for key in ("table", "ids", "images", "regions") if had.get(key) != wanted[key]]
    if other or added:
        raise CheckpointError(
            "this checkpoint is not of the second version",
            where=trained,
            got=f"other {', '.join(other) or 'tokens'} than those of the domain",
            fix="ship what configs/nano-second.yaml trained, or the recipe's stage export",
        )
    if had.get("untrained"):
        raise CheckpointError(
            "kinds of this checkpoint were never trained",
            where=trained,
            got=", ".join(had["untrained"]),
            fix="train them, or a figure would stand for random weights",
        )


def ship_second(
    trained: Path,
    out: Path,
    figures: Mapping[str, Any] | None = None,
    *,
    untrained: Collection[str] = (),
) -> dict[str, Any]:
    """Write the checkpoint to ``out`` and give its manifest. See :func:`convert_second` and
    :func:`vpt_agent.nano.ship.write_checkpoint` for what is refused."""
    model, tokenizer = convert_second(trained, untrained=untrained)
    kept = short_figures(figures) if figures else None
    return write_checkpoint(model, tokenizer, out, table=TABLE, figures=kept)


def stamp(folder: Path, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Put the figures of ``benchmarks/perception.py`` into a shipped checkpoint's manifest.

    They must have been measured with these weights, else a :class:`CheckpointError`.
    """
    import torch

    from vpt_agent.evaluation.store import weights_hash
    from vpt_agent.model import VPTForConditionalGeneration

    path = folder / "manifest.json"
    if not path.is_file():
        raise CheckpointError("this is no shipped checkpoint", where=folder, expected=path.name)
    # As the agent loads it on a CPU: the hash is over what computed the figures.
    model = VPTForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    found = weights_hash(model)
    kept = short_figures(figures)
    if found not in kept["weights_sha256"]:
        raise CheckpointError(
            "these figures are of other weights",
            where=folder,
            got=", ".join(kept["weights_sha256"]) or "none",
            expected=found,
            fix="measure this checkpoint: benchmarks/perception.py --model DIR",
        )
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    manifest["figures"] = kept
    write_manifest(folder, manifest)
    return manifest


def short_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``benchmarks/perception.py``'s figures what a manifest keeps: exact match by split,
    setting and type of question with its interval, free choice against need, whose weights."""
    if figures.get("benchmark") != "perception":
        raise UserError(
            "these are no figures of benchmarks/perception.py",
            got=f"benchmark = {figures.get('benchmark')!r}",
        )
    splits = {}
    hashes: set[str] = set()
    for split, found in figures["splits"].items():
        hashes |= {m["weights_sha256"] for m in found["models"].values() if m["weights_sha256"]}
        splits[split] = {
            "exact": {
                name: {
                    "all": _short(result["exact"]),
                    **{kind: _short(f) for kind, f in result["by_type"].items()},
                }
                for name, result in found["results"].items()
                if result["n"]
            },
            "choices": {
                name: {key: _short(told[key]) for key in _CHOICES}
                for name, told in found["choices"].items()
            },
        }
    return {"weights_sha256": sorted(hashes), **splits}


def _short(figure: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: figure[key] for key in _KEPT if key in figure}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in kept.items()}


def main(argv: list[str] | None = None) -> int:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="vpt_agent.nano.second_ship", description=__doc__)
    parser.add_argument("--trained", type=Path, help="a checkpoint of the second version")
    parser.add_argument("--out", type=Path, help="where the shipped one is written")
    parser.add_argument("--stamp", type=Path, help="a shipped one that --figures are put into")
    parser.add_argument("--figures", type=Path, help="JSON of benchmarks/perception.py")
    parser.add_argument("--untrained", nargs="*", default=[], help="kinds that are not to be used")
    args = parser.parse_args(argv)
    figures = json.loads(args.figures.read_text(encoding="utf-8")) if args.figures else None
    if args.stamp and figures:
        manifest = stamp(args.stamp, figures)
    elif args.trained and args.out and not args.stamp:
        manifest = ship_second(args.trained, args.out, figures, untrained=args.untrained)
    else:
        parser.error("give --trained with --out, or --stamp with --figures")
    json.dump({k: v for k, v in manifest.items() if k != "table"}, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
