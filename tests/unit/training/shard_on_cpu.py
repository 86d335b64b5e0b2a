"""``vpt-agent``, in a process that tells accelerate that a CPU may shard (FSDP over gloo).

accelerate ignores FSDP where there is no accelerator; torch's own ``fully_shard`` does not care.
"""

from __future__ import annotations

from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

_plain = state.AcceleratorState.__init__


def _init(self: Any, *args: Any, **options: Any) -> None:
    _plain(self, *args, **options)
    plugin = options.get("fsdp_plugin")
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = plugin
        state.PartialState._shared_state["distributed_type"] = self.distributed_type


if __name__ == "__main__":
    state.AcceleratorState.__init__ = _init
    from vpt_agent.cli import main

    main()
