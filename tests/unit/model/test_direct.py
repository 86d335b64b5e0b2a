"""The pass written out computes what transformers' classes compute, and steps aside where it
cannot: whole blocks, blocks behind others, ragged batches, one token of one row."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Tokens
from vpt_agent.model import VPTForConditionalGeneration
from vpt_agent.model.direct import DirectDecoder, times
from vpt_agent.model.patchconv import FEW, PatchProduct, patches_as_products
from vpt_agent.model.testing import tiny_model
from vpt_agent.vision.policy import ImagePolicy


@contextmanager
def ordinary(model: VPTForConditionalGeneration) -> Iterator[None]:
    """Inside, transformers computes."""
    model.direct_decoder = lambda: None  # type: ignore[method-assign]
    yield
    del model.direct_decoder


def conversation(model: VPTForConditionalGeneration) -> Tensor:
    """Logits of a prompt, a block behind it, ragged blocks of two rows, and single tokens."""
    engine = Engine(model, ImagePolicy())
    with torch.inference_mode():
        one, two = engine.session(), engine.session()
        seen = [one.append([Tokens(range(40, 60))], logits="all")]
        seen.append(one.append([Tokens(range(60, 67))], logits="all"))
        feeds = [one.feed([Tokens(range(5))], logits="all"),
                 two.feed([Tokens(range(9))], logits="all")]  # fmt: skip
        seen += [done[0].logits for done in engine.drive(feeds)]
        seen += [row.append([Tokens((token,))]) for token in (7, 8, 9) for row in (one, two)]
        feeds = [row.feed([Tokens((11,))]) for row in (one, two)]
        seen += [done[0].logits for done in engine.drive(feeds)]
    return torch.cat(seen)


def spread_positions(model: VPTForConditionalGeneration) -> Tensor:
    """Hidden states of a block whose three positions differ, as a picture's do."""
    cache = Engine(model, ImagePolicy()).cache
    row = cache.allocate()
    torch.manual_seed(1)
    embeds = torch.randn(1, 12, model.config.text_config.hidden_size).to(model.dtype)
    positions = torch.randint(0, 9, (3, 1, 12))
    with torch.inference_mode():
        mask = cache.begin([row], [12])
        return model.run_language_model(embeds, positions, mask, cache)


@pytest.mark.parametrize("base", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.06)])
def test_it_computes_the_same(base: str, dtype: torch.dtype, bound: float) -> None:
    model = tiny_model(("clip",), base=base)[0].to(dtype)
    used: list[int] = []
    whole = DirectDecoder.__call__

    def counted(self: DirectDecoder, *args: Any) -> Tensor:
        used.append(1)
        return whole(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectDecoder, "__call__", counted)
        found, spread = conversation(model), spread_positions(model)
    assert len(used) == 12
    with ordinary(model):
        wanted, plain = conversation(model), spread_positions(model)
    assert len(used) == 12
    # Relative to what the values are: logits of random weights reach some units.
    assert (found - wanted).abs().max() < bound * wanted.abs().max()
    assert (spread - plain).abs().max() < bound * plain.abs().max()


