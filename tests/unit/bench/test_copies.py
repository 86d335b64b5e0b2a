"""What one answer moves: tokens computed, pictures encoded, bytes copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpt_agent.bench.answer import Loaded, Ours, Settings, picture
from vpt_agent.bench.published import Prompt, PublishedProcedure
from vpt_agent.model.testing import tiny_model

COPIES = {"clone", "copy_", "_to_copy", "cat", "index_copy", "index_copy_", "index_put_",
          "index_select", "index", "repeat", "contiguous"}  # fmt: skip


class Copied(TorchDispatchMode):
    """Bytes that operators which only move data have written."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in COPIES:
            found = args[1] if func.overloadpacket.__name__ == "copy_" else out
            leaves = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in leaves)
        return out


def copied(new_tokens: int) -> tuple[int, Any, int]:
    """Bytes copied by one answer, the answer, and bytes of one token in the cache."""
    loaded = Loaded(*tiny_model(("clip",)))
    ours = Ours(loaded, Settings(image=84, new_tokens=new_tokens), picture(84))
    ours.run()  # the pool has its size
    with Copied() as mode:
        answer = ours.run()
    ours.close()
    return mode.bytes, answer, ours.agent.engine.cache.shape.bytes_per_token


def test_a_token_copies_no_cache() -> None:
    few, short, per_token = copied(8)
    many, long, _ = copied(24)
    length = long.usage.forward_tokens
    assert length - short.usage.forward_tokens == 16
    # Its own keys and values and some rows as wide as the model; the cache would be 100 times more.
    assert (many - few) / 16 < 0.2 * length * per_token


def test_the_bytes_of_an_answer_are_bounded() -> None:
    """All that one answer copies: its picture as patches, and what each token leaves in the cache a
    few times over (embeddings, queries, keys, values). It counted 496 kB."""
    moved, answer, per_token = copied(8)
    patches = 2 * 84 * 84 * 3 * 4  # a picture stands twice in time, float32
    assert answer.usage.forward_tokens == 158
    assert 158 * per_token < moved < 2 * patches + 4 * 158 * per_token


def test_an_answer_computes_and_encodes_each_thing_once() -> None:
    _, answer, _ = copied(8)
    ids = answer.trace.record().ids
    assert answer.usage.forward_tokens == len(ids) - 1  # the last one needs no pass
    assert (answer.usage.encoder_calls, answer.usage.reused_features) == (1, 1)


@pytest.mark.parametrize("copies", [True, False])
def test_the_published_procedure_copies_the_cache_twice_a_token(copies: bool) -> None:
    model, _ = tiny_model(("clip",))
    procedure = PublishedProcedure(model, copies=copies)
    moved = []
    for tokens in (4, 8):
        with Copied() as mode:
            procedure.generate(Prompt(list(range(64))), tokens)
        moved.append(mode.bytes)
    cache = 64 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, heads, width, bytes
    # transformers' own growing cache copies once a pass besides.
    assert ((moved[1] - moved[0]) / 4 > 3.9 * cache) == copies
