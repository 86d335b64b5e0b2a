"""Figures of the domain: what can be read in each view, and what guessing gives.

``python -m vpt_agent.nano.domain.check [--scenes N]`` prints JSON. A small network that is shown
each mark's place learns to tell marks apart in the first look and in each re-encoding view: an
upper bound of what a model can, since it need not find anything. ``majority`` is what always
giving the most frequent answer would get right, by type of question.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpt_agent.nano.domain.ask import TYPES, ask
from vpt_agent.nano.domain.marks import MARKS
from vpt_agent.nano.domain.scene import DomainScene, make_domain_scene
from vpt_agent.nano.domain.sight import AGAIN, again_view, global_view, place_in

FIRST_SEED = 20_000_000
HALF = 4
HALF_AGAIN = 6
Floats = NDArray[np.float32]


def mark_patches(scene: DomainScene, kind: str) -> list[tuple[str, Floats]]:
    """Every mark and the 9 x 9 pixels around its middle in the first look, 13 x 13 in larger views.

    As flat values; the last two say where in its pixel the middle lies.
    """
    half = HALF if kind == "global" else HALF_AGAIN
    view = global_view(scene.image) if kind == "global" else again_view(scene.image, kind)
    pixels = np.pad(np.asarray(view), ((half, half), (half, half), (0, 0)), mode="edge")
    found = []
    for tag in scene.tags:
        if tag.mark is None or tag.mark_box is None:
            continue
        left, top, right, bottom = tag.mark_box
        x, y = place_in(kind, scene.size, (left + right) / 2, (top + bottom) / 2)
        cut = pixels[int(y) : int(y) + 2 * half + 1, int(x) : int(x) + 2 * half + 1]
        values = (cut.astype(np.float32) / 127.5 - 1).ravel()
        found.append((tag.mark, np.append(values, [x % 1, y % 1]).astype(np.float32)))
    return found


def readable(scenes: list[DomainScene], kind: str, *, steps: int = 1500) -> dict[str, float]:
    """Share of marks that a small network tells apart, on scenes that it did not learn from."""
    import torch
    from torch import nn

    cut = len(scenes) * 4 // 5
    parts = []
    for some in (scenes[:cut], scenes[cut:]):
        pairs = [pair for scene in some for pair in mark_patches(scene, kind)]
        labels = torch.tensor([MARKS.index(mark) for mark, _ in pairs])
        parts.append((torch.from_numpy(np.stack([p for _, p in pairs])), labels))
    (x, y), (x_new, y_new) = parts
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 3))
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.1)
    best = 0.0
    for step in range(steps):
        index = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(net(x[index]), y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 99:
            net.eval()
            with torch.no_grad():
                best = max(best, float((net(x_new).argmax(-1) == y_new).float().mean()))
            net.train()
    return {"marks": len(y_new), "read": round(best, 3)}


def answers(scenes: list[DomainScene]) -> dict[str, dict[str, Any]]:
    """By type of question: how many scenes have one, and the most frequent answer's share."""
    result: dict[str, dict[str, Any]] = {}
    for name in TYPES:
        asked = [ask(scene, name) for scene in scenes]
        found = Counter(a.answer for a in asked if a is not None)
        total = sum(found.values())
        most, count = found.most_common(1)[0]
        result[name] = {
            "asked": round(total / len(scenes), 3),
            "answers": len(found),
            "majority": round(count / total, 3),
            "most frequent": most,
        }
    return result


def main(arguments: list[str] | None = None) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=400)
    count = parser.parse_args(arguments).scenes
    scenes = [make_domain_scene(FIRST_SEED + i) for i in range(count)]
    figures = {
        "scenes": count,
        "marks read": {kind: readable(scenes, kind) for kind in ("global", *AGAIN)},
        "questions": answers(scenes),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
