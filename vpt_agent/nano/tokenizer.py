"""The nano model's own small byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from vpt_agent.nano.questions import every_text
from vpt_agent.nano.views import GRID

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

TRIGGER: Final = (
    "Identify the region that can help you answer the question, and then answer the question."
)
SYSTEM: Final = "You are a helpful assistant."
QWEN_SPECIAL: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PAD_SPECIAL: Final = ("<|clip_image_pad|>", "<|detection_image_pad|>", "<|seg_image_pad|>")
REGION_TOKENS: Final = (
    "<|region_token_start|>",
    "<|region_token_end|>",
    *(f"<|x_{i}|>" for i in range(GRID)),
    *(f"<|y_{i}|>" for i in range(GRID)),
)
ACTION_TOKENS: Final = tuple(
    f"<|{kind}_action{end}|>"
    for kind in ("clip", "detection", "seg")
    for end in ("_start", "", "_end")
)
_MERGED_VOCAB: Final = 480


def corpus() -> list[str]:
    """Training text for the merges: lower case only, so that answers never merge."""
    texts = [*every_text(), *[TRIGGER, SYSTEM, "system\nuser\nassistant\n"] * 600]
    return [text.lower() for text in texts]


def build_tokenizer(texts: Sequence[str] | None = None) -> Qwen2Tokenizer:
    """Train the merges and add the special and action tokens in their fixed order."""
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
        vocab_size=_MERGED_VOCAB,
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
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
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
