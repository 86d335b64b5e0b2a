"""The step asks nobody: no value is read back, and nothing comes from the host's memory.

On the ``meta`` device tensors have shapes and no values: a step that decides by a value, or takes
in a tensor of the host, cannot run there. Recording it as a CUDA graph needs the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.engine.conftest import Kit
from tests.unit.engine.test_ahead import assert_same, engine_of, rules, tell
from vpt_agent.bench.shapes import TextShape, VisionShape, random_model
from vpt_agent.engine.ahead import weights_of
from vpt_agent.engine.cache import PooledCache
from vpt_agent.engine.core import Engine, kv_shape
from vpt_agent.engine.device_step import Row, SteppedCache, Stepper
from vpt_agent.engine.device_tables import Tables
from vpt_agent.engine.sampling import Sampling
from vpt_agent.errors import InternalError
from vpt_agent.model.onestep import pack_for_steps
from vpt_agent.model.testing import tiny_model

MODES = ("greedy", "sampled", "filtered")


class Places(TorchDispatchMode):
    """Notes every operator that takes or gives a tensor of the host, or reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.wrong: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += 1
        flat = torch.utils._pytree.tree_leaves((args, kwargs, out))
        if any(isinstance(t, Tensor) and t.device.type == "cpu" for t in flat):
            self.wrong.append(str(func))
        return out


class Launches(TorchDispatchMode):
    """Counts operators that compute; ``reshape`` is half a view, and left out, too."""

    views = frozenset({
        "view", "select", "slice", "unsqueeze", "squeeze", "transpose", "permute", "expand", "t",
        "split", "chunk", "alias", "detach", "as_strided", "reshape", "_unsafe_view",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self.count += func.overloadpacket.__name__ not in self.views
        return func(*args, **(kwargs or {}))


def stepper_of(model: Any, mode: Any, rows: int = 2) -> Stepper:
    cache = PooledCache(kv_shape(model))
    cache.reserve(cache.allocate(), 40)
    tables = Tables(model.config.text_config.vocab_size, frozenset({3}), model.device)
    return Stepper(model, cache, tables, rows=rows, slots=128, steps=16, mode=mode)


@pytest.mark.parametrize("base", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_needs_no_values(base: str, dtype: torch.dtype) -> None:
    model, _ = tiny_model(("clip",), base=base)
    model.to(dtype).to("meta")
    for mode in MODES:
        stepper = stepper_of(model, mode)
        with torch.inference_mode(), Places() as places:
            stepper.step()
        assert places.count > 100
        assert not places.wrong


def test_a_step_that_reads_a_value_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_model(("clip",))
    model.to("meta")
    real = model.compute_logits

    def curious(hidden: Tensor) -> Tensor:
        return real(hidden) if float(hidden.sum()) > 0 else real(-hidden)

    monkeypatch.setattr(model, "compute_logits", curious)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="meta"):
        stepper_of(model, "greedy").step()

    def forgetful(hidden: Tensor) -> Tensor:
        return real(hidden) + torch.ones(1)

    monkeypatch.setattr(model, "compute_logits", forgetful)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="device"):
        stepper_of(model, "greedy").step()


def test_buffers_stay_where_they_are() -> None:
    model, _ = tiny_model(("clip",))
    stepper = stepper_of(model, "filtered")
    tensors = {n: t for n, t in vars(stepper).items() if isinstance(t, Tensor)}
    tensors |= {n: t for n, t in vars(stepper.tables).items() if isinstance(t, Tensor)}
    places = {n: t.data_ptr() for n, t in tensors.items()}
    with torch.inference_mode():
        stepper.load([], 0)
        said = stepper.run(8, 4)
    owners = vars(stepper) | vars(stepper.tables)
    assert {n: owners[n].data_ptr() for n in places} == places
    assert said.steps == 4, "rows that are missing have stopped: the host sees it at its first look"
    assert bool((said.choices[:, :, 0] == -1).all())


def test_a_recorded_step_relies_on_modules_and_weights() -> None:
    model, _ = tiny_model(("clip",))
    before = weights_of(model)
    assert before is not None
    assert weights_of(model) == before
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    assert weights_of(model) is None
    hook.remove()
    wrapped = model.model.layers[0].mlp
    wrapped.forward = wrapped.forward
    assert weights_of(model) is None, "as accelerate wraps what it moves"
    del wrapped.forward
    assert weights_of(model) == before
    model.model.norm.weight.data = model.model.norm.weight.data.clone()
    assert weights_of(model) not in (None, before)
    moved = weights_of(model)
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp)
    assert weights_of(model) != moved


