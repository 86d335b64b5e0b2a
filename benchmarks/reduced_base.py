"""The base model that every run of `ablations.py` begins with: it sees, answers and calls nothing.

The published models begin with a pretrained Qwen2-VL and pretrained encoders. So do these: one
model learns to name what it sees (colour and mark of each patch, in the tower and in the small
DINOv2) and to answer about pictures in which everything can be seen: the mark of a disc in a
close-up, shown before the question or after it, and where a disc lies, in hundredths. The tokens of
the small DINOv2 are shown after the question, too, as its projector gives them without a condition:
the stage of alignment. It never sees a perception token; all that the experiments change comes
after.
"""

from __future__ import annotations

import fcntl
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import reduced
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.model.testing import byte_tokenizer
from vpt_agent.nano.batches import frame_patches
from vpt_agent.nano.views import MEAN, STD
from vpt_agent.tokens.table import IM_END, IM_START, IMAGE_PAD, VISION_END, VISION_START
from vpt_agent.vision.encoders import IMAGENET_MEAN, IMAGENET_STD

PATCH, MERGE = 14, 2
ROWS = 16
SEE = ("close", "dino", "whole", "dino", "close", "dino")
TALK = ("whole", "late", "whole", "dino", "whole", "close")
"""What is shown in turn: first it learns to name patches, then to answer, too."""
SEEING = 1 / 3
"""Of all steps, those that only name patches."""
EVERY = 200
"""Steps between two states to go on from."""
STEPS, RATE = 2700, 1.5e-3
Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Say = Callable[[str], None]
_COLOURS, _MARKS = list(reduced.COLOURS), list(reduced.MARKS)
CLASSES = (len(_COLOURS) + 1, len(_MARKS) + 1)


