"""One answer, two rounds: ours beside the published procedure, on the same weights, in turn."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vpt_agent.bench.clock import Clock
from vpt_agent.bench.forced import call_length, chosen_ahead, forced_agent, kind_of
from vpt_agent.bench.limits import Costs, Work
from vpt_agent.bench.machine import Rates, describe, measure_rates, stamp, threads
from vpt_agent.bench.published import Generated, Prompt, PublishedProcedure
from vpt_agent.bench.split import REST, Split, TimedModel, watched
from vpt_agent.bench.timeline import as_rows, stages
from vpt_agent.bench.timing import Spread, in_turn, ratios, spreads, timed, timer_for
from vpt_agent.engine.ahead import Decoding
from vpt_agent.engine.sampling import Sampling
from vpt_agent.errors import InternalError
from vpt_agent.model import compiled
from vpt_agent.trace import (
    Decoded,
    ImageEncoded,
    PerceptionAppended,
    PromptRendered,
    SpanInfo,
    Trace,
)
from vpt_agent.types import Answer, Limits, View
from vpt_agent.vision.encoders import encoder_pixels
from vpt_agent.vision.images import load_views
from vpt_agent.vision.patches import look

if TYPE_CHECKING:
    from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor

QUESTION = "What is written on the red tag beside the door?"
OVERHEAD_SHARE, OVERHEAD_SECONDS = 0.02, 0.001
"""Aims for everything that is not model arithmetic: of the time, and per turn."""
DECODE_SHARE, DECODE_SHARE_CUDA = 0.8, 0.6
"""Aims for decoding: of the bandwidth limit, for a model larger than the caches."""


@dataclass(frozen=True)
class Settings:
    """What is asked: a picture of ``image`` x ``image`` pixels, a forced call of ``force``, then
    ``new_tokens`` tokens. ``compiled``: ours by the routines in C; the baseline is plain torch."""

    image: int = 448
    new_tokens: int = 32
    force: str = "clip"
    repeats: int = 7
    threads: int = 1
    splits: int = 5
    decoding: Decoding = "auto"
    compiled: bool = False


@dataclass(frozen=True)
class Loaded:
    """A model in place, and its processor."""

    model: VPTForConditionalGeneration
    processor: VPTProcessor


def picture(side: int, seed: int = 0) -> bytes:
    """A JPEG file of ``side`` x ``side`` pixels with detail at every scale."""
    chance = np.random.default_rng(seed)
    image = np.zeros((side, side, 3))
    for cells in (4, 16, 64):
        coarse = Image.fromarray(chance.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        image += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) / 3
    buffer = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


class Ours:
    """The agent's way. Each run encodes its picture: nothing is kept from the run before."""

    def __init__(self, loaded: Loaded, settings: Settings, data: bytes) -> None:
        self.loaded, self.settings, self.data = loaded, settings, data
        self.kind = kind_of(loaded.model, settings.force)
        self.timed = TimedModel(loaded.model, Clock())
        self.fastest: Answer | None = None
        tokens = settings.new_tokens
        self.agent = forced_agent(
            loaded.model, loaded.processor, new_tokens=tokens, decoding=settings.decoding
        )
        self.watched = forced_agent(self.timed, loaded.processor, new_tokens=tokens)
        looked = self.watched.engine.features.look_all

        def look_all(looks: Any) -> Any:  # what is not the model's is decoding and resizing
            with self.timed.clock.measure("image"):
                return looked(looks)

        self.watched.engine.features.look_all = look_all  # type: ignore[method-assign]

    def close(self) -> None:
        """Stop the agents' threads."""
        self.agent.close()
        self.watched.close()

    def run(self) -> Answer:
        """One answer."""
        self.agent.engine.features.clear()
        with compiled.using(self.settings.compiled):
            answer = self.agent.run(
                QUESTION, self.data, tool_choice=self.kind.tool, limits=self._limits()
            )
        if self.fastest is None or answer.usage.seconds < self.fastest.usage.seconds:
            self.fastest = answer
        return answer

    def _limits(self) -> Limits:
        controls = self.loaded.model.table.controls
        return Limits(new_tokens=call_length(self.kind, controls) + self.settings.new_tokens)

    def split(self) -> tuple[float, Split, Mapping[str, float]]:
        """One answer under the clock: seconds in all, and by part. The first of them warms up."""
        with compiled.using(self.settings.compiled):
            return self._split()

    def _split(self) -> tuple[float, Split, Mapping[str, float]]:
        device = self.loaded.model.device
        clock = self.timed.clock = Clock(device, timer_for(device))
        split, agent = Split(clock), self.watched
        trace = Trace()
        trace.subscribe(split.hear)
        agent.engine.features.clear()
        began = clock.now()
        with clock.measure("image"):
            views = load_views([self.data])
        with clock.measure("agent"):
            talk = agent.conversation(views[0].image, trace=trace)
            steps = talk.steps(QUESTION, self.kind.tool, self._limits(), Sampling())
        agent.engine.drive([watched(steps, clock)])
        talk.close()
        total = clock.now() - began
        return total, split, split.parts(total)


