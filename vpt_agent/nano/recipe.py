"""Train and evaluate the nano model: `python -m vpt_agent.nano.recipe --stage STAGE --out DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

STAGE_NAMES = (
    "pool",
    "tower",
    "read",
    "localise",
    "scenes",
    "baseline-global",
    "baseline-large",
    "eval",
)


def main(arguments: list[str] | None = None) -> None:
    """Run one stage; `pool`, `tower`, `read`, `scenes`, the baselines and `eval`, in this order."""
    parser = argparse.ArgumentParser(prog="vpt_agent.nano.recipe", description=main.__doc__)
    parser.add_argument("--stage", required=True, choices=STAGE_NAMES)
    parser.add_argument("--out", required=True, type=Path, help="work folder with all state")
    parser.add_argument("--minutes", type=float, help="stop early and write a checkpoint")
    parser.add_argument("--samples", type=int, help="length of the stage, or scenes to evaluate")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for the stage")
    parser.add_argument("--shards", type=int, default=120, help="pool size in hundreds of scenes")
    options = parser.parse_args(arguments)
    if options.stage == "pool":
        from vpt_agent.nano.pool import draw_pool

        draw_pool(options.out / "pool", range(options.shards))
    elif options.stage == "eval":
        from vpt_agent.nano.evaluate import evaluate_all

        evaluate_all(options.out, options.samples or 1000)
    else:
        from vpt_agent.nano.train import train_stage

        train_stage(
            options.stage,
            options.out,
            options.minutes,
            options.resume,
            options.samples,
            options.threads,
        )


if __name__ == "__main__":
    main()
