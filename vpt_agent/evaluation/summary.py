"""From outcomes to figures: shares with intervals, paired differences, regions, choices, states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vpt_agent.errors import UserError
from vpt_agent.evaluation.boxes import match
from vpt_agent.evaluation.intervals import Interval, difference, mean, share
from vpt_agent.evaluation.items import Needs
from vpt_agent.evaluation.states import describe_states
from vpt_agent.evaluation.store import Outcome, State, read_manifest, read_rows, read_states
from vpt_agent.tokens.table import PUBLISHED

INVALID = frozenset(
    {
        "unknown_tool",
        "invalid_json",
        "invalid_arguments",
        "unknown_source",
        "box_outside",
        "box_too_small",
    }
)
"""Errors of calls that the model wrote wrongly; a timeout or a limit is not its fault."""

Figures = dict[str, Any]


def summarise(folders: Path | str | Sequence[Path | str], *, seed: int = 0) -> Figures:
    """The figures of one evaluation, of one folder or of several that share the work.

    Keys: ``models``, ``machine``, ``settings`` (as recorded), ``results`` by setting (see
    :func:`setting_figures`), ``differences``: of every switched setting from the same call without
    a switch, and of every other from each one that has no tools (baselines too); ``regions`` and
    ``choices`` by setting, ``states`` by kind. All plain JSON.
    """
    paths = [folders] if isinstance(folders, str | Path) else list(folders)
    if not paths:
        raise UserError("no folder of results was given", where="summarise")
    manifests = [read_manifest(p) for p in paths]
    first = manifests[0]
    for path, other in zip(paths, manifests, strict=True):
        for name in ("models", "settings"):
            if other[name] != first[name]:
                raise UserError(
                    f"these folders hold different evaluations: other {name}",
                    where=path,
                    expected=f"those of {paths[0]}",
                )
    rows = [row for path in paths for row in read_rows(path)]
    states = [state for path in paths for state in read_states(path)]
    return {
        "models": first["models"],
        "machine": first["machine"],
        "settings": first["settings"],
        **figures_of(rows, states, first["settings"], seed=seed),
    }


def figures_of(
    rows: Iterable[Outcome],
    states: Iterable[State],
    settings: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
) -> Figures:
    """As :func:`summarise`, of outcomes at hand."""
    by_setting: dict[str, list[Outcome]] = {s["name"]: [] for s in settings}
    for row in rows:
        by_setting.setdefault(row.setting, []).append(row)
    known = {s["name"]: s for s in settings}
    plain = {n: s for n, s in known.items() if _thrown(s) == 0}
    return {
        "results": {n: setting_figures(r, seed=seed) for n, r in by_setting.items()},
        "differences": _differences(by_setting, known, plain, seed),
        "regions": {
            name: figures
            for name, found in by_setting.items()
            if name in plain and (figures := region_figures(found, seed=seed))
        },
        "choices": {
            name: figures
            for name, found in by_setting.items()
            if known.get(name, {}).get("tool_choice") == "auto"
            and name in plain
            and (figures := choice_figures(found))
        },
        "states": _state_figures(list(states), seed),
    }


def _thrown(setting: Mapping[str, Any]) -> int:
    return sum(v != "kept" for v in setting["switches"].values())


def setting_figures(rows: Sequence[Outcome], *, seed: int = 0) -> Figures:
    """Of one setting: ``n`` asked, ``skipped``, ``failed``, ``exact``, ``by_type`` and
    ``by_need`` (mean score with interval; needs as :func:`need_text` says them),
    ``called`` (share of items with a call), ``calls``, ``invalid`` (share of calls
    that are none or were refused), and means per answer of what it cost."""
    asked = [r for r in rows if r.counts]
    said = [r for r in asked if r.needs is not None]
    types = sorted({r.type for r in asked})
    wrong = [
        bad
        for r in asked
        for bad in [*(c.error in INVALID for c in r.calls), *([True] * r.rejected)]
    ]
    n = max(1, len(asked))
    return {
        "n": len(asked),
        "skipped": len(rows) - len(asked),
        "failed": sum(r.status == "failed" for r in asked),
        "exact": _scores(asked, seed).to_dict(),
        "by_type": {t: _scores([r for r in asked if r.type == t], seed).to_dict() for t in types},
        "by_need": {
            text: _scores([r for r in said if need_text(r.needs or ()) == text], seed).to_dict()
            for text in sorted({need_text(r.needs or ()) for r in said})
        },
        "called": share([bool(r.calls or r.rejected) for r in asked]).to_dict(),
        "calls": len(wrong),
        "invalid": share(wrong).to_dict(),
        "visual_tokens": sum(r.visual_tokens for r in asked) / n,
        "forward_tokens": sum(r.forward_tokens for r in asked) / n,
        "seconds": sum(r.seconds for r in asked) / n,
    }


NOTHING_NEEDED = "nothing"


def need_text(needs: Needs) -> str:
    """``region and region``, ``clip or dino``, ``nothing``: what an item needs, in words."""
    return " and ".join(" or ".join(need) for need in needs) or NOTHING_NEEDED


def _needing(row: Outcome, kind: str) -> bool:
    """Whether an item needs ``kind``, or another of its nature: not where a look at a region and
    an encoding of the whole picture serve alike."""
    return any(kind in need and len({_nature(k) for k in need}) == 1 for need in row.needs or ())


def _nature(kind: str) -> str:
    return PUBLISHED[kind].payload if kind in PUBLISHED else kind


def _scores(rows: Sequence[Outcome], seed: int) -> Interval:
    scores = [r.score for r in rows]
    if all(s in (0.0, 1.0) for s in scores):
        return share([s == 1.0 for s in scores])
    return mean(scores, seed=seed)


def paired(
    first: Sequence[Outcome],
    second: Sequence[Outcome],
    *,
    type: str | None = None,
    needing: str | None = None,
    seed: int = 0,
) -> Figures:
    """``first`` minus ``second`` over the items that both were asked (of one ``type``, or that
    need one kind)."""

    def scores(rows: Sequence[Outcome]) -> dict[str, float]:
        return {
            r.item: r.score
            for r in rows
            if r.counts and type in (None, r.type) and (needing is None or _needing(r, needing))
        }

    a, b = scores(first), scores(second)
    both = sorted(a.keys() & b.keys())
    return difference([a[i] for i in both], [b[i] for i in both], seed=seed).to_dict()


def _differences(
    by_setting: Mapping[str, Sequence[Outcome]],
    known: Mapping[str, Mapping[str, Any]],
    plain: Mapping[str, Mapping[str, Any]],
    seed: int,
) -> list[Figures]:
    found: list[Figures] = []
    for name, rows in by_setting.items():
        if name not in known or not rows:
            continue
        choice = known[name]["tool_choice"]
        switched = name not in plain
        if not switched and choice == "none":
            continue  # what others are compared with
        wanted = choice if switched else "none"
        others = [a for a, o in plain.items() if o["tool_choice"] == wanted and a != name]
        # "clip, noise" is compared with "clip", not with every way of calling it without a switch.
        own = [a for a in others if switched and name.startswith(f"{a}, ")]
        for against in own or others:
            if not by_setting[against]:
                continue
            types = sorted({r.type for r in rows if r.counts})
            found.append(
                {
                    "setting": name,
                    "against": against,
                    "switched": switched,
                    "kind": (kind := known[name].get("kind", "")),
                    "all": paired(rows, by_setting[against], seed=seed),
                    "needed": paired(rows, by_setting[against], needing=kind, seed=seed),
                    "by_type": {
                        t: paired(rows, by_setting[against], type=t, seed=seed) for t in types
                    },
                }
            )
    return found


def region_figures(rows: Sequence[Outcome], *, seed: int = 0) -> Figures:
    """How well the regions shown meet the true objects: IoU, IoGT and the share wholly inside,
    for all objects, small ones (under 1/64 of the picture's area) and the others apart. Only of
    items that need a kind which shows regions, or of which nobody said what they need."""
    asked = [r for r in rows if r.counts and r.true]
    alone = [{c.kind for c in r.calls} for r in asked if r.boxes]
    showing = {kind for kinds in alone if len(kinds) == 1 for kind in kinds}
    judged = [
        r
        for r in asked
        if r.needs is None or any(kind in need for need in r.needs for kind in showing)
    ]
    matches = [m for r in judged for m in match(r.boxes, r.true, r.size)]
    if not matches or not any(r.boxes for r in judged):
        return {}
    groups = {
        "all": matches,
        "small": [m for m in matches if m.small],
        "large": [m for m in matches if not m.small],
    }
    return {
        name: {
            "objects": len(group),
            "iou": mean([m.iou for m in group], seed=seed).to_dict(),
            "iogt": mean([m.iogt for m in group], seed=seed).to_dict(),
            "inside": share([m.iogt >= 1 for m in group]).to_dict(),
        }
        for name, group in groups.items()
    }


def choice_figures(rows: Sequence[Outcome]) -> Figures:
    """Calls of a model that chooses freely against what the items need.

    ``calls_needed``: of all kinds called (each once an item), the share that the item needs;
    ``needed_called``: of items that need something, the share in which every need was met by a
    call; ``needless_avoided``: of items that need nothing, the share without a call; ``by_kind``:
    precision (calls of items that may want the kind, among its calls) and recall (items that need
    the kind and no other in its place, in which it was called); ``by_type``: of the items of a type
    of question, the shares in which each kind was called, and ``none``.
    """
    judged = [r for r in rows if r.counts and r.needs is not None]
    if not judged:
        return {}
    called = [{c.kind or c.name for c in r.calls} for r in judged]
    needs = [r.needs or () for r in judged]
    met = [
        # A need that stands there twice asks for two calls.
        all(
            sum((c.kind or c.name) in need for c in row.calls) >= number
            for need, number in Counter(row.needs).items()
        )
        for row in judged
        if row.needs
    ]
    avoided = [not kinds for kinds, wanted in zip(called, needs, strict=True) if not wanted]
    names = sorted(
        {k for kinds in called for k in kinds} | {k for w in needs for n in w for k in n}
    )
    by_kind = {}
    for kind in names:
        right = [
            any(kind in need for need in w)
            for kinds, w in zip(called, needs, strict=True)
            if kind in kinds
        ]
        found = [kind in kinds for kinds, w in zip(called, needs, strict=True) if (kind,) in w]
        by_kind[kind] = {"precision": share(right).to_dict(), "recall": share(found).to_dict()}
    every = [
        any(kind in need for need in w)
        for kinds, w in zip(called, needs, strict=True)
        for kind in sorted(kinds)
    ]
    return {
        "calls_needed": share(every).to_dict(),
        "needed_called": share(met).to_dict(),
        "needless_avoided": share(avoided).to_dict(),
        "by_kind": by_kind,
        "by_type": {
            name: _calls_made([r for r in judged if r.type == name], names)
            for name in sorted({r.type for r in judged})
        },
    }


def _calls_made(rows: Sequence[Outcome], kinds: Sequence[str]) -> Figures:
    """In which share of ``rows`` each kind was called, or none."""
    called = [{c.kind or c.name for c in r.calls} for r in rows]
    found = {kind: share([kind in own for own in called]).to_dict() for kind in kinds}
    return {"none": share([not own for own in called]).to_dict(), **found}


def _state_figures(states: Sequence[State], seed: int) -> Figures:
    """By setting and kind; where the types are too few to compare, the reason instead."""
    found: Figures = {}
    for setting, kind in sorted({(s.setting, s.kind) for s in states}):
        own = [s for s in states if (s.setting, s.kind) == (setting, kind)]
        name = kind if setting == kind else f"{setting}: {kind}"
        types = [s.type for s in own]
        if sum(types.count(t) > 1 for t in set(types)) < 2:
            found[name] = {"n": len(own), "not_compared": "fewer than two types of questions"}
        else:
            found[name] = describe_states(own, seed=seed).to_dict()
    return found