def test_a_half_type_is_no_further_from_float32_than_transformers_is() -> None:
    model = tiny_model(("clip",))[0]
    exact = conversation(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    ours = (conversation(half) - exact).abs().mean()
    with ordinary(half):
        theirs = (conversation(half) - exact).abs().mean()
    assert 0 < ours < 1.2 * theirs


def test_large_values_in_float16_stay_numbers() -> None:
    model = tiny_model(("clip",))[0].to(torch.float16)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data.fill_(8.0)
    cache = Engine(model, ImagePolicy()).cache
    row = cache.allocate()
    embeds = torch.full((1, 1, model.config.text_config.hidden_size), 3e4, dtype=torch.float16)
    with torch.inference_mode():
        assert model.direct_decoder() is not None
        mask = cache.begin([row], [1])
        hidden = model.run_language_model(embeds, torch.zeros(3, 1, 1).long(), mask, cache)
    assert hidden.isfinite().all()


def test_what_was_changed_is_computed_by_transformers() -> None:
    model = tiny_model(("clip",))[0]
    with torch.inference_mode():
        assert model.direct_decoder() is not None
    assert model.direct_decoder() is None  # gradients may be wanted
    with torch.inference_mode():
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        assert model.direct_decoder() is None
        handle.remove()
        assert model.direct_decoder() is not None

        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        before = conversation(model)
        old = model.model.layers[0].mlp.up_proj
        new = Doubled(old.in_features, old.out_features, bias=False)
        new.load_state_dict(old.state_dict())
        model.model.layers[0].mlp.up_proj = new
        assert model.direct_decoder() is None
        assert (conversation(model) - before).abs().max() > 1e-3


def test_weights_that_are_loaded_later_are_seen() -> None:
    model, other = tiny_model(("clip",))[0], tiny_model(("clip",), seed=1)[0]
    first = conversation(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(conversation(model), conversation(other))
    assert not torch.equal(conversation(model), first)


@pytest.mark.parametrize("change", [{"hidden_act": "gelu"}, {"_attn_implementation": "eager"}])
def test_what_it_does_not_know_it_leaves(change: dict[str, str]) -> None:
    text = tiny_model(("clip",))[0].model
    assert DirectDecoder.of(text) is not None
    for name, value in change.items():
        setattr(text.config, name, value)
    assert DirectDecoder.of(text) is None


def test_qwen3_vl_is_left_to_transformers() -> None:
    assert DirectDecoder.of(tiny_model(("clip",), base="qwen3_vl")[0].model) is None


def test_a_product_of_one_row_equals_one_of_many() -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(7))
    x = torch.randn(3, 1, 5)
    with torch.no_grad():
        many = times(x, weight, bias)
        assert torch.allclose(torch.cat([times(row[None], weight, bias) for row in x]), many)
        assert torch.allclose(times(x[:1], weight), x[:1] @ weight.T)
        assert times(x[0, 0], weight).shape == (7,)


def test_patches_as_products_are_the_convolution() -> None:
    visual = tiny_model(("clip",))[0].visual
    proj = visual.patch_embed.proj
    assert type(proj) is PatchProduct
    patches = torch.randn(5, 3, 2, 14, 14)
    wanted = nn.functional.conv3d(patches, proj.weight, stride=(2, 14, 14))
    assert torch.equal(proj(patches), wanted)  # the convolution itself, for so few
    many = torch.randn(FEW, 3, 2, 14, 14)
    grads = []
    for way in (proj, lambda x: nn.functional.conv3d(x, proj.weight, stride=(2, 14, 14))):
        proj.weight.grad = None
        way(many).square().sum().backward()
        grads.append(proj.weight.grad)
    assert torch.equal(proj(many).flatten(1), many.flatten(1) @ proj.weight.flatten(1).T)
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-3)
    larger = torch.randn(1, 3, 2, 28, 28)  # several patches: a convolution again
    with torch.inference_mode():
        flat = nn.functional.linear(patches.flatten(1), proj.weight.flatten(1))
        assert torch.equal(proj(patches).flatten(1), flat)
        assert torch.allclose(proj(patches), wanted, atol=1e-5)
        assert proj(larger).shape == (1, proj.out_channels, 1, 2, 2)
    padded = nn.Conv3d(3, 4, 2, padding=1)
    patches_as_products(nn.ModuleDict({"patch_embed": nn.ModuleDict({"proj": padded})}))
    assert type(padded) is nn.Conv3d


@pytest.mark.parametrize("rows", [1, 7, 8, 16, 64, 65])
@pytest.mark.parametrize("biased", [True, False])
def test_products_of_any_number_of_rows_are_those_of_torch(rows: int, biased: bool) -> None:
    linear = nn.Linear(40, 24, bias=biased)
    x = torch.randn(rows, 1, 40)
    with torch.no_grad():
        made = times(x, linear.weight, linear.bias)
        torch.testing.assert_close(made, linear(x), atol=1e-5, rtol=0)
    assert made.is_contiguous()
