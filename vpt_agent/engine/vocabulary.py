"""What each token of a vocabulary spells, and the tokens that would complete a tag.

A tag such as ``<tool_call>`` may be one token, or several, or the beginning of a token that goes
on (``>\\n``); what completes it must be found whatever the tokenizer does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vpt_agent.errors import MissingExtraError, UserError


def require_llguidance() -> Any:
    """The library of constrained decoding. Raises :class:`MissingExtraError`."""
    try:
        import llguidance.hf
    except ImportError as error:
        raise MissingExtraError(
            "JSON calls are constrained by their schema with llguidance, which is not installed",
            fix='pip install "vpt-agent[json]", or load the model with constrained=False',
        ) from error
    return llguidance


class Vocabulary:
    """The tokens of one fast tokenizer as bytes, ``size`` ids (the logits may have more)."""

    def __init__(self, tokenizer: Any, *, end: int) -> None:
        library = require_llguidance()
        self.size: int = len(tokenizer)
        # Tags may be tokens of their own, which llguidance holds for no text.
        self._added = {i: t.encode() for t, i in tokenizer.get_added_vocab().items()}
        try:
            self.ll: Any = library.hf.from_tokenizer(tokenizer, n_vocab=self.size, eos_token=end)
        except ValueError as error:
            raise UserError(
                "this tokenizer cannot be used to constrain JSON calls",
                where=type(tokenizer).__name__,
                got=str(error),
                expected="a fast tokenizer (one with a tokenizer.json)",
                fix="load the model with constrained=False",
            ) from error

    @cached_property
    def spelled(self) -> list[bytes]:
        """The bytes of each id."""
        return [self._added.get(i) or self.ll.decode_bytes([i]) for i in range(self.size)]

    @cached_property
    def _ordered(self) -> list[tuple[bytes, int]]:
        return sorted((text, i) for i, text in enumerate(self.spelled) if text)

    def beginning(self, prefix: bytes) -> Iterator[tuple[int, bytes]]:
        """Tokens that begin with ``prefix``, each with what it adds behind it."""
        at = bisect_left(self._ordered, (prefix, -1))
        while at < len(self._ordered) and self._ordered[at][0].startswith(prefix):
            text, token = self._ordered[at]
            yield token, text[len(prefix) :]
            at += 1

    def completing(self, tail: bytes, tag: bytes) -> Iterator[tuple[int, bytes]]:
        """Tokens that complete ``tag`` behind ``tail``, each with what it adds behind the tag."""
        for length in range(1, len(tag)):
            if tail.endswith(tag[:length]):
                yield from self.beginning(tag[length:])
        yield from self._holding(tag)

    def _holding(self, tag: bytes) -> list[tuple[int, bytes]]:
        if tag not in self._holders:
            self._holders[tag] = [
                (i, text.split(tag, 1)[1]) for i, text in enumerate(self.spelled) if tag in text
            ]
        return self._holders[tag]

    @cached_property
    def _holders(self) -> dict[bytes, list[tuple[int, bytes]]]:
        return {}

    def ids(self, text: bytes) -> list[int]:
        """Ids that spell ``text``."""
        found: list[int] = self.ll.tokenize_bytes(text)
        return found

    def text(self, ids: Sequence[int]) -> bytes:
        """The bytes that ``ids`` spell."""
        return b"".join(self.spelled[i] for i in ids if i < self.size)

    def matcher(self, grammar: str) -> Any:
        """A matcher of a grammar in llguidance's form of Lark."""
        return require_llguidance().LLMatcher(self.ll, grammar, log_level=0)


def allowed_by(matcher: Any) -> Tensor:
    """The ids that a matcher allows next: bool [size]."""
    # A copy, so that torch may own (and write to) the memory.
    biases = torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)
    return biases != 0
