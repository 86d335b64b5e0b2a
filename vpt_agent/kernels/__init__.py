"""The library's torch operators, namespace ``vpt``; importing this registers them.

| operator | does | gradients |
|---|---|---|
| ``vpt::look`` | crop, resize, normalise, patch layout of Qwen-VL | none (8-bit input) |
| ``vpt::pixels`` | crop, resize, window, normalise, pad: an encoder's input | none |
| ``vpt::project`` | control states to conditions: norm and linear | all inputs |
| ``vpt::condition`` | visual features conditioned on control states | both inputs |
| ``vpt::splice`` | visual features into a sequence of embeddings, by index | both inputs |
| ``vpt::place`` | the same by stretches, with M-RoPE positions | both inputs |
| ``vpt::attend`` | one query a row over the cache's slots that it sees | none (decoding) |

The plain version of each defines the answer. torch's dispatcher picks the implementation by the
tensors' device; :func:`kernel_name` gives its name and :func:`register_kernel` adds a faster one.
"""

from vpt_agent.kernels import faster as _faster  # noqa: F401  # registers
from vpt_agent.kernels.attend import attend
from vpt_agent.kernels.condition import condition
from vpt_agent.kernels.look import look, pixels
from vpt_agent.kernels.place import Stretch, place
from vpt_agent.kernels.project import project
from vpt_agent.kernels.registry import kernel_name, plain, register_kernel
from vpt_agent.kernels.splice import splice

__all__ = [
    "Stretch",
    "attend",
    "condition",
    "kernel_name",
    "look",
    "pixels",
    "place",
    "plain",
    "project",
    "register_kernel",
    "splice",
]
