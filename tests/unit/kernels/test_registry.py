"""Which implementation runs, and its name. Registrations last, so they are made in a child."""

import subprocess
import sys

import pytest
import torch

from vpt_agent import kernels
from vpt_agent.errors import UserError


def test_names() -> None:
    x = torch.zeros(1)
    assert kernels.kernel_name("look", x) == "vpt::look[cpu:direct]"
    assert kernels.kernel_name("vpt::condition", x, x) == "vpt::condition[cpu:plain]"
    assert kernels.kernel_name("splice", torch.zeros(1, device="meta")) == "vpt::splice[meta:plain]"


def test_unknown_operator_and_device() -> None:
    with pytest.raises(UserError, match=r"unknown operator; got: blur; expected: condition"):
        kernels.kernel_name("blur")
    with pytest.raises(UserError, match=r"no kernel.*where: vpt::look; got: meta; expected: cpu"):
        kernels.kernel_name("look", torch.zeros(1, device="meta"))


def test_plain_is_what_defines_the_answer() -> None:
    f, c, s = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 0, 1, 1])
    got = kernels.plain("condition")(f, c, s)
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, kernels.condition(f, c, s))


CHILD = """
import torch
from vpt_agent import kernels
from vpt_agent.errors import UserError

@kernels.register_kernel("condition", "cpu", "test")
def marked(features, condition, segment):
    return kernels.plain("condition")(features, condition, segment) + 100

f, c, s = torch.zeros(2, 3, requires_grad=True), torch.ones(1, 3), torch.zeros(2).long()
out = kernels.condition(f, c, s)
out.sum().backward()
print(kernels.kernel_name("condition", f), float(out.detach().mean()), f.grad.tolist()[0])
try:
    kernels.register_kernel("vpt::condition", "cpu", "second")(marked)
except UserError as error:
    print(error)
"""


def test_a_registered_kernel_is_picked_and_named() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "vpt::condition[cpu:test] 100.0 [4.0, 4.0, 4.0]"
    assert second.startswith("this device has a kernel already; where: vpt::condition[cpu]")
    assert second.endswith("got: second; expected: test")
