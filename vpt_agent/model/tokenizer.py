"""Tokenizers of checkpoints: loaded by class, and extended by the table's tokens in its order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2 import Qwen2Tokenizer

from vpt_agent.errors import CheckpointError
from vpt_agent.tokens.table import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    PerceptionTable,
    character_tokens,
)


def load_tokenizer(
    source: str, table: PerceptionTable | None = None, **hub: Any
) -> tuple[PreTrainedTokenizerBase, frozenset[str]]:
    """The tokenizer of ``source`` (directory or hub name) with every token of ``table``.

    Returns it with the tokens that had to be added: none for a trained VPT checkpoint. Qwen2's
    class is named, not guessed, since the checkpoint's model type may be unknown to transformers.
    """
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(source, **hub)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            "the checkpoint's tokenizer cannot be read",
            where=source,
            got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="tokenizer.json, or vocab.json and merges.txt, beside config.json",
        ) from error
    if IMAGE_PAD not in tokenizer.get_vocab():  # without its files it would be an empty one
        raise CheckpointError(
            "the checkpoint's tokenizer cannot be read",
            where=source,
            got=f"a vocabulary of {len(tokenizer)} without {IMAGE_PAD}",
            expected="tokenizer.json, or vocab.json and merges.txt, beside config.json",
        )
    added = extend(tokenizer, table) if table is not None else frozenset()
    return tokenizer, added


def extend(tokenizer: PreTrainedTokenizerBase, table: PerceptionTable) -> frozenset[str]:
    """Add what ``table`` needs, in the published order; returns the tokens that were missing.

    Placeholders are special tokens; the others are plain, so decoding keeps them. The end of a
    turn becomes the end-of-sequence token, as published.
    """
    special, plain = table.tokens_to_add()
    known = tokenizer.get_vocab()
    missing = frozenset(t for t in (*special, *plain) if t not in known)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [t for t in special if t in missing]},
        replace_extra_special_tokens=False,
    )
    tokenizer.add_tokens([t for t in plain if t in missing])
    if IM_END in known:
        tokenizer.eos_token = IM_END
    if END_OF_TEXT in known:
        tokenizer.pad_token = END_OF_TEXT
    return missing


def kind_tokens(table: PerceptionTable) -> list[str]:
    """Every token that the rows of ``table`` name, once, in the rows' order; the characters of
    text payloads, which every vocabulary has, come last."""
    tokens: list[str] = []
    for kind in table.kinds:
        tokens += [kind.placeholder, kind.start, kind.end, *kind.grid_tokens]
        tokens += [kind.control] if kind.control else []
    tokens += [token for kind in table.kinds for token in character_tokens(kind)]
    return list(dict.fromkeys(tokens))


def token_ids(tokenizer: PreTrainedTokenizerBase, table: PerceptionTable) -> dict[str, int]:
    """Token → id for every token of ``table``; a missing one is an error that names it."""
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    table.resolve(vocabulary.get)
    return {token: vocabulary[token] for token in kind_tokens(table)}