def learn_base(work: Path, *, scenes: int, steps: int, rate: float, say: Say) -> Path:
    """Train the base for ``steps`` from the scenes in ``work`` and write it; what is there stays.

    A run that was killed goes on from its last state; of several processes one trains and the
    others wait. The file holds the tower, the language
    model with the plain vocabulary's embeddings, and the small DINOv2.
    """
    done = work / "base.safetensors"
    with (work / "base.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends, however it ends
        reduced.draw_scenes(work / "scenes", scenes)
        if not done.is_file():
            _learn(work, done, scenes, steps, rate, say)
    return done


def _learn(work: Path, done: Path, scenes: int, steps: int, rate: float, say: Say) -> None:
    part = work / "base.part"
    folder = work / "base"
    table = reduced.make_table("dino")
    if not (folder / "ready").is_file():
        reduced.make_model(folder, table, seed=0)
        (folder / "ready").touch()
    # Written-out attention: its weights are asked for.
    model = VPTForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    learner = Learner(model)
    optimizer = torch.optim.AdamW(
        learner.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(  # up, level, and down in the last quarter
        optimizer, lambda step: min(1, (step + 1) / 50, 4 * (1 - step / steps))
    )
    begin = 0
    if part.is_file():
        state = torch.load(part, weights_only=True)
        learner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        begin = int(state["step"])
    began = time.process_time()
    for step in range(begin, steps):
        loss, told = learner(step, work / "scenes", scenes, talks=step >= SEEING * steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 < 6:
            shown = ", ".join(f"{k} {v:.2f}" for k, v in told.items())
            say(f"base: step {step}, {time.process_time() - began:.0f} s: {shown}")
        if (step + 1) % EVERY == 0 and step + 1 < steps:
            state = {"model": learner.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"schedule": schedule.state_dict(), "step": step + 1}, f"{part}.new")
            Path(f"{part}.new").replace(part)
    names = ("visual.", "model.", "detection_model.", "detection_projector.")
    kept = {
        k: v
        for k, v in learner.vpt.state_dict().items()
        if k.startswith(names) and "_condition." not in k
    }
    kept["model.embed_tokens.weight"] = kept["model.embed_tokens.weight"][: len(byte_tokenizer())]
    save_file({k: v.contiguous() for k, v in kept.items()}, work / "base.new")
    (work / "base.new").replace(done)


class Learner(nn.Module):
    """The model and the heads that name patches and say where they lie."""

    def __init__(self, vpt: VPTForConditionalGeneration) -> None:
        super().__init__()
        self.vpt: Any = vpt
        self.tower = nn.Linear(vpt.config.vision_config.embed_dim, sum(CLASSES))
        width = vpt.config.vision_config.embed_dim
        self.place = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2), nn.Sigmoid())
        self.dino = nn.Linear(vpt.config.encoders["detection"]["hidden_size"], sum(CLASSES))
        self.tokenizer = byte_tokenizer()
        self.image = int(vpt.config.image_token_id)
        self._states: list[Tensor] = []
        self.vpt.visual.merger.register_forward_pre_hook(
            lambda module, given: self._states.append(given[0])
        )

    def forward(
        self, step: int, folder: Path, scenes: int, *, talks: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of step ``step``: of naming patches, and of answers if it ``talks``."""
        rng = random.Random(f"base-{step}")
        kind = (TALK if talks else SEE)[step % 6]
        side = {"whole": reduced.VIEW, "dino": reduced.LOOK}.get(kind, reduced.CROP)
        views, marks, asked = [], [], []
        for _ in range(ROWS):
            seed = rng.randrange(scenes)
            discs = reduced.make_discs(seed)
            whole = (0, 0, reduced.SIDE, reduced.SIDE)
            window = _window(rng, discs) if kind in ("close", "late") else whole
            with Image.open(folder / f"{seed}.png") as picture:
                view = picture.resize((side, side), Image.Resampling.BICUBIC, box=window)
            views.append(np.asarray(view))
            labels = _labels(discs, window, side, readable=kind != "whole")
            marks.append(labels.reshape(-1, 2) if kind == "dino" else _blocks(labels))
            questions = _questions(rng, discs, window, where=kind == "whole")
            asked.append(questions[:1] if kind in ("late", "dino") else questions)
        seen, loss, told = self._seen(kind, views, np.stack(marks))
        if not talks:
            return loss, told
        said, more = self._said(kind, seen, asked, _spots(np.stack(marks), seen.shape[1]))
        return loss + said, told | more

    def _seen(
        self, kind: str, views: Sequence[Pixels], labels: Labels
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Visual tokens [rows, V, D] of pictures, and how well their patches are named."""
        flat = labels.reshape(-1, 2)
        if kind == "dino":
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
            pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255
            states = torch.stack(self.vpt.run_tower("dino", pixels=(pixels - mean) / std))
            loss, told = self._named(states.flatten(0, 1), flat, kind)
            return self.vpt.projector("dino").features(states), loss, told
        mean, std = (torch.tensor(v).view(1, 3, 1) for v in (MEAN, STD))
        frames = torch.from_numpy(np.concatenate([frame_patches(v) for v in views]))
        pixels = (frames.view(-1, 3, PATCH**2).float() / 255 - mean) / std
        pixels = pixels[:, :, None].expand(-1, -1, 2, -1).reshape(len(pixels), -1)
        count = views[0].shape[0] // PATCH
        self._states.clear()
        seen = self.vpt.encode_images(pixels, torch.tensor([(1, count, count)] * len(views)))
        states = self._states.pop()
        loss, told = self._named(states, flat, kind)
        if kind == "whole":  # a close-up does not say where it was taken
            far = _off(self.place(states), count)
            loss, told = loss + 4 * far, told | {"whole off by": float(far.detach())}
        return torch.stack(seen), loss, told

    def _named(self, states: Tensor, labels: Labels, name: str) -> tuple[Tensor, dict[str, float]]:
        head = self.dino if name == "dino" else self.tower
        told, loss = {}, torch.zeros(())
        parts = head(states).split(CLASSES, dim=-1)
        for what, part, target in zip(("colour", "mark"), parts, labels.T, strict=True):
            aim = torch.from_numpy(target)
            weight = torch.ones(part.shape[-1])
            weight[0] = 0.1  # most patches show neither
            if bool((aim != -100).any()):
                loss = loss + functional.cross_entropy(part, aim, weight, ignore_index=-100)
            if bool((aim > 0).any()):
                told[f"{name} {what}"] = float((part.argmax(-1) == aim)[aim > 0].float().mean())
        return loss, told

    def _said(
        self, kind: str, seen: Tensor, asked: Sequence[Sequence[tuple[str, str]]], spots: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss of answers about ``seen``, and of where their heads look."""
        ids, aims, askings = self._sequences(asked, seen.shape[1], late=kind in ("late", "dino"))
        embeds = self.vpt.model.embed_tokens(ids)
        embeds = embeds.masked_scatter((ids == self.image)[..., None], seen)
        side = 2 * round(seen.shape[1] ** 0.5)
        if kind == "dino":  # counted on like text, as a re-encoded picture is
            positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
        else:
            rows = [self.vpt.rope_positions(row, [(1, side, side)]) for row in ids]
            positions = torch.stack(rows, dim=1)
        found = self.vpt.model(inputs_embeds=embeds, position_ids=positions, output_attentions=True)
        known = aims[:, 1:] != -100
        logits = self.vpt.lm_head(found.last_hidden_state[:, :-1][known])
        target = aims[:, 1:][known]
        said = functional.cross_entropy(logits, target)
        pointing = _pointing(found.attentions, askings, ids == self.image, spots)
        letters = target != self.tokenizer.convert_tokens_to_ids(IM_END)
        right = (logits.argmax(-1) == target)[letters].float().mean()
        told = {f"{kind} pointing": float(pointing.detach()), f"{kind} right": float(right)}
        return said + pointing, told | {f"{kind} said": float(said.detach())}

    def _sequences(
        self, asked: Sequence[Sequence[tuple[str, str]]], tokens: int, *, late: bool
    ) -> tuple[Tensor, Tensor, list[tuple[int, int, int]]]:
        """Ids and labels [rows, L] of talks about one picture each, padded on the right; and where
        answers begin: row, place before it, number of the colour that was asked for.

        ``late``: the picture is shown in a second turn, after the question.
        """
        picture = f"{VISION_START}{IMAGE_PAD * tokens}{VISION_END}"
        rows: list[tuple[list[int], list[int]]] = []
        askings = []
        for talk in asked:
            ids: list[int] = []
            labels: list[int] = []
            for number, (question, answer) in enumerate(talk):
                text = question if late or number else f"{picture}\n{question}"
                if late:
                    text += f"{IM_END}\n{IM_START}assistant\n?{IM_END}\n{IM_START}user\n{picture}"
                given = f"{IM_START}user\n{text}{IM_END}\n{IM_START}assistant\n"
                for part, learnt in ((given, False), (answer + IM_END, True), ("\n", False)):
                    if learnt:
                        askings.append((len(rows), len(ids) - 1, _COLOURS.index(question[0])))
                    got = self.tokenizer(part)["input_ids"]
                    ids += got
                    labels += got if learnt else [-100] * len(got)
            rows.append((ids, labels))
        length = max(len(ids) for ids, _ in rows)
        padded = [(i + [0] * (length - len(i)), v + [-100] * (length - len(v))) for i, v in rows]
        ids_of, labels_of = (torch.tensor(part) for part in zip(*padded, strict=True))
        return ids_of, labels_of, askings


def _off(said: Tensor, count: int) -> Tensor:
    """How far ``said`` [n, 2] lies from the true places, 0 to 1, of count x count patches."""
    middles = (np.arange(count, dtype=np.float32) + 0.5) / count
    true = torch.from_numpy(_blocks(np.stack(np.meshgrid(middles, middles), axis=-1)))
    return functional.l1_loss(said, true.repeat(len(said) // len(true), 1))


def _spots(labels: Labels, tokens: int) -> Tensor:
    """[views, tokens, colours] of labels [views, patches, 2]: which visual tokens show a disc of
    which colour."""
    shown = torch.from_numpy(labels[..., 0]).view(len(labels), tokens, -1)
    return torch.stack([(shown == i + 1).any(-1) for i in range(len(_COLOURS))], dim=-1)


def _pointing(
    attentions: Sequence[Tensor],
    askings: Sequence[tuple[int, int, int]],
    image: Tensor,
    spots: Tensor,
) -> Tensor:
    """How little two heads of the third layer look at the disc that was asked for.

    Nothing else leads to it: what an answer tells of the place is lost in the guesses of thousands
    of steps before the first question finds its disc.
    """
    looks = attentions[2][:, :2]  # [rows, 2, L, L]
    losses = []
    for row, place, colour in askings:
        spot = spots[row, :, colour]
        if bool(spot.any()):
            there = looks[row][:, place, image[row]][:, spot].sum(-1)
            losses.append(-there.clamp_min(1e-6).log().mean())
    return torch.stack(losses).mean() if losses else torch.zeros(())


def _window(rng: random.Random, discs: Sequence[reduced.Disc]) -> tuple[float, ...]:
    """A square about some disc: as large as crops of regions are."""
    left, top, right, bottom = rng.choice(discs).box
    side = rng.uniform(1.0, 2.2) * (right - left) + rng.uniform(0, 60)
    side = min(max(side, 56.0), 224.0)
    x = (left + right) / 2 - side * rng.uniform(0.35, 0.65)
    y = (top + bottom) / 2 - side * rng.uniform(0.35, 0.65)
    x, y = (min(max(0.0, v), reduced.SIDE - side) for v in (x, y))
    return x, y, x + side, y + side


def _centre(disc: reduced.Disc, window: Sequence[float]) -> tuple[float, float]:
    """The disc's centre in the window, 0 to 1."""
    left, top, right, bottom = disc.box
    return (
        ((left + right) / 2 - window[0]) / (window[2] - window[0]),
        ((top + bottom) / 2 - window[1]) / (window[3] - window[1]),
    )


def _labels(
    discs: Sequence[reduced.Disc], window: Sequence[float], side: int, *, readable: bool
) -> Labels:
    """(rows, columns, 2): colour and mark of each patch; 0 for none, -100 where it is unclear."""
    count = side // PATCH
    out = np.zeros((count, count, 2), dtype=np.int64)
    if not readable:
        out[..., 1] = -100
    scale = count / (window[2] - window[0])
    middles = np.arange(count) + 0.5
    for disc in discs:
        x, y = (v * count for v in _centre(disc, window))
        radius = (disc.box[2] - disc.box[0]) / 2 * scale
        far = np.hypot(middles[None, :] - x, middles[:, None] - y)
        inside = far < max(radius - 0.3, 0.6)
        out[inside, 0] = _COLOURS.index(disc.colour) + 1
        out[(far >= max(radius - 0.3, 0.6)) & (far < radius + 0.7), 0] = -100
        if readable:
            out[far < radius + 0.7, 1] = -100
            out[inside, 1] = _MARKS.index(disc.mark) + 1
    return out


def _blocks(grid: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What patches have in the tower's order of patches: (patches, 2)."""
    count = len(grid) // MERGE
    return grid.reshape(count, MERGE, count, MERGE, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def _questions(
    rng: random.Random, discs: Sequence[reduced.Disc], window: Sequence[float], *, where: bool
) -> list[tuple[str, str]]:
    """Questions with answers about the discs that are in the window, in any order."""
    found = []
    for disc in discs:
        x, y = _centre(disc, window)
        margin = 12 / (window[2] - window[0])
        if not (margin < x < 1 - margin and margin < y < 1 - margin):
            continue
        place = f"{int(100 * x):02d}{int(100 * y):02d}"
        found.append((f"{disc.colour}@", place) if where else (disc.colour, disc.mark))
    rng.shuffle(found)
    return found


def main() -> None:
    """``python benchmarks/reduced_base.py WORK [STEPS [RATE]]``: the base alone."""
    work = Path(sys.argv[1])
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    rate = float(sys.argv[3]) if len(sys.argv) > 3 else RATE
    torch.set_num_threads(1)
    print(learn_base(work, scenes=6000, steps=steps, rate=rate, say=print))


if __name__ == "__main__":
    main()