class Published:
    """The published way to the same answer: what was said is taken from ``answer``."""

    def __init__(self, loaded: Loaded, settings: Settings, data: bytes, answer: Answer) -> None:
        self.loaded, self.settings, self.data = loaded, settings, data
        self.kind = kind_of(loaded.model, settings.force)
        self.view = answer.views[0]
        self.crop = next((v for v in answer.views if v.parent is not None), None)
        events = answer.trace.events
        opening = next(e for e in events if isinstance(e, PromptRendered))
        turns = [e for e in events if isinstance(e, Decoded)]
        told = next(e for e in events if isinstance(e, PerceptionAppended))
        self.first, self.call = _ids(opening.spans), _ids(turns[0].spans)
        self.second = [*self.first, *self.call, *_ids(told.spans)]
        self.said = _ids(turns[1].spans)
        # What our second turn never says.
        self.banned = sorted({*turns[1].banned})

    def run(self, clock: Clock | None = None, *, copies: bool = True) -> list[Generated]:
        """Both rounds; everything is computed anew."""
        procedure = PublishedProcedure(
            self.loaded.model, kind=self.kind.name, copies=copies, clock=clock
        )
        first = Prompt(self.first, *self._base(procedure, [False]))
        forced = dict(enumerate(self.call))
        one = procedure.generate(first, len(self.call), forced=forced)
        base = self._base(procedure, [False] if self.crop is None else [False, True])
        looks = {} if self.crop is not None else {self.kind.name: self._again(procedure)}
        second = Prompt(self.second, *base, looks)
        return [one, procedure.generate(second, len(self.said), banned=self.banned)]

    def _opened(self, crop: bool) -> View:
        (view,) = load_views([self.data])
        if not crop or self.crop is None:
            return view
        left, upper, right, lower = self.crop.box
        return replace(self.crop, image=view.image.crop((left, upper, right, lower)))

    def _base(self, procedure: PublishedProcedure, crops: list[bool]) -> tuple[Any, Any]:
        """Patches and grids; each picture is opened and cut twice, as published: once to count its
        tokens, once for the batch."""
        with procedure.timed("image"):
            policy = self.loaded.processor.policy
            for _ in range(2):
                found = look([self._opened(crop) for crop in crops], policy)
        return found.pixel_values, found.grid_thw

    def _again(self, procedure: PublishedProcedure) -> dict[str, torch.Tensor]:
        policy = self.loaded.processor.policy
        with procedure.timed("image"):
            for _ in range(2):
                view = self._opened(False)
                if self.kind.encoder == "base":
                    found = look([view], policy.at_input(self.kind.input_size))
                    made = {"pixel_values": found.pixel_values, "grid_thw": found.grid_thw}
                else:
                    made = {"pixels": encoder_pixels(self.kind, view, policy)[None]}
        return made

    def expected_forwards(self) -> list[tuple[int, int]]:
        """Lengths of every pass that the published procedure makes for this answer: the prompt
        twice, then every token but the last twice; two tokens where a control token is fed."""
        passes: list[tuple[int, int]] = []
        row = self.loaded.model.table[self.kind.name]
        for prompt, said in ((self.first, self.call), (self.second, self.said)):
            passes += [(len(prompt), 0)] * 2
            for i, token in enumerate(said[:-1]):
                both = i > 0 and token == row.control
                passes += [(2, len(prompt) + i - 1) if both else (1, len(prompt) + i)] * 2
        return passes


