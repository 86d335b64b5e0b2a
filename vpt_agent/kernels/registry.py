"""Which implementation of an operator runs where: torch dispatches, this table gives its name.

Every operator has one *plain* implementation, which defines the answer. A faster one for a device
is added with :func:`register_kernel`; torch's dispatcher then picks it for tensors on that device,
and :func:`kernel_name` says so, for traces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch._library.custom_ops import CustomOpDef  # what torch.library.custom_op returns

from vpt_agent.errors import UserError

NAMESPACE = "vpt"
PLAIN = "plain"

Kernel = Callable[..., object]


@dataclass(frozen=True)
class _Operator:
    definition: CustomOpDef
    plain: Kernel
    devices: tuple[str, ...] | None
    faster: dict[str, str] = field(default_factory=dict)


_OPERATORS: dict[str, _Operator] = {}


def define(
    name: str, plain: Kernel, fake: Kernel, *, devices: tuple[str, ...] | None = None
) -> CustomOpDef:
    """Register ``plain`` as the torch custom operator ``vpt::name``.

    ``fake`` gives the result's shape and dtype without values (meta tensors, torch.compile).
    ``devices`` limits the plain version to these device types; None means that it runs on all.
    """
    make = torch.library.custom_op(f"{NAMESPACE}::{name}", mutates_args=(), device_types=devices)
    definition = make(plain)
    definition.register_fake(fake)
    _OPERATORS[name] = _Operator(definition, plain, devices)
    return definition


def _short(name: str) -> str:
    return name.removeprefix(f"{NAMESPACE}::")


def _operator(name: str) -> _Operator:
    short = _short(name)
    if short not in _OPERATORS:
        raise UserError("unknown operator", got=name, expected=", ".join(sorted(_OPERATORS)))
    return _OPERATORS[short]


def register_kernel(op: str, device: str, name: str) -> Callable[[Kernel], Kernel]:
    """Decorator: add the implementation ``name`` of ``op`` for tensors on ``device``.

    It must give what the plain version gives. A device takes one faster version; a second one is
    a :class:`UserError` that names the first.
    """
    operator = _operator(op)

    def add(kernel: Kernel) -> Kernel:
        if device in operator.faster:
            raise UserError(
                "this device has a kernel already",
                where=f"{NAMESPACE}::{_short(op)}[{device}]",
                got=name,
                expected=operator.faster[device],
            )
        operator.definition.register_kernel(device)(kernel)
        operator.faster[device] = name
        return kernel

    return add


def plain(op: str) -> Kernel:
    """The plain implementation of ``op``: what every other one is compared with."""
    return _operator(op).plain


def kernel_name(op: str, *tensors: torch.Tensor) -> str:
    """Name of the implementation that torch's dispatcher picks for ``tensors``.

    For example ``vpt::look[cpu:plain]``. A device without an implementation is a
    :class:`UserError`, as the call itself would be.
    """
    operator = _operator(op)
    short = _short(op)
    kinds = sorted({t.device.type for t in tensors} - {"cpu"}) or ["cpu"]
    device = kinds[0]
    name = operator.faster.get(device)
    if name is None:
        if operator.devices is not None and device not in operator.devices:
            raise UserError(
                "no kernel of this operator runs on this device",
                where=f"{NAMESPACE}::{short}",
                got=device,
                expected=", ".join((*operator.devices, *operator.faster)),
                fix="move the tensors, or register a kernel for the device",
            )
        name = PLAIN
    return f"{NAMESPACE}::{short}[{device}:{name}]"


def require(condition: bool, what: str, *, where: str, got: object, expected: object) -> None:
    """Refuse an argument of an operator."""
    if not condition:
        raise UserError(what, where=where, got=got, expected=expected)


def one_device(where: str, *tensors: torch.Tensor) -> None:
    """Refuse tensors that lie on different devices."""
    found = sorted({str(t.device) for t in tensors})
    require(
        len(found) == 1,
        "the tensors lie on different devices",
        where=where,
        got=", ".join(found),
        expected="one device",
    )


def check_index(index: torch.Tensor, limit: int, *, where: str, unique: bool = False) -> None:
    """Refuse an index [N] with entries outside 0..limit-1 (and, if ``unique``, repeated ones).

    Reads values, so it waits for the device: callers skip it on a GPU unless they are asked.
    """
    if index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    require(
        low >= 0 and high < limit,
        "an index is out of range",
        where=where,
        got=f"{low}..{high}",
        expected=f"0..{limit - 1}" if limit else "no entries: there is nothing to point at",
    )
    if unique:
        distinct = int(torch.unique(index).numel())
        require(
            distinct == index.numel(),
            "an index is repeated",
            where=where,
            got=f"{index.numel()} entries, {distinct} of them different",
            expected="each position once",
        )