def test_attention_outside_a_step_is_our_fault() -> None:
    model, _ = tiny_model(("clip",))
    view = SteppedCache(PooledCache(kv_shape(model)))
    assert view.get_mask_sizes(1, 0) == (0, 0)
    view.cache.reserve(view.cache.allocate(), 1)
    with pytest.raises(InternalError, match="attention ran outside a step"):
        view.update(torch.zeros(1), torch.zeros(1), 0)


@pytest.mark.parametrize("base", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_lie_together_give_the_same(base: str, dtype: torch.dtype) -> None:
    model, _ = tiny_model(("clip",), base=base, seed=5)
    model.to(dtype)
    own = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in own.items()}
    said = []
    for packed in (False, True):
        if packed:
            assert pack_for_steps(model)
        stepper = stepper_of(model, "greedy", rows=3)
        rows = [
            Row(token=5 + r, position=20 + r, length=r, steps=9, room=9, state=1, calls=1,
                blocks=[r], hidden=None)
            for r in range(3)
        ]  # fmt: skip
        for keys in (*stepper.cache.keys, *stepper.cache.values):
            keys.copy_(torch.randn(keys.shape, generator=torch.Generator().manual_seed(1)))
        with torch.inference_mode():
            stepper.load(rows, 47)
            stepper.step()
        said.append((stepper.hidden.float().clone(), stepper.cache.keys[1].float().clone()))
    bound = 1e-5 if dtype == torch.float32 else 0.06
    for got, wanted in zip(said[1], said[0], strict=True):
        assert float((got - wanted).abs().max()) < bound * max(1.0, float(wanted.abs().max()))
    assert dict(model.named_parameters()).keys() == own.keys()
    assert all(p is own[name] for name, p in model.named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    # Once is enough, until somebody moves them.
    whole = model.direct_decoder
    with torch.no_grad():
        lying = whole().packed["steps"]
        assert pack_for_steps(model)
        assert whole().packed["steps"] is lying
        query = model.model.layers[0].self_attn.q_proj.weight
        query.data = query.data.clone()
        assert not lying.current()
        assert pack_for_steps(model)
        assert whole().packed["steps"] is not lying


def test_a_model_that_was_moved_is_computed_as_it_is(one: Kit) -> None:
    """Weights that lay together are forgotten when the model has others."""
    model, processor = tiny_model(("clip",), seed=7)
    kit = Kit(model, processor.tokenizer, Engine(model, one.policy), one.policy)
    assert pack_for_steps(model)
    for parameter in model.parameters():
        parameter.data = 1.25 * parameter.data
    run = ("text", Sampling(), rules(kit))
    (ours,) = tell(engine_of(kit, "device"), kit, run)
    (theirs,) = tell(engine_of(kit, "host"), kit, run)
    assert_same(ours, theirs)
    assert ours[0].ahead > 0


def test_other_layers_are_left_alone() -> None:
    model, _ = tiny_model(("clip",), base="qwen3_vl")
    assert not pack_for_steps(model)
    plain, _ = tiny_model(("clip",))
    hook = plain.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not pack_for_steps(plain)
    hook.remove()
    assert pack_for_steps(plain)


def test_packed_weights_are_saved_and_loaded_as_ever(tmp_path: Path) -> None:
    model, _ = tiny_model(("clip",), seed=6)
    assert pack_for_steps(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_few_kernels_a_layer() -> None:
    """Operators of one more layer, views left out: what a GPU launches."""
    counts = []
    for packed in (False, True):
        found = []
        for depth in (2, 3):
            text = TextShape(64, depth, 4, 2, 128, 512, (2, 3, 3))
            model, _ = random_model(text, VisionShape(1, 32, 2), dtype=torch.bfloat16)
            model.to("meta")
            if packed:
                assert pack_for_steps(model)
            with torch.inference_mode(), Launches() as seen:
                stepper_of(model, "greedy").step()
            found.append(seen.count)
        counts.append(found[1] - found[0])
    assert counts[0] > 30
    assert counts[1] < 22