def _ids(spans: tuple[SpanInfo, ...]) -> list[int]:
    return [i for span in spans for i in span.ids]


def bench_answer(
    ours: Loaded,
    settings: Settings,
    *,
    baseline: Loaded | None = None,
    shape: str = "",
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """All figures of one answer. ``baseline`` is the model of the published procedure, if that is
    to run in another dtype than ours."""
    with threads(settings.threads):
        return _bench(ours, settings, baseline or ours, shape, tell)


def _bench(
    ours: Loaded,
    settings: Settings,
    baseline: Loaded,
    shape: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    device = ours.model.device
    machine = describe(device)
    data = picture(settings.image)
    agent = Ours(ours, settings, data)
    answer = agent.run()
    published = Published(baseline, settings, data, answer)
    rounds = published.run()
    forwards = [pair for done in rounds for pair in done.forwards]
    if forwards != published.expected_forwards():
        raise InternalError("the baseline made other passes than the published procedure")
    tell("timing")
    samples = in_turn(
        {"published": published.run, "ours": agent.run},
        repeats=settings.repeats,
        device=device,
        tell=tell,
    )
    tell("splitting")
    split = _splits(agent, settings.splits)
    clocks = [_clocked(published) for _ in range(min(2, settings.splits))]
    tell("measuring what the machine can do")
    rates = measure_rates(ours.model.dtype, device, stream=_stream(ours.model))
    limit = _limits(ours, answer, rates)
    same = [*rounds[0].ids, *rounds[1].ids] == [*published.call, *published.said]
    usage = answer.usage
    spoken = _spoken(agent.fastest or answer, limit["decode"])
    agent.close()
    found = {
        "what": "answer",
        "when": stamp(),
        "machine": machine.to_dict(),
        "model": f"{shape}, compiled" if settings.compiled else shape,
        "settings": asdict(settings),
        "timer": timer_for(device),
        "dtype": _name(ours.model.dtype),
        "baseline_dtype": _name(baseline.model.dtype),
        "tokens_equal": same,
        "published": spreads(samples["published"])
        | {"passes": len(forwards), "tokens": sum(n for n, _ in forwards), "parts": _means(clocks)},
        "ours": spreads(samples["ours"])
        | {"passes": usage.forward_calls, "tokens": usage.forward_tokens, "parts": split["parts"]},
        "ratio": ratios(samples["published"], samples["ours"]),
        "rest": split["rest"],
        "timeline": as_rows(stages((agent.fastest or answer).trace)),
        "rates": rates.to_dict(),
        "limits": _shares(limit, split["parts"]),
        "spoken": spoken | {"chosen_on_device": chosen_ahead([answer])},
    }
    return found | {"aims": _aims(found, device, baseline is not ours)}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _stream(model: VPTForConditionalGeneration) -> int:
    """As many bytes as decoding reads, so that the caches help both alike; not more than 1 GiB."""
    costs = Costs.of(model)
    return int(min(2**30, max(2**26, costs.decode_bytes)))


def _splits(agent: Ours, count: int) -> dict[str, Any]:
    """Medians of the parts, and of what is no model arithmetic."""
    found = [agent.split() for _ in range(count + 1)][1:]
    parts = {name: Spread.of([p[name] for _, _, p in found]) for name in found[0][2]}
    rest = [sum(p[name] for name in REST) for _, _, p in found]
    shares = [own / total for own, (total, _, _) in zip(rest, found, strict=True)]
    turns = [own / split.turns for own, (_, split, _) in zip(rest, found, strict=True)]
    return {
        "parts": {name: spread.median for name, spread in parts.items()},
        "rest": {
            "share": Spread.of(shares).to_dict(),
            "seconds_per_turn": Spread.of(turns).to_dict(),
            "turns": found[0][1].turns,
        },
    }


def _spoken(answer: Answer, least: float) -> dict[str, float]:
    """Seconds in which the turns of one answer were decoded, with no clock between the stages, and
    the share of them that the model's arithmetic takes at ``least``. The clock of the parts looks
    at every pass, so it hides what the device does while nobody looks. On a GPU what was launched
    before a turn, and had not ended, counts to it."""
    seconds = sum(e.seconds for e in answer.trace.events if isinstance(e, Decoded))
    return {"seconds": seconds, "share": least / seconds if seconds else 0.0}


def _clocked(published: Published) -> Mapping[str, float]:
    device = published.loaded.model.device
    clock = Clock(device, timer_for(device))
    total = timed(partial(published.run, clock), device).by(clock.timer)
    return clock.seconds | {"rest": total - sum(clock.seconds.values())}


def _means(clocks: list[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(c[name] for c in clocks) / len(clocks) for name in clocks[0]}


def _limits(ours: Loaded, answer: Answer, rates: Rates) -> dict[str, float]:
    """Seconds that the parts of ``answer`` would take at the machine's own rates."""
    costs = Costs.of(ours.model)
    events = answer.trace.events
    seen = [e for e in events if isinstance(e, ImageEncoded) and not e.reused]
    vision = [costs.vision(e.grid[1] * e.grid[2]) for e in seen if e.grid]
    vision += [_tower(ours, e.encoder) for e in seen if not e.grid]
    first = len(_ids(next(e for e in events if isinstance(e, PromptRendered)).spans))
    told = len(_ids(next(e for e in events if isinstance(e, PerceptionAppended)).spans))
    turns = [len(_ids(e.spans)) for e in events if isinstance(e, Decoded)]
    # The first turn's start is fed alone, for the control state; its end goes with the result.
    called = [costs.block(1, first), costs.block(turns[0] - 2, first + 1, turns[0] - 2)]
    past = first + turns[0] + told
    words = [costs.block(1, past + i) for i in range(turns[1] - 1)]
    work = {
        "vision": vision,
        "prefill": [costs.block(first, 0)],
        "decode": [*called, *words],
        "append": [costs.block(told + 1, first + turns[0] - 1)],
    }
    return {name: sum(w.seconds(rates) for w in items) for name, items in work.items()}


def _tower(ours: Loaded, kind: str) -> Work:
    """An encoder of its own: its weights at every position, its attention left out."""
    module = ours.model.encoder(kind)
    row = ours.model.table[kind].kind
    assert module is not None
    assert row.input_size is not None
    weights = sum(p.numel() for p in module.parameters())
    patch = next(m for m in module.modules() if isinstance(m, torch.nn.Conv2d)).kernel_size[0]
    positions = (row.input_size // int(patch)) ** 2
    return Work(2.0 * weights * positions, float(weights * ours.model.dtype.itemsize))


def _shares(limit: Mapping[str, float], parts: Mapping[str, float]) -> dict[str, Any]:
    total = sum(parts.values())
    return {
        "seconds": dict(limit),
        "share": {name: limit[name] / parts[name] for name in limit if parts[name]},
        "share_of_all": sum(limit.values()) / total,
    }


def _aims(found: Mapping[str, Any], device: torch.device, other: bool) -> list[dict[str, Any]]:
    """Each aim with its figure, and whether it is met."""
    aim = 10.0 if device.type == "cuda" else 5.0 if other else 2.6
    # On a GPU the clock of the parts would hide what runs while nobody looks.
    decoded = found["spoken" if device.type == "cuda" else "limits"]["share"]
    decoded = decoded if device.type == "cuda" else decoded["decode"]
    name = f"times faster than the published procedure in {found['baseline_dtype']}"
    rows = [
        (name, found["ratio"][found["timer"]]["median"], aim, True),
        ("share that is no model arithmetic", found["rest"]["share"]["median"],
         OVERHEAD_SHARE, False),
        ("seconds a turn that are no model arithmetic",
         found["rest"]["seconds_per_turn"]["median"], OVERHEAD_SECONDS, False),
        ("decode, share of the bandwidth limit", decoded,
         DECODE_SHARE_CUDA if device.type == "cuda" else DECODE_SHARE, True),
    ]  # fmt: skip
    return [
        {"aim": text, "figure": figure, "wanted": wanted, "at_least": more,
         "met": figure >= wanted if more else figure <= wanted}
        for text, figure, wanted, more in rows
    ]  # fmt: skip
