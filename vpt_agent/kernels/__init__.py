"""The library's torch operators, namespace ``vpt``; importing this registers them.

| operator | does | gradients |
|---|---|---|
| ``vpt::look`` | crop, resize, normalise, patch layout of Qwen-VL | none (8-bit input) |
| ``vpt::pixels`` | crop, resize, window, normalise, pad: an encoder's input | none |
| ``vpt::condition`` | visual features conditioned on control states | both inputs |
| ``vpt::splice`` | visual features into a sequence of embeddings | both inputs |

The plain version of each defines the answer. torch's dispatcher picks the implementation by the
tensors' device; :func:`kernel_name` gives its name and :func:`register_kernel` adds a faster one.
"""

from vpt_agent.kernels import faster as _faster  # registers
from vpt_agent.kernels.condition import condition
from vpt_agent.kernels.look import look, pixels
from vpt_agent.kernels.registry import kernel_name, plain, register_kernel
from vpt_agent.kernels.splice import splice

__all__ = ["condition", "kernel_name", "look", "pixels", "plain", "register_kernel", "splice"]
