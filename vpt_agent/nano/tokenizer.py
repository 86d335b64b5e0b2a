"""The nano model's own small byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vpt_agent.nano.questions import every_text
from vpt_agent.nano.views import GRID
from vpt_agent.tokens.table import (
    CLIP,
    DINO,
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    REGION,
    SAM,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

# The region kind on this model's finer grid; the other kinds only lend their spellings.
KIND: Final = replace(REGION, grid=GRID)
SYSTEM: Final = "You are a helpful assistant."
QWEN_SPECIAL: Final = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    VISION_START,
    VISION_END,
    IMAGE_PAD,
    VIDEO_PAD,
)
PAD_SPECIAL: Final = tuple(kind.placeholder for kind in (CLIP, DINO, SAM))
REGION_TOKENS: Final = (KIND.start, KIND.end, *KIND.grid_tokens)
ACTION_TOKENS: Final = tuple(
    part or "" for kind in (CLIP, DINO, SAM) for part in (kind.start, kind.control, kind.end)
)
_MERGED_VOCAB: Final = 480


def token_id(tokenizer: Qwen2Tokenizer, token: str) -> int:
    """Id of one token."""
    return int(tokenizer.convert_tokens_to_ids(token))


def corpus() -> list[str]:
    """Training text for the merges: lower case only, so that answers never merge."""
    texts = [*every_text(), *[KIND.trigger, SYSTEM, "system\nuser\nassistant\n"] * 600]
    return [text.lower() for text in texts]


def build_tokenizer(
    texts: Sequence[str] | None = None, *, merged: int = _MERGED_VOCAB
) -> Qwen2Tokenizer:
    """Train the merges and add the special and action tokens in their fixed order.

    ``merged`` is the number of tokens that text has, bytes included.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=merged,
        special_tokens=[],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(corpus() if texts is None else texts, trainer)
    vocab, merges = _model_state(raw)
    # In the vocabulary already, so that they keep this order: the class would add eos first.
    for token in QWEN_SPECIAL:
        vocab[token] = len(vocab)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=merges,
        unk_token=None,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
    )
    special = [AddedToken(t, special=True, normalized=False) for t in (*QWEN_SPECIAL, *PAD_SPECIAL)]
    plain = [
        AddedToken(t, special=False, normalized=False) for t in (*REGION_TOKENS, *ACTION_TOKENS)
    ]
    tokenizer.add_tokens(special)
    tokenizer.add_tokens(plain)
    return tokenizer


def _model_state(raw: object) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    model = json.loads(raw.to_str())["model"]  # type: ignore[attr-defined]
    return model["vocab"], [(left, right) for left, right in model["merges"]]
