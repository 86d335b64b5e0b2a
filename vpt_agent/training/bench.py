"""Step time: one pass where one is enough, beside two full passes, in turn in one process.

The machine may be busy with other things, so only the ratio over steps taken in turn counts, of CPU
time with one thread. A step is forward, backward and AdamW, towers frozen, on ready batches.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from vpt_agent.config import shipped_model
from vpt_agent.data import read_row
from vpt_agent.model import VPTConfig, VPTForConditionalGeneration, VPTProcessor
from vpt_agent.model.masking import MaskRule
from vpt_agent.model.memory import FeatureMemory
from vpt_agent.tokens.table import IM_END, IM_START, PerceptionKind, PerceptionTable
from vpt_agent.training.collate import Batch, Collator, Item, plan_batches
from vpt_agent.training.config import make_config
from vpt_agent.training.freeze import freeze
from vpt_agent.training.run import make_collator, stage_lists

AIM = 1.5
"""The ratio to reach with frozen towers."""

SHARES: Mapping[str, float] = {"region": 0.35, "clip": 0.15, "dino": 0.15, "sam": 0.15, "": 0.2}
"""Kinds of rows in the mixture; "" is a row without a call."""

QUESTION = "what is the text on the purple rectangular label?"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """One comparison: width and layers of the language model (None: the shipped model's), masks."""

    name: str
    width: int | None
    layers: int | None
    rule: MaskRule
    counts: bool = True
    remember: bool = False


SETTINGS = (
    Setting("shipped shape, no masks", None, None, MaskRule()),
    Setting("shipped shape, question zeroed in half of the batches", None, None, MaskRule(1, 0.5)),
    Setting(
        "shipped shape, attention masks in half of the rows",
        None,
        None,
        MaskRule(1, 0.5, "attention", "row"),
    ),
    Setting("shipped shape, no masks, towers remembered", None, None, MaskRule(), remember=True),
    Setting("width 384, 6 layers, no masks", 384, 6, MaskRule(), counts=False),
)


def bench(
    *,
    repeats: int = 9,
    rows: int = 8,
    threads: int = 1,
    settings: Sequence[Setting] = SETTINGS,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Figures of all settings: medians in milliseconds, ratios, the largest difference of losses.

    ``repeats`` passes over the batches; ``padding`` is the share of padding in them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batches, padding = None, 0.0
        measured = []
        for setting in settings:
            model, processor = _model(setting)
            if batches is None:
                with TemporaryDirectory() as folder:
                    batches, padding = mixture(processor, Path(folder), rows=rows)
                say(f"{len(batches)} batches of {rows} rows, padding {padding:.1%}")
            clock = time.process_time if threads == 1 else time.perf_counter
            measured.append(_measure(model, batches, setting, repeats, clock))
            say(f"{setting.name}: ratio {measured[-1]['ratio']:.2f}")
    finally:
        torch.set_num_threads(before)
    return {
        "aim": AIM,
        "met": all(s["ratio"] >= AIM for s in measured if s["counts"]),
        "settings": measured,
        "padding": padding,
        "mixture": dict(SHARES),
        "rows": rows,
        "repeats": repeats,
        "threads": threads,
        "time": "CPU" if threads == 1 else "wall",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }


def _model(setting: Setting) -> tuple[VPTForConditionalGeneration, VPTProcessor]:
    """The shipped model's shape with random weights, towers frozen; and its processor."""
    config = VPTConfig.from_pretrained(shipped_model())
    if setting.width is not None:
        head = config.text_config.hidden_size // config.text_config.num_attention_heads
        config.text_config.num_attention_heads = setting.width // head
        config.text_config.hidden_size = config.vision_config.hidden_size = setting.width
        config.text_config.intermediate_size = setting.width * 8 // 3
    if setting.layers is not None:
        config.text_config.num_hidden_layers = setting.layers
        config.text_config.layer_types = ["full_attention"] * setting.layers
    config.positions, config.gradients, config.control = "mrope", "published", "causal"
    processor = VPTProcessor.from_pretrained(shipped_model(), config=config)
    ids = processor.tokenizer.get_vocab()
    config.para_start_id, config.para_end_id = ids[IM_START], ids[IM_END]
    torch.manual_seed(0)
    model = VPTForConditionalGeneration(config).float().train()
    freeze(model, **stage_lists(_config(), model.table))
    return model, processor


def _config(rows: int = 8) -> Any:
    return make_config(
        {
            "out": "unused",
            "stage": "instruction",
            "steps": 1,
            "model": {"path": "shipped"},
            "data": {"sources": [{"path": "unused"}], "rows": rows},
        }
    )


def mixture(
    processor: VPTProcessor, folder: Path, *, rows: int, windows: int = 1
) -> tuple[list[Batch], float]:
    """Batches as training makes them from rows in the shares of ``SHARES``; share of padding.

    Pictures and wording are made up: their sizes vary as the scenes' do. A window, in which rows of
    like length meet, has as many batches as in training by default.
    """
    config = _config(rows)
    collator: Collator = make_collator(config, processor)
    room = config.data.window * rows
    chance = np.random.default_rng(0)
    known = {kind.name: kind for kind in processor.table.kinds}
    shares = {name: share for name, share in SHARES.items() if not name or name in known}
    batches: list[Batch] = []
    tokens = padded = 0
    for _ in range(windows):
        items: list[Item] = []
        for name, share in shares.items():
            for number in range(round(room * share / sum(shares.values()))):
                data = _row(chance, folder, f"{name}{number}", known.get(name), processor.table)
                item = collator.item(read_row(data), folder)
                assert item is not None
                items.append(item)
        order = chance.permutation(len(items))
        items = [items[i] for i in order]
        for group in plan_batches([len(item) for item in items], rows=rows):
            batch = collator.batch([items[i] for i in group])
            tokens += int(batch["attention_mask"].sum())
            padded += batch["attention_mask"].numel()
            batches.append(batch)
    return batches, 1 - tokens / padded


def _row(
    chance: np.random.Generator,
    folder: Path,
    name: str,
    kind: PerceptionKind | None,
    table: PerceptionTable,
) -> dict[str, Any]:
    size = (int(chance.integers(168, 336)) * 4, int(chance.integers(168, 336)) * 4)
    size = (size[0], max(size[1], size[0] * 3 // 4))
    Image.new("RGB", size, (120, 130, 140)).save(folder / f"{name}.png")
    question = " ".join(QUESTION.split()[: int(chance.integers(4, 9))])
    answer = "ABCDEFGH"[: int(chance.integers(3, 7))]
    texts = [f"<image>\n{question}"]
    row: dict[str, Any] = {"images": [f"{name}.png"]}
    if kind is not None and kind.payload == "grid":
        corners = f"{kind.x_token(1)}{kind.y_token(2)}{kind.x_token(4)}{kind.y_token(3)}"
        texts += [f"{kind.start}{corners}{kind.end}", kind.tag]
        width = int(chance.integers(120, 300))
        row["images"].append(f"{name}.png_10,20,{10 + width},{20 + width // 2}")
    elif kind is not None:
        texts += [f"{kind.start}{(kind.control or '') * table.controls}{kind.end}", kind.tag]
        row[kind.tag.strip("<>") + "s"] = [f"{name}.png"]
    texts.append(answer)
    row["messages"] = [
        {"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(texts)
    ]
    return row


def _measure(
    model: VPTForConditionalGeneration,
    batches: Sequence[Batch],
    setting: Setting,
    repeats: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.0)  # the same weights for both, all along
    memory = FeatureMemory(2**30) if setting.remember else None
    procedures: dict[str, dict[str, Any]] = {
        "two": {"passes": "full", "picture_keys": None},
        "one": {"passes": "one", "labelled_only": True, "memory": memory},
    }
    seconds: dict[str, list[float]] = {name: [] for name in procedures}
    apart = 0.0
    for repeat in range(repeats + 1):  # the first warms up
        total = dict.fromkeys(procedures, 0.0)
        for number, batch in enumerate(batches):
            losses = []
            names = list(procedures)
            for name in names if (repeat + number) % 2 else reversed(names):
                torch.manual_seed(1000 * repeat + number)  # the same masks for both
                inputs = {k: v for k, v in batch.items() if k != "rows"}
                begun = clock()
                loss = model(**(inputs | procedures[name]), masking=setting.rule).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                total[name] += clock() - begun
                losses.append(float(loss.detach()))
            apart = max(apart, abs(losses[0] - losses[1]))
        if repeat:
            for name, spent in total.items():
                seconds[name].append(1000 * spent / len(batches))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = [two / one for two, one in zip(seconds["two"], seconds["one"], strict=True)]
    return {
        "name": setting.name,
        "counts": setting.counts,
        "two_ms": medians["two"],
        "one_ms": medians["one"],
        "ratio": statistics.median(pairs),
        "ratios": [min(pairs), max(pairs)],
        "loss_apart": apart,
    }
