"""End-to-end figures: region tokens, crop, answer, on scenes that no training has drawn."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpt_agent.nano.alphabet import Split
from vpt_agent.nano.batches import frame_patches, token_grid
from vpt_agent.nano.conversation import LOOK, Encoder, Ints, question_text
from vpt_agent.nano.model import image_features, text_states
from vpt_agent.nano.pool import LARGE_LONGEST, Pixels
from vpt_agent.nano.scene import SceneQuestion, make_scene
from vpt_agent.nano.tokenizer import KIND, build_tokenizer, token_id
from vpt_agent.nano.views import CROP_LONGEST, GLOBAL_LONGEST, GRID, Box, crop_box, fit_view
from vpt_agent.tokens.table import IM_END

# Far above every seed of the training pool.
FIRST_SEED: Final = 10_000_000
_BATCH: Final = 50
_MOST_ANSWER: Final = 8
_REGION_LENGTH: Final = 7


@dataclass
class _Case:
    seed: int
    image: Image.Image
    question: SceneQuestion


@dataclass
class _Talk:
    """A conversation under way: ids, M-RoPE positions (3, length) and its visual tokens."""

    ids: list[int] = field(default_factory=list)
    positions: list[Ints] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    visual: int = 0

    def following(self) -> int:
        return max((int(p.max()) + 1 for p in self.positions[-200:]), default=0)

    def add(self, encoder: Encoder, text: str, view: Pixels, features: Tensor) -> None:
        encoded = encoder.encode([(text, False)], [token_grid(view)])
        start = self.following()
        self.ids += encoded.ids.tolist()
        self.positions.append(encoded.positions + start)
        self.features.append(features)
        self.visual += features.shape[0]

    def say(self, token: int) -> None:
        self.positions.append(np.full((3, 1), self.following()))
        self.ids.append(token)


def _draw(item: tuple[int, Split]) -> _Case:
    scene = make_scene(item[0], split=item[1])
    return _Case(item[0], scene.image, scene.questions[0])


def _cases(split: Split, count: int) -> Iterator[list[_Case]]:
    """Batches of drawn scenes with one question each."""
    jobs = [(FIRST_SEED + i, split) for i in range(count)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for start in range(0, count, _BATCH):
            yield pool.map(_draw, jobs[start : start + _BATCH])


class Reader:
    """A nano model with batched greedy decoding."""

    def __init__(self, directory: Path) -> None:
        from vpt_agent.nano.train import load_model

        self.model: Any = load_model(directory).eval()
        self.encoder = Encoder(build_tokenizer())
        tokenizer = self.encoder.tokenizer
        self.end = token_id(tokenizer, IM_END)
        self.region = token_id(tokenizer, KIND.start)
        self.x0, self.y0 = (token_id(tokenizer, t) for t in (KIND.x_token(0), KIND.y_token(0)))

    def features(self, view: Pixels) -> Tensor:
        """Visual tokens (tokens, 192) of a uint8 RGB view."""
        patches = torch.from_numpy(frame_patches(view))
        grid = torch.tensor([[view.shape[0] // 14, view.shape[1] // 14]])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return image_features(self.model.model.visual, patches, grid).float()

    @torch.no_grad()
    def _next(self, talks: list[_Talk], banned: list[int]) -> list[int]:
        length = max(len(talk.ids) for talk in talks)
        ids = torch.zeros(len(talks), length, dtype=torch.long)
        positions = torch.zeros(3, len(talks), length, dtype=torch.long)
        for row, talk in enumerate(talks):
            n = len(talk.ids)
            ids[row, :n] = torch.tensor(talk.ids)
            positions[:, row, :n] = torch.from_numpy(np.concatenate(talk.positions, axis=1))
        text = self.model.model.language_model
        embeds = text.embed_tokens(ids)
        pads = (ids == self.encoder.image).unsqueeze(-1)
        embeds = embeds.masked_scatter(pads, torch.cat([f for t in talks for f in t.features]))
        last = torch.tensor([len(talk.ids) - 1 for talk in talks])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states, *_ = text_states(text, embeds, positions)
            logits = self.model.lm_head(states[torch.arange(len(talks)), last]).float()
        logits[:, banned] = -torch.inf
        return [int(i) for i in logits.argmax(-1)]

    def decode(self, talks: list[_Talk], most: int, banned: list[int]) -> list[list[int]]:
        """Greedy replies of at most `most` tokens, without the final end token."""
        replies: list[list[int]] = [[] for _ in talks]
        open_rows = list(range(len(talks)))
        for _ in range(most):
            if not open_rows:
                break
            tokens = self._next([talks[i] for i in open_rows], banned)
            still = []
            for i, token in zip(open_rows, tokens, strict=True):
                talks[i].say(token)
                if token != self.end:
                    replies[i].append(token)
                    still.append(i)
            open_rows = still
        return replies

    def cells(self, reply: list[int]) -> tuple[int, int, int, int] | None:
        """Grid cells of a well-formed region reply, else None."""
        if len(reply) != _REGION_LENGTH - 1 or reply[0] != self.region:
            return None
        x0, y0, x1, y1 = (t - s for t, s in zip(reply[1:5], (self.x0, self.y0) * 2, strict=True))
        inside = all(0 <= c < GRID for c in (x0, y0, x1, y1))
        return (x0, y0, x1, y1) if inside and x0 <= x1 and y0 <= y1 else None

    def text(self, reply: list[int]) -> str:
        """The reply as text."""
        return str(self.encoder.tokenizer.decode(reply))


def _talks(reader: Reader, cases: list[_Case], longest: int) -> list[_Talk]:
    talks = []
    for case in cases:
        view = np.asarray(fit_view(case.image, longest))
        talk = _Talk()
        text = question_text(case.question.question, case.seed % 2 == 0)
        talk.add(reader.encoder, text, view, reader.features(view))
        talks.append(talk)
    return talks


def _inside(tag: Box, crop: Box) -> bool:
    return crop[0] <= tag[0] and crop[1] <= tag[1] and tag[2] <= crop[2] and tag[3] <= crop[3]


def _looking(reader: Reader, cases: list[_Case], counts: dict[str, float]) -> None:
    """Region, crop, answer; adds to the counts."""
    talks = _talks(reader, cases, GLOBAL_LONGEST)
    replies = reader.decode(talks, _REGION_LENGTH, [])
    rows = []
    for i, (case, reply) in enumerate(zip(cases, replies, strict=True)):
        cells = reader.cells(reply)
        if cells is None:
            continue
        box = crop_box(cells, *case.image.size)
        counts["looked"] += 1
        counts["localised"] += _inside(case.question.regions[0], box)
        view = np.asarray(fit_view(case.image, CROP_LONGEST, box))
        talks[i].add(reader.encoder, LOOK, view, reader.features(view))
        rows.append(i)
    answers = reader.decode([talks[i] for i in rows], _MOST_ANSWER, [])
    for i, answer in zip(rows, answers, strict=True):
        counts["exact"] += reader.text(answer) == cases[i].question.answer
    counts["visual_tokens"] += sum(talk.visual for talk in talks)


def _direct(reader: Reader, cases: list[_Case], longest: int, counts: dict[str, float]) -> None:
    """The answer from one view only; a look is made impossible."""
    talks = _talks(reader, cases, longest)
    answers = reader.decode(talks, _MOST_ANSWER, [reader.region])
    for case, answer in zip(cases, answers, strict=True):
        counts["exact"] += reader.text(answer) == case.question.answer
    counts["visual_tokens"] += sum(talk.visual for talk in talks)


def _samples_seen(directory: Path) -> int:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return max(int(json.loads(line)["samples"]) for line in lines)


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            return f"{name}, {os.cpu_count()} cores, no GPU, torch {torch.__version__}"
    return f"{os.cpu_count()} cores, torch {torch.__version__}"


def evaluate_all(out: Path, count: int) -> dict[str, Any]:
    """Evaluate every trained model below `out` on `count` scenes per split; print JSON."""
    torch.set_num_threads(2)
    runs: dict[str, tuple[str, int | None]] = {
        "look": ("scenes", None),
        "look forbidden": ("scenes", GLOBAL_LONGEST),
        "baseline, same view": ("baseline-global", GLOBAL_LONGEST),
        "baseline, larger view": ("baseline-large", LARGE_LONGEST),
    }
    runs = {k: v for k, v in runs.items() if (out / v[0] / "model.safetensors").exists()}
    readers = {name: Reader(out / name) for name in {directory for directory, _ in runs.values()}}
    parameters = sum(p.numel() for p in next(iter(readers.values())).model.parameters())
    result: dict[str, Any] = {
        "machine": _machine(),
        "parameters": parameters,
        "scenes_per_split": count,
        "samples_seen": {name: _samples_seen(out / name) for name in sorted(readers)},
    }
    splits: tuple[Split, ...] = ("train", "unseen")
    for split in splits:
        begun = time.monotonic()
        keys = ("exact", "looked", "localised", "visual_tokens")
        counts = {name: dict.fromkeys(keys, 0.0) for name in runs}
        for cases in _cases(split, count):
            for name, (directory, longest) in runs.items():
                if longest is None:
                    _looking(readers[directory], cases, counts[name])
                else:
                    _direct(readers[directory], cases, longest, counts[name])
        key = "new scenes" if split == "train" else "new scenes, unseen fonts and backgrounds"
        result[key] = {n: {k: v / count for k, v in c.items()} for n, c in counts.items()}
        print(f"eval: {key}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    text = json.dumps(result, indent=1)
    (out / "eval.json").write_text(text + "\n")
    print(text)
    return result
