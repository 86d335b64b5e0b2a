"""The routine in C computes one token as torch does, and steps aside where it cannot."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vpt_agent.bench.answer import Loaded, Ours, Settings, picture
from vpt_agent.engine.core import Engine
from vpt_agent.engine.parts import Tokens
from vpt_agent.errors import MissingExtraError
from vpt_agent.model import VPTForConditionalGeneration, compiled
from vpt_agent.model.direct import times
from vpt_agent.model.testing import tiny_model
from vpt_agent.trace import Decoded
from vpt_agent.vision.policy import ImagePolicy

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counted:
    """How many tokens the routine computed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        compiled.use()
        library = compiled.active()
        assert library is not None
        self.tokens = 0
        self._inner = library.one_row
        patch.setattr(compiled, "_library", compiled.Library(self, library.times))

    def __call__(self, *args: object) -> None:
        self.tokens += 1
        self._inner(*args)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    yield Counted(monkeypatch)
    compiled.use(False)


def said(model: VPTForConditionalGeneration, *, wanted: bool, scattered: bool = False) -> Tensor:
    """Logits of single tokens behind a prompt. ``scattered``: in blocks that are no neighbours."""
    engine = Engine(model, ImagePolicy(), block=16)
    row, other = engine.session(), engine.session()
    with compiled.using(wanted):
        row.append([Tokens(range(40, 53))])
        if scattered:
            other.append([Tokens(range(20))])
        found = [row.append([Tokens((token,))]) for token in (7, 90, 8, 9, 11, 12)]
        fresh = engine.session()
        found.append(fresh.append([Tokens((5,))]))  # sees itself only
    return torch.cat(found)


