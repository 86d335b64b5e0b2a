"""Sharded weights (FSDP): every process runs the language model equally often.

A process that runs a sharded layer gathers its weights from all others, which so must run it, too.
But batches differ: a row without a call takes one run, one with two calls three. So a process says
so before each run, and one that is done with its own answers each of the others with a run of
the layers over one position, which adds nothing to the loss, until all are done. What is no layer
of the language model (towers, projectors, embeddings) is gathered once a forward, and the loss
reaches it whether rows use it or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def shard_layers(model: Any) -> None:
    """Let the layers of the language model, and nothing else, be sharded each on its own."""
    model._no_split_modules = [type(model.model.layers[0]).__name__]


class EqualRuns:
    """The watcher of a VPTForConditionalGeneration's runs, made before it is wrapped.

    It watches evaluation, too, whose rows are the same in all processes: their masks need not be.
    ``made_up`` counts the runs that stood in for another process's.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.made_up = model, 0
        layers = model.model.layers
        inside = {id(p) for p in layers.parameters()}
        self.others = [n for n, p in model.named_parameters() if id(p) not in inside]
        layers[0].register_forward_pre_hook(_with_gradients, with_kwargs=True)

    def begin(self) -> None:
        """Tell the others of a run."""
        self._said(1)

    def end(self, hidden: Tensor) -> Tensor:
        """Runs of the others, and gradients of zero for what no row has reached."""
        nothing = hidden.sum() * 0
        while int(self._said(0)):
            self.made_up += 1
            nothing = self._empty_run(nothing) * 0
        if not torch.is_grad_enabled():
            return hidden
        from torch.distributed.tensor import DTensor

        for name in self.others:
            parameter = self.model.get_parameter(name)
            # The input embeddings, where they are no output's too, may be a part of their own that
            # is let go of once used: every row uses them.
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                nothing = nothing + parameter.sum() * 0
        return hidden + nothing

    def _said(self, more: int) -> Tensor:
        """1 if any process has a run to make."""
        said = torch.tensor(more, device=self.model.device)
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        return said

    def _empty_run(self, before: Tensor) -> Tensor:
        """The layers alone: what stands behind them is a part of its own, which is done. It goes on
        from what was ``before``, as runs do, so that gradients come back in the same order."""
        text, width = self.model.model, self.model.config.text_config.hidden_size
        hidden = torch.zeros(1, 1, width, device=self.model.device, dtype=self.model.dtype)
        hidden = hidden + before
        rotary = text.rotary_emb(hidden, torch.zeros(3, 1, 1, dtype=torch.int64,
                                                     device=self.model.device))  # fmt: skip
        for layer in text.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        return hidden.sum()


def _with_gradients(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The first layer's input has gradients in every process or in none: only so are the layer's
    own gradients shared at the same moment."""
    if not torch.is_grad_enabled() or not args or args[0].requires_grad:
        return None
    return (args[0].detach().requires_grad_(), *args[1:]), kwargs
