"""What constraining a JSON call costs, by library: why docs/decisions/constrained-json.md chose so.

    python benchmarks/constrained.py            # needs llguidance and outlines-core; two minutes

A vocabulary of 150,000 tokens (bytes, and pieces of this repository's own text), the schema of
crop_region as a model is shown it, and of a small tool. Printed: seconds to prepare the tokenizer
once, to compile one tool's call, and for one token (compute what is allowed, take one).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from vpt_agent.engine.vocabulary import Vocabulary, allowed_by
from vpt_agent.engine.written import Offered, call_grammar
from vpt_agent.tool.habits import Habit, schema_for
from vpt_tools.crop_region import crop_region

SIZE = 150_000
SMALL = {
    "type": "object",
    "properties": {
        "box": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 1000},
            "minItems": 4,
            "maxItems": 4,
        }
    },
    "required": ["box"],
    "additionalProperties": False,
}


def vocabulary() -> dict[str, int]:
    """Bytes, and distinct pieces of 2 to 10 letters of this repository's text."""
    text = "".join(p.read_text() for p in sorted(Path("vpt_agent").rglob("*.py")))
    spelled = ByteLevel(add_prefix_space=False).pre_tokenize_str(text[:2_000_000])
    letters = "".join(piece for piece, _ in spelled)
    rng = random.Random(0)
    pieces = dict.fromkeys(sorted(ByteLevel.alphabet()))
    while len(pieces) < SIZE:
        at = rng.randrange(len(letters) - 10)
        pieces[letters[at : at + rng.randint(2, 10)]] = None
    return {piece: i for i, piece in enumerate(pieces)}


def timed(what: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    made = what()
    return time.perf_counter() - began, made


def llguidance(vocab: dict[str, int], schemas: dict[str, Any]) -> None:
    """The library that is used."""
    model = Tokenizer(BPE(vocab=vocab, merges=[]))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="!")
    seconds, words = timed(lambda: Vocabulary(tokenizer, end=0))
    print(f"llguidance: tokenizer {seconds:.3f} s")
    spelled, _ = timed(lambda: words.spelled)
    print(f"llguidance: spellings of all tokens {spelled:.3f} s")
    for name, schema in schemas.items():
        grammar = call_grammar([Offered(name, schema)])
        seconds, matcher = timed(lambda g=grammar: words.matcher(g))
        text = b'{"name": "' + name.encode() + b'", "arguments": {"box": [1, 22, 333, 4]}}\n'
        steps = []
        for token in words.ids(text):
            step, allowed = timed(lambda m=matcher: allowed_by(m))
            assert bool(allowed[token])
            took, _ = timed(lambda m=matcher, t=token: m.consume_token(t))
            steps.append(step + took)
        told = f"mean {sum(steps) / len(steps) * 1e3:.2f} ms, worst {max(steps) * 1e3:.2f} ms"
        print(f"llguidance: {name}: compiled {seconds:.4f} s, a token {told}")


def outlines(vocab: dict[str, int], schemas: dict[str, Any]) -> None:
    """The other one without dependencies: an automaton over the whole vocabulary."""
    from outlines_core import Guide, Index, Vocabulary
    from outlines_core.json_schema import build_regex_from_schema

    decode = {v: k for k, v in _bytes_to_letters().items()}
    tokens = {bytes(decode[c] for c in piece): [i] for piece, i in vocab.items()}
    seconds, words = timed(lambda: Vocabulary(SIZE, tokens))
    print(f"outlines-core: vocabulary {seconds:.3f} s")
    for name, schema in schemas.items():
        try:
            regex = build_regex_from_schema(json.dumps(schema))
            seconds, index = timed(lambda r=regex: Index(r, words))
        except Exception as error:  # it is measured, whatever it says
            print(f"outlines-core: {name}: {type(error).__name__}: {str(error)[:80]}")
            continue
        step, allowed = timed(Guide(index).get_tokens)
        print(
            f"outlines-core: {name}: compiled {seconds:.3f} s, first step {step * 1e3:.2f} ms, "
            f"{len(allowed)} tokens allowed"
        )


def _bytes_to_letters() -> dict[int, str]:
    """The letters by which byte-level vocabularies spell bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in plain}
    for n, b in enumerate(b for b in range(256) if b not in letters):
        letters[b] = chr(256 + n)
    return letters


def main() -> None:
    """Measure and print."""
    vocab = vocabulary()
    schemas = {"small": SMALL, "crop_region": schema_for(crop_region, Habit("norm1000"))}
    llguidance(vocab, schemas)
    outlines(vocab, schemas)


if __name__ == "__main__":
    main()
