"""X1: the forward's logits, loss, states and gradients equal the release's (float32, 1e-4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tests.parity.goldens import MODES, Golden, golden, train_modes
from vpt_agent.model import VPTForConditionalGeneration

TOLERANCE = 1e-4


@cache
def model_of(variant: str) -> VPTForConditionalGeneration:
    return VPTForConditionalGeneration.from_pretrained(golden(variant).path, dtype=torch.float32)


def _apart(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.detach().float() - expected.float()).abs().max())


@pytest.mark.parametrize(("variant", "case", "mode"), train_modes())
def test_forward_equals_the_release(
    variant: str, case: str, mode: str, figures: Callable[..., None]
) -> None:
    gold, model = golden(variant), model_of(variant)
    for name, value in (MODES[mode] | {"para_mask_ratio": 1.0}).items():
        setattr(model.config, name, value)
    inputs = gold.inputs(case)
    if mode.endswith("mrope"):
        inputs["position_ids"] = gold.mrope(case)
    norms = gold.meta["cases"][case]["modes"][mode].get("grad_norms")
    seen: dict[str, list[Tensor]] = {"hidden": [], "embeds": []}
    with _watched(model.model, seen), torch.set_grad_enabled(bool(norms)):
        output = model(**inputs)

    def expected(key: str) -> Tensor | None:
        return gold.value(case, mode, key)

    columns = gold.expected[f"{case}/logit_positions"].long()
    loss = gold.expected[f"{case}/{mode}/loss"]
    apart: dict[str, float] = {"loss": _apart(output.loss[None], loss)}
    first = seen["hidden"][0]
    columns_first = columns[columns < first.shape[1]]
    got = {
        "logits": output.logits[:, columns],
        "prompt": output.controls,
        "proj_out": output.features,
        "inputs_embeds_last": seen["embeds"][-1][:, columns],
    }
    for key, value in got.items():
        want = expected(key)
        if want is not None:
            assert value is not None, key
            apart[key] = _apart(value, want)
    if (want := expected("hidden_first_pass")) is not None:
        # Our first pass stops where the last control state is read; the rest does not matter.
        apart["hidden_first_pass"] = _apart(first[:, columns_first], want[:, : len(columns_first)])
    if (want := expected("encoder_out")) is not None:
        apart["encoder"] = _apart(torch.cat(_encoded(model, variant, inputs)), want.flatten(0, -2))
    if (want := expected("encoder_out_sub")) is not None:
        maps = torch.stack(_encoded(model, variant, inputs))
        apart["encoder"] = _apart(maps[:, ::4, ::8, ::8], want)
    if norms:
        model.zero_grad()
        output.loss.backward()
        apart["gradients"] = _gradients_apart(model, gold, f"{case}/{mode}", norms)
    figures(
        f"parity with the release, {variant.split('_')[0]}",
        case=f"{variant}/{case}/{mode}",
        **apart,
    )
    assert max(apart.values()) <= TOLERANCE, apart


def _encoded(
    model: VPTForConditionalGeneration, variant: str, inputs: dict[str, Tensor]
) -> list[Tensor]:
    """What the variant's own encoder gives, before the projector."""
    kind = variant.split("_")[0]
    names = {
        "clip": {"pixel_values": "clip_pixel_values", "grid_thw": "clip_images_grid_thw"},
        "dino": {"pixels": "detection_images"},
        "sam": {"pixels": "seg_images"},
    }[kind]
    with torch.no_grad():
        return list(model.run_tower(kind, **{k: inputs[v] for k, v in names.items()}))


class _watched:  # noqa: N801 - used as a function
    """Collects the language model's inputs and outputs while it is open."""

    def __init__(self, module: nn.Module, seen: dict[str, list[Tensor]]) -> None:
        self.module, self.seen = module, seen

    def __enter__(self) -> None:
        def hook(_: nn.Module, args: object, kwargs: dict[str, Tensor], output: object) -> None:
            self.seen["embeds"].append(kwargs["inputs_embeds"].detach())
            self.seen["hidden"].append(output.last_hidden_state.detach())  # type: ignore[attr-defined]

        self.handle = self.module.register_forward_hook(hook, with_kwargs=True)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _gradients_apart(
    model: VPTForConditionalGeneration, gold: Golden, key: str, norms: dict[str, float | None]
) -> float:
    """The largest difference of stored gradients and norms; None there means none at all here."""
    ours = {_published_name(n): p.grad for n, p in model.named_parameters()}
    worst = 0.0
    for name, norm in norms.items():
        grad = ours.pop(name)
        if norm is None:
            assert grad is None, f"{name} got a gradient, the release gives none"
            continue
        assert grad is not None, f"{name} got no gradient"
        # A norm is a sum over many: compare it relative to its size.
        worst = max(worst, abs(float(grad.norm()) - norm) / max(1.0, norm))
        if (want := gold.expected.get(f"{key}/grad/{name}")) is not None:
            worst = max(worst, _apart(grad, want))
        if (want := gold.expected.get(f"{key}/grad_sub/{name}")) is not None:
            worst = max(worst, _apart(grad[::4, ::16], want))
    assert not {name for name, grad in ours.items() if grad is not None}
    return worst


def _published_name(name: str) -> str:
    for new, old in (
        ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"),
        ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"),
    ):
        if name.startswith("detection_model."):
            name = name.replace(new, old)
    return name
