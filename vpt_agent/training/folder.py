"""The folder of a run: what may be begun there, what is gone on with, what is written in one go.

A checkpoint is ``checkpoint-STEP``; ``whole`` (of the kind of run) says whether all of one is
there. What was half written when a run was killed counts for nothing and stands in nobody's way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from vpt_agent.errors import UserError
from vpt_agent.training.configfile import RunConfig, read_as, require_same
from vpt_agent.training.logs import METRICS, write_whole

FINAL = "final"
"""The finished checkpoint's folder in a run's ``out``."""

CONFIG = "config.yaml"
"""The config that a run was begun with, in its ``out``."""

Whole = Callable[[Path], bool]
_PREFIX, _OLD = "checkpoint-", ".old"


def is_main() -> bool:
    """Whether this process writes: the first of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which ``checkpoint`` was written."""
    return int(checkpoint.name.removeprefix(_PREFIX))


def checkpoints(out: Path, whole: Whole) -> list[Path]:
    """The whole checkpoints in ``out``, the newest last."""
    return [path for path in _numbered(out) if whole(path)]


def _numbered(out: Path) -> list[Path]:
    # A copy that somebody made by hand, and a draft, are no checkpoints of this run.
    named = [p for p in out.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(named, key=step_of)


def open_run(
    config: RunConfig,
    *,
    resume: bool,
    whole: Whole,
    free: Collection[str],
    say: Callable[[str], None] = lambda _: None,
) -> Path | None:
    """Check and make ``config.out``; the checkpoint to go on from, if any.

    A finished checkpoint, or a run begun and not resumed, is never overwritten. ``resume`` needs
    the config that the run was begun with, but for the keys ``free``; where no checkpoint is whole
    it begins again. Each refusal is a :class:`UserError`.
    """
    out = config.out
    if (out / FINAL).exists():
        raise UserError(
            "a finished checkpoint is never overwritten",
            where=out / FINAL,
            fix="choose another out (--set out=DIR), or move the folder away",
        )
    found, begun = checkpoints(out, whole), (out / CONFIG).is_file()
    if resume:
        if not begun:
            raise UserError(
                "there is nothing to resume: no run was begun here",
                where=out,
                expected=f"{CONFIG}, which a run writes first",
                fix="start without --resume",
            )
        require_same(read_as(type(config), out / CONFIG), config, free=free)
        if found:
            return found[-1]
        say("no checkpoint is complete: the run begins again")
    elif found or (_numbered(out) and not begun):
        raise UserError(
            "this folder holds a run that was begun",
            where=out,
            fix="go on with --resume, or choose another out",
        )
    if is_main():
        _begin(config)
    return None


def _begin(config: RunConfig) -> None:
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    for half in _numbered(out):  # of a run that was killed before its first checkpoint was whole
        shutil.rmtree(half)
    (out / METRICS).unlink(missing_ok=True)
    write_whole(out / CONFIG, config.to_yaml())


def prune(out: Path, whole: Whole, *, keep: int | None, spare: Collection[Path] = ()) -> None:
    """Remove all whole checkpoints but the newest ``keep`` (None: all stay) and those to ``spare``.

    Half ones that are older than those kept go, too.
    """
    kept = checkpoints(out, whole)[-keep:] if keep else []
    if not kept:
        return
    spared = {path.resolve() for path in (*kept, *spare)}
    for old in _numbered(out):
        if step_of(old) < step_of(kept[-1]) and old.resolve() not in spared:
            # Its name goes first: a kill in between leaves no checkpoint that only looks whole.
            old.replace(old.with_name(f"{old.name}{_OLD}"))
    for old in out.glob(f"{_PREFIX}*{_OLD}"):
        shutil.rmtree(old)


@contextmanager
def drafted(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes ``folder`` at the end: half of one is none."""
    draft = folder.with_name(f"{folder.name}.draft")
    if draft.exists():  # of a run that was killed
        shutil.rmtree(draft)
    draft.mkdir(parents=True)
    yield draft
    draft.replace(folder)