@pytest.mark.parametrize("base", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("scattered", [False, True])
def test_tokens_in_float32_are_those_of_torch(counted: Counted, base: str, scattered: bool) -> None:
    model = tiny_model(("clip",), base=base)[0]
    wanted = said(model, wanted=False, scattered=scattered)
    assert counted.tokens == 0
    found = said(model, wanted=True, scattered=scattered)
    assert counted.tokens == 7
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert not torch.equal(found, wanted)  # sums in another order


def test_tokens_in_bfloat16_are_no_further_from_float32_than_torchs(counted: Counted) -> None:
    model = tiny_model(("clip",))[0]
    exact = said(model, wanted=False)
    half = model.to(torch.bfloat16)
    theirs = (said(half, wanted=False) - exact).abs().mean()
    ours = (said(half, wanted=True) - exact).abs().mean()
    assert counted.tokens == 7
    assert 0 < ours < 1.1 * theirs


def test_a_cast_model_turns_far_tokens_as_transformers_does() -> None:
    """Its speeds are in its type; the product with a position must not be rounded to it."""
    model = tiny_model(("clip",))[0].to(torch.bfloat16)
    at = torch.full((3, 1, 2), 301)
    with torch.inference_mode():
        direct = model.direct_decoder()
        assert direct is not None
        cos, _ = direct.angles(at, torch.float32)
        wanted = model.model.rotary_emb(torch.zeros(1, 2, 1), at)[0]
    wanted = wanted.reshape(-1, 2, wanted.shape[-1])[0, :, : cos.shape[-1]]
    assert torch.allclose(cos[0, :, 0], wanted, atol=1e-6)


def test_weights_that_are_loaded_cast_or_replaced_later_are_seen(counted: Counted) -> None:
    model, other = tiny_model(("clip",))[0], tiny_model(("clip",), seed=1)[0]
    first = said(model, wanted=True)
    model.load_state_dict(other.state_dict())
    assert torch.equal(said(model, wanted=True), said(other, wanted=True))
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(2 * down.weight.detach())
    changed = said(model, wanted=True)
    assert not torch.allclose(changed, said(other, wanted=True))
    assert torch.allclose(changed, said(model, wanted=False), atol=1e-4)
    assert not torch.equal(first, changed)
    count = counted.tokens
    model.to(torch.bfloat16)
    said(model, wanted=True)
    assert counted.tokens == count + 7


def test_what_it_does_not_know_torch_computes(counted: Counted) -> None:
    model = tiny_model(("clip",))[0]
    gate = model.model.layers[0].mlp.gate_proj
    gate.bias = nn.Parameter(torch.zeros(gate.out_features))
    wanted = said(model, wanted=False)
    assert torch.allclose(said(model, wanted=True), wanted, atol=1e-5)  # the output head's sums
    assert counted.tokens == 0
    gate.bias = None
    gate.weight = nn.Parameter(gate.weight.detach().t().contiguous().t())  # another layout
    said(model, wanted=True)
    assert counted.tokens == 0
    torch.set_num_threads(2)
    assert compiled.active() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_one_row(counted: Counted, dtype: torch.dtype) -> None:
    weight, row = torch.randn(7, 80).to(dtype), torch.randn(80).to(dtype)
    found = compiled.times(weight, row)
    assert found is not None
    torch.testing.assert_close(found, weight.float() @ row.float(), atol=1e-4, rtol=0)
    assert compiled.times(torch.randn(7, 90), torch.randn(90)) is None  # not whole vectors
    assert compiled.times(weight.half(), row.half()) is None
    assert compiled.times(torch.randn(80, 7).t().to(dtype), row) is None
    with torch.no_grad():
        made = times(row[None], nn.Parameter(weight))
    assert made.dtype == dtype
    assert torch.equal(made[0], found.to(dtype))


def test_numbers_that_overflow_or_are_none(counted: Counted) -> None:
    model = tiny_model(("clip",))[0]
    model.model.layers[0].mlp.gate_proj.weight.data *= 1e4  # the sigmoid's both ends
    found, wanted = said(model, wanted=True), said(model, wanted=False)
    assert found.isfinite().all()
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    assert said(model, wanted=True).isnan().all()


def test_the_trace_says_what_computed(counted: Counted) -> None:
    loaded = Loaded(*tiny_model(("clip",)))
    ways = []
    for wanted in (True, False):
        asked = Settings(image=84, new_tokens=6, compiled=wanted)
        ours = Ours(loaded, asked, picture(84))
        answer = ours.run()
        ours.close()
        told = [e.kernels for e in answer.trace.events if isinstance(e, Decoded)]
        ways.append((answer.text, answer.trace.record().ids, answer.usage.forward_tokens))
        assert told == ([(compiled.KERNEL,)] * 2 if wanted else [(), ()])
    assert ways[0] == ways[1]


def test_a_model_that_was_cast_writes_nothing_behind_its_cache(counted: Counted) -> None:
    model = tiny_model(("clip",))[0].to(torch.bfloat16)
    row = Engine(model, ImagePolicy()).session()
    row.append([Tokens(range(40, 53))])
    model.to(torch.float32)  # four bytes a number, where the cache has two
    with compiled.using(), pytest.raises(RuntimeError, match="same dtype"):
        row.append([Tokens((7,))])
    assert counted.tokens == 0


def test_no_row_at_all(counted: Counted) -> None:
    model = tiny_model(("clip",))[0]
    nothing = torch.empty(0, model.config.get_text_config().hidden_size)
    with torch.inference_mode():
        assert model.compute_logits(nothing).shape == (0, model.lm_head.out_features)
    assert compiled.times(torch.randn(7, 80), torch.empty(0)) is None
    assert compiled.times(torch.randn(7, 80), torch.randn(64)) is None


@pytest.mark.parametrize("trouble", ["folder", "slow", "not executable"])
def test_a_place_where_nothing_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trouble: str
) -> None:
    def late(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("cc", 120)

    def refused(*_: object) -> None:
        raise OSError("failed to map segment: Operation not permitted")

    monkeypatch.setattr(compiled, "_library", None)
    if trouble == "folder":
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing"))
    elif trouble == "slow":
        monkeypatch.setattr(subprocess, "run", late)
    else:
        monkeypatch.setattr(ctypes, "CDLL", refused)
    with pytest.raises(MissingExtraError, match=r"cannot be compiled or loaded here.*TMPDIR"):
        compiled.use()
    assert compiled.active() is None


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "_library", None)
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(MissingExtraError, match=r"there is no C compiler.*no-such-compiler -O2"):
        compiled.use()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho cannot do that >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(MissingExtraError, match=r"cannot compile the routines.*cannot do that"):
        compiled.use()
    assert compiled.active() is None
    monkeypatch.setenv("CC", os.environ.get("CC_BEFORE", "cc" if shutil.which("cc") else "gcc"))
    with compiled.using():
        assert compiled.active() is not None
    assert compiled.active() is None


def test_several_threads_are_warned_of() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match=r"one CPU thread, and torch has 2"):
            compiled.use()
        assert compiled.active() is None
    finally:
        compiled.use(False)
        torch.set_num_threads(before)
