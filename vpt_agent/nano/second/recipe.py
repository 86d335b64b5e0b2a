"""The second version's recipe: ``python -m vpt_agent.nano.second.recipe --stage STAGE --out DIR``.

Stages in this order: ``pool`` (draw scenes), ``see`` (dense labels for all encoders), ``talk``
(conversations of every kind, projectors and control states included), ``export`` (a checkpoint of
the library's, in ``DIR/checkpoint``); then ``vpt-agent train configs/nano-second.yaml``. What each
is for, and what was measured, stands in ``docs/nano-domain.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(prog="vpt_agent.nano.second.recipe", description=__doc__)
    parser.add_argument("--stage", required=True, choices=("pool", "see", "talk", "export"))
    parser.add_argument("--out", required=True, type=Path, help="work folder with all state")
    parser.add_argument("--minutes", type=float, help="stop early and write a checkpoint")
    parser.add_argument("--steps", type=int, help="length of the stage's schedule")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for the stage")
    parser.add_argument("--shards", type=int, default=100, help="pool size in forties of scenes")
    parser.add_argument("--size", type=int, default=16, help="rows or pictures of a batch")
    parser.add_argument("--plan", help="kinds of batches in turn, with commas; for trials")
    parser.add_argument("--rate", type=float, help="peak learning rate of the stage")
    parser.add_argument("--begin", type=Path, help="weights file to begin the stage with")
    parser.add_argument("--more", type=Path, help="a pool of the first version's, to read from")
    parser.add_argument("--first", type=Path, help="first version's checkpoint, for see")
    parser.add_argument("--only", choices=("clip", "dino", "sam"), help="one encoder, for see")
    options = parser.parse_args(arguments)
    if options.stage == "pool":
        from vpt_agent.nano.second.pool import draw_domain_pool

        draw_domain_pool(options.out / "pool", range(options.shards))
        return
    from vpt_agent.nano.second.train import export_checkpoint, train_second

    if options.stage == "export":
        export_checkpoint(options.out, "talk", options.out / "checkpoint")
        return
    train_second(
        options.stage,
        options.out,
        minutes=options.minutes,
        steps=options.steps,
        resume=options.resume,
        threads=options.threads,
        size=options.size,
        plan=options.plan.split(",") if options.plan else None,
        first=options.first,
        only=options.only,
        rate=options.rate,
        begin=options.begin,
        more=options.more,
    )


if __name__ == "__main__":
    main()
