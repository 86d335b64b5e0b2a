"""From a checkpoint to the parts of an agent."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vpt_agent.agent.plan import Abilities
from vpt_agent.config import shipped_model
from vpt_agent.engine.ahead import check_decoding
from vpt_agent.engine.options import EngineOptions
from vpt_agent.errors import CheckpointError, InternalError, UserError
from vpt_agent.prompt.vpt import Tokenizer
from vpt_agent.vision.policy import ImagePolicy

if TYPE_CHECKING:
    from vpt_agent.agent.dispatch import Dispatcher
    from vpt_agent.agent.written_surface import WrittenDialect
    from vpt_agent.engine.core import Engine, LanguageModel
    from vpt_agent.model import VPTForConditionalGeneration
    from vpt_agent.model.chat.load import StockParts


@dataclass(frozen=True)
class Parts:
    """What an agent is made of; ``stock`` if its model is one that writes calls as JSON."""

    model: LanguageModel
    tokenizer: Tokenizer
    policy: ImagePolicy
    abilities: Abilities
    max_positions: int
    stock: StockParts | None = None


@dataclass(frozen=True)
class StockOptions:
    """What is said of stock models only: the frame of their boxes, the area of a picture at most,
    their chat template (None: as the family and the checkpoint have it), and whether their calls
    are constrained by the tools' schemas."""

    coordinates: str | None = None
    max_pixels: int | None = None
    chat_template: str | None = None
    constrained: bool = True


def check_engine(decoding: str, options: object, max_cached_tokens: object) -> None:
    """Raise :class:`UserError` for what no engine can be made with, before a model is loaded."""
    check_decoding(decoding)
    if not isinstance(options, EngineOptions):
        raise UserError(
            "options must be EngineOptions(...)",
            where="options",
            got=repr(options),
            fix="from vpt_agent.engine import EngineOptions, or leave options out",
        )
    number = isinstance(max_cached_tokens, int) and not isinstance(max_cached_tokens, bool)
    if max_cached_tokens is not None and not number:
        raise UserError(
            "the KV cache budget must be a whole number of tokens",
            where="max_cached_tokens",
            got=repr(max_cached_tokens),
            fix="leave it out for a cache without a budget",
        )


def load_parts(
    name: str | Path | None,
    *,
    device: str,
    dtype: str,
    encoders: Sequence[str] | None,
    say: Callable[[str], None],
    options: StockOptions = StockOptions(),
    weights: str = "own",
) -> Parts:
    """Load a checkpoint; see :meth:`PerceptionAgent.from_pretrained`."""
    say("loading torch and transformers")
    from vpt_agent.model import VPTForConditionalGeneration, VPTProcessor
    from vpt_agent.model.checkpoint import find_checkpoint
    from vpt_agent.model.weights import check_weights, use_weights

    check_weights(weights)

    place = _device(device)
    kind = _dtype(dtype, place)
    path = shipped_model() if name is None else find_checkpoint(name)
    say(f"reading {path}")
    if encoders is None and is_stock(path):
        if weights != "own":
            raise UserError(
                "weights of eight bits are for models with perception tokens",
                where=name,
                got=f"a stock model, weights={weights!r}",
                fix="leave weights out",
            )
        return _load_stock(path, str(name), place, kind, options)
    if options != StockOptions():
        raise UserError(
            "coordinates, max_pixels, chat_template and constrained are for stock models",
            where=name or "nano (shipped)",
            got="a model with perception tokens",
            fix="leave them out",
        )
    kwargs: dict[str, Any] = {} if encoders is None else {"encoders": list(encoders)}
    model = VPTForConditionalGeneration.from_pretrained(path, dtype=kind, **kwargs)
    processor = VPTProcessor.from_pretrained(path, config=model.config)
    say(f"moving the model to {place}")
    model.to(place).eval()
    use_weights(model, weights)
    return parts_of(model, processor.tokenizer, "nano (shipped)" if name is None else str(name))


def is_stock(folder: Path) -> bool:
    """Whether a checkpoint is a stock model of pictures and text: it has no perception kinds."""
    from vpt_agent.model.chat.load import is_stock_type

    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return False  # the checkpoint's own reader says what is wrong with it
    return isinstance(data, dict) and is_stock_type(data.get("model_type"))


def _load_stock(
    folder: Path, name: str, place: torch.device, dtype: torch.dtype | str, options: StockOptions
) -> Parts:
    from vpt_agent.model.chat.load import load_stock
    from vpt_agent.tool.habits import check_coordinates

    frame = None if options.coordinates is None else check_coordinates(options.coordinates)
    stock = load_stock(
        folder,
        device=place,
        dtype=dtype,
        max_pixels=options.max_pixels,
        coordinates=frame,
        chat_template=options.chat_template,
    )
    return stock_as_parts(stock, name)


def stock_as_parts(stock: StockParts, name: str) -> Parts:
    """Parts of a stock model in memory."""
    abilities = Abilities(name=name)
    return Parts(stock.model, stock.tokenizer, stock.policy, abilities, stock.max_positions, stock)


def stock_dialect(
    parts: Parts, *, constrained: bool
) -> Callable[[Engine, Dispatcher], WrittenDialect]:
    """How an agent talks with a stock model; ``constrained`` needs the extra ``json``, and says so
    at once."""
    from vpt_agent.agent.written_surface import WrittenDialect
    from vpt_agent.engine.vocabulary import Vocabulary
    from vpt_agent.tool.habits import Habit

    stock = parts.stock
    if stock is None:
        raise InternalError("a model with perception tokens has another dialect")
    layout = stock.layout
    vocabulary = Vocabulary(stock.tokenizer, end=layout.end) if constrained else None
    habit = Habit(stock.coordinates)

    def make(engine: Engine, dispatcher: Dispatcher) -> WrittenDialect:
        return WrittenDialect(layout, engine, dispatcher, parts.abilities, habit, vocabulary)

    return make


def parts_of(model: VPTForConditionalGeneration, tokenizer: Tokenizer, name: str) -> Parts:
    """Parts of a model in memory; its config's ``perception`` says what it can do."""
    perception = model.config.perception
    if perception is None:
        raise CheckpointError(
            "this model has no perception kinds",
            where=name,
            fix="load it with encoders=[...] to make a VPT model of it",
        )
    abilities = Abilities(
        name=name,
        trigger=perception["trigger"],
        untrained=tuple(perception.get("untrained", ())),
        regions=perception["regions"],
        domain=perception.get("domain", ""),
        contracts=perception.get("tools", {}),
    )
    policy = ImagePolicy.from_manifest(perception["images"])
    text = model.config.get_text_config()
    return Parts(model, tokenizer, policy, abilities, text.max_position_embeddings)


def _device(device: str) -> torch.device:
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(
            "unknown device", got=device, expected="auto, cpu, cuda, cuda:0, mps"
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "this machine, or this build of torch, has no CUDA device",
            got=device,
            fix="use device='auto' or 'cpu'",
        )
    return place


def _dtype(dtype: str, place: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        # bf16 arithmetic is a GPU's choice; on a CPU float32 is the exact one.
        return torch.float32 if place.type == "cpu" else "auto"
    known = {"float32", "bfloat16", "float16"}
    if dtype not in known:
        raise UserError("unknown dtype", got=dtype, expected=f"auto, {', '.join(sorted(known))}")
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen
