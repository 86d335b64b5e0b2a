"""Which implementation runs, and its name. Registrations last, so they are made in a child."""

import re
import subprocess
import sys

import pytest
import torch

from vpt_agent import kernels
from vpt_agent.errors import UserError


def test_names() -> None:
    x = torch.zeros(1)
    assert kernels.kernel_name("look", x) == "vpt::look[cpu:direct]"
    assert kernels.kernel_name("vpt::condition", x, x) == "vpt::condition[cpu:runs]"
    assert kernels.kernel_name("splice", torch.zeros(1, device="meta")) == "vpt::splice[meta:plain]"


def test_unknown_operator_and_device() -> None:
    with pytest.raises(
        UserError, match=r"unknown operator; got: blur; expected: attend, condition"
    ):
        kernels.kernel_name("blur")
    with pytest.raises(UserError, match=r"no kernel.*where: vpt::look; got: meta; expected: cpu"):
        kernels.kernel_name("look", torch.zeros(1, device="meta"))


def test_a_kernel_that_fails_raises_and_triton_is_not_imported_before_it_runs() -> None:
    code = (
        "import sys, torch\nfrom vpt_agent.kernels import faster\n"
        "assert 'triton' not in sys.modules\n"
        "faster._late('rows_triton', 'no_such_kernel')()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search("no_such_kernel|No module named 'triton'", done.stderr), done.stderr


def test_plain_is_what_defines_the_answer() -> None:
    f, c, s = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 0, 1, 1])
    got = kernels.plain("condition")(f, c, s)
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, kernels.condition(f, c, s))


CHILD = """
import torch
from vpt_agent import kernels
from vpt_agent.errors import UserError

@kernels.register_kernel("splice", "cpu", "test")
def marked(embeds, features, index):
    return kernels.plain("splice")(embeds, features, index) + 100

e, f, i = torch.zeros(1, 3, 2), torch.zeros(2, 2, requires_grad=True), torch.tensor([0, 2])
out = kernels.splice(e, f, i)
(out * 4).sum().backward()
print(kernels.kernel_name("splice", f), float(out.detach().mean()), f.grad.tolist()[0])
try:
    kernels.register_kernel("vpt::splice", "cpu", "second")(marked)
except UserError as error:
    print(error)
"""


def test_a_registered_kernel_is_picked_and_named() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "vpt::splice[cpu:test] 100.0 [4.0, 4.0]"
    assert second.startswith("this device has a kernel already; where: vpt::splice[cpu]")
    assert second.endswith("got: second; expected: test")
