"""Stock models behind the engine compute what transformers computes (X1), in any pieces (X2), in
any company (X3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.unit.model.chat.conftest import Stock, made, picture
from vpt_agent.engine.decode import TurnRules, decode_turn
from vpt_agent.engine.parts import Part, Tokens
from vpt_agent.engine.sampling import Sampler, Sampling
from vpt_agent.errors import CheckpointError, UserError
from vpt_agent.model.chat.qwen import StockQwen
from vpt_agent.model.chat.testing import tiny_stock
from vpt_agent.tokens.grammar import Grammar
from vpt_agent.vision.patches import look
from vpt_agent.vision.policy import ImagePolicy


def rules(engine, count: int, end: int = -1) -> TurnRules:
    return TurnRules(
        grammar=Grammar(engine.table),
        end=end,
        stop=frozenset({end}),
        starts=frozenset(),
        max_new_tokens=count,
        max_calls=0,
    )


def single(part: Part) -> list[Part]:
    return [Tokens([i]) for i in part.ids] if isinstance(part, Tokens) else [part]


@pytest.mark.parametrize("how", ["whole", "parts", "tokens"])
@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_pieces_equal_transformers_forward(
    stock: Stock, pictures: int, how: str, figures: Callable[..., None]
) -> None:
    engine = stock.engine()
    parts = stock.conversation(engine, 1, pictures)
    pieces = {
        "whole": [parts],
        "parts": [[p] for p in parts],
        "tokens": [[q] for p in parts for q in single(p)],
    }[how]
    session = engine.session()
    ours = torch.cat([session.append(p, logits="all") for p in pieces])
    with torch.no_grad():
        theirs = stock.net(**stock.inputs(parts, 1)).logits[0].float()
    figures(
        "stock models: largest difference of logits to transformers",
        model=stock.net.config.model_type,
        pictures=pictures,
        how=how,
        logits=float((ours - theirs).abs().max()),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_batch_equals_single_runs(stock: Stock) -> None:
    def story(engine, number: int):
        session = engine.session()
        parts = stock.conversation(engine, number, number % 3)
        yield from session.feed(parts[:1])
        fed = yield from session.feed(parts[1:])
        sampler = Sampler(Sampling(temperature=1.0, seed=number))
        turn = yield from decode_turn(
            session, fed[-1].logits[-1], sampler, rules(engine, 4 + 2 * number)
        )
        return fed[-1].logits[-1], [i for span in turn.spans for i in span.ids]

    alone = []
    for number in range(1, 5):
        engine = stock.engine()
        alone += engine.drive([story(engine, number)])
    engine = stock.engine()
    together = engine.drive([story(engine, number) for number in range(1, 5)])
    for (logits_a, ids_a), (logits_b, ids_b) in zip(alone, together, strict=True):
        torch.testing.assert_close(logits_b, logits_a, atol=1e-4, rtol=0)
        assert ids_b == ids_a
    assert max(engine.counters.rows_per_forward) == 4, "rows did share forwards"


def test_greedy_tokens_are_those_of_generate(stock: Stock) -> None:
    engine = stock.engine()
    session = engine.session()
    parts = stock.conversation(engine, 2, 2)
    logits = session.append(parts)[-1]
    turn = engine.drive([decode_turn(session, logits, Sampler(Sampling()), rules(engine, 12))])[0]
    inputs = stock.inputs(parts, 2)
    length = inputs["input_ids"].shape[1]
    theirs = stock.net.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert [i for span in turn.spans for i in span.ids] == theirs[0, length:].tolist()


def test_sessions_fork_and_truncate(stock: Stock) -> None:
    engine = stock.engine()
    session = engine.session()
    session.append(stock.conversation(engine, 1, 1))
    length = len(session)
    tail = [Tokens(stock.ids(" again"))]
    wanted = session.append(tail, logits="all")
    session.truncate(length)
    torch.testing.assert_close(session.fork().append(tail, logits="all"), wanted, atol=1e-5, rtol=0)


def test_features_are_computed_once(stock: Stock) -> None:
    engine = stock.engine()
    view = picture(3)
    first, again = engine.look("base", [view]), engine.look("base", [view])
    assert not first[0].reused
    assert again[0].reused
    assert again[0].tokens is first[0].tokens


@pytest.mark.parametrize(
    ("width", "height"), [(90, 60), (30, 30), (700, 31), (28, 42), (640, 480), (9, 300), (1500, 10)]
)
@pytest.mark.parametrize("patch", [14, 16])
def test_pictures_are_resized_as_by_the_stock_processor(
    patch: int, width: int, height: int
) -> None:
    size = {"shortest_edge": 3136, "longest_edge": 200_000}
    theirs = Qwen2VLImageProcessorPil(patch_size=patch, size=size)
    view = picture(5, width, height)
    wanted = theirs(images=[np.asarray(view.image)], return_tensors="pt")
    policy = ImagePolicy(kind="native", patch=patch, min_pixels=3136, max_pixels=200_000)
    ours = look([view], policy)
    assert ours.grid_thw.tolist() == wanted["image_grid_thw"].tolist()
    # Pixels are rounded to whole numbers after resizing: half a step of 1/255/std is noise.
    torch.testing.assert_close(ours.pixel_values, wanted["pixel_values"], atol=0.02, rtol=0)


def test_an_extreme_picture_is_squeezed_and_not_refused() -> None:
    plan = ImagePolicy(kind="native").plan((3000, 10))
    assert plan.pre_sizes == ((1800, 10),)
    assert plan.visual_tokens > 0


def test_eager_attention_computes_the_same(stock: Stock) -> None:
    engine = stock.engine()
    parts = stock.conversation(engine, 1, 1)
    wanted = engine.session().append(parts, logits="all")
    eager, _ = tiny_stock(stock.net.config.model_type)
    eager.set_attn_implementation("eager")
    other = Stock(eager, stock.tokenizer, stock.policy)
    session = other.engine().session()
    pieces = [session.append([part], logits="all") for part in parts]
    torch.testing.assert_close(torch.cat(pieces), wanted, atol=1e-4, rtol=0)


def test_attention_without_masks_is_refused() -> None:
    net, _ = tiny_stock("qwen2_vl")
    net.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UserError, match=r"takes no masks.*flash_attention_2.*'sdpa'"):
        StockQwen(net)


def test_perception_kinds_are_refused() -> None:
    model = StockQwen(made("qwen2_vl").net)
    for call in (
        lambda: model.encode("dino"),
        lambda: model.features_from_base("clip", torch.zeros(1, 1)),
        lambda: model.condition("clip", torch.zeros(1, 1), torch.zeros(1, 1)),
    ):
        with pytest.raises(UserError, match="a stock model has no perception kinds"):
            call()


def test_layers_with_a_window_are_refused() -> None:
    net, _ = tiny_stock(
        "qwen2_5_vl", use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    with pytest.raises(CheckpointError, match="see a window of the conversation only"):
        StockQwen(net)


def test_a_tower_with_other_features_is_refused() -> None:
    net, _ = tiny_stock("qwen3_vl")
    model = StockQwen(net)
    model.deep = 3
    patches = look([picture(1)], made("qwen3_vl").policy)
    with pytest.raises(CheckpointError, match="other features than its config says"):
        model.encode_images(patches.pixel_values, patches.grid_thw)
