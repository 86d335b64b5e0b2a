"""A model that says what a script says: for tests, demos and the documentation.

It stands behind the same engine as a real one: its "hidden state" is read from the KV cache, where
it keeps the token ids of its row, so batches, caches and control states take the real paths. What
it looks at has no influence on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from vpt_agent.errors import UserError
from vpt_agent.tokens.table import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    IMAGE_PAD,
    SPACE,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    PerceptionTable,
    ResolvedTable,
)

WIDTH = 4
VISUAL = -2.0
"""Stands for a visual token where a row's history holds ids."""

NextToken = Callable[[Sequence[int]], int]
"""The whole row so far (visual tokens as -2) to the next id."""


class ScriptedTokenizer:
    """One id per character, and added tokens: enough for the VPT layout."""

    def __init__(self, table: PerceptionTable) -> None:
        special, plain = table.tokens_to_add()
        base = [END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD]
        names = list(dict.fromkeys([*base, *special, *plain]))
        self._added = {name: i for i, name in enumerate(names)}
        self._special = {self._added[t] for t in [*base, *special]}
        self._names = {i: name for name, i in self._added.items()}
        self._offset = len(names)

    def __len__(self) -> int:
        return self._offset + 256

    def get_added_vocab(self) -> dict[str, int]:
        """Added tokens to ids."""
        return dict(self._added)

    def convert_tokens_to_ids(self, tokens: str) -> int | None:
        """Id of an added token or of one ASCII character, or None."""
        plain = " " if tokens == SPACE else tokens
        if len(plain) == 1 and plain.isascii():
            return ord(plain) + self._offset
        return self._added.get(tokens)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        return sorted(self._special)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """UTF-8 bytes as ids; spelled added tokens as their own."""
        ids: list[int] = []
        while text:
            token = next((t for t in self._added if text.startswith(t)), None)
            if token is not None:
                ids.append(self._added[token])
                text = text[len(token) :]
            else:
                ids += [b + self._offset for b in text[0].encode()]
                text = text[1:]
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Ids to text; bytes that are no UTF-8 become replacement characters."""
        out = b""
        for i in token_ids:
            if i >= self._offset:
                out += bytes([i - self._offset])
            elif not (skip_special_tokens and i in self._special):
                out += self._names[i].encode()
        return out.decode(errors="replace")


@dataclass(frozen=True)
class ScriptedConfig:
    """One layer, one head, one number: the cache holds the ids of each row."""

    num_hidden_layers: int = 1
    num_key_value_heads: int = 1
    num_attention_heads: int = 1
    hidden_size: int = 1
    head_dim: int = 1

    def get_text_config(self) -> ScriptedConfig:
        """Itself: there is no other part."""
        return self


class ScriptedModel:
    """Says ``turns[t]`` in assistant turn t (the last one again and again afterwards).

    A turn is text in which perception tokens may be spelled. ``choose`` instead decides from the
    whole row. ``visual_tokens`` is what every picture becomes, whatever its size.
    """

    def __init__(
        self,
        turns: Sequence[str] = ("",),
        *,
        encoders: Sequence[str] = ("clip", "dino", "sam"),
        table: PerceptionTable | None = None,
        choose: NextToken | None = None,
        visual_tokens: int = 4,
    ) -> None:
        if not turns:
            raise UserError("a script needs at least one turn", where="ScriptedModel")
        table = table or PerceptionTable.published(encoders)
        self.tokenizer = ScriptedTokenizer(table)
        self.config = ScriptedConfig()
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self._table = table.resolve(self.tokenizer.convert_tokens_to_ids)
        self.visual_tokens = visual_tokens
        self._end = self.tokenizer.encode(IM_END)[0]
        self._opening = self.tokenizer.encode(f"{IM_START}assistant\n")
        self._turns = [[*self.tokenizer.encode(t), self._end] for t in turns]
        self._choose = choose or self._from_script
        self.language_model_calls: list[tuple[int, int]] = []
        self.encoder_calls: list[str] = []

    @property
    def table(self) -> ResolvedTable:
        """The kinds it can spell."""
        return self._table

    def get_input_embeddings(self) -> Callable[[Tensor], Tensor]:
        """The embedding of ids, as transformers' models have it."""
        return self._embed

    @staticmethod
    def _embed(input_ids: Tensor) -> Tensor:
        """[B, L] to [B, L, 4]: the id, and zeros."""
        out = torch.zeros(*input_ids.shape, WIDTH)
        out[..., 0] = input_ids.float()
        return out

    def _visual(self, count: int) -> tuple[Tensor, ...]:
        return tuple(torch.full((self.visual_tokens, WIDTH), VISUAL) for _ in range(count))

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        """As many visual tokens as the grids say: [t*h*w/4, 4] each."""
        self.encoder_calls += ["base"] * len(grid_thw)
        return tuple(torch.full((int(g.prod()) // 4, WIDTH), VISUAL) for g in grid_thw)

    def encode(self, kind: str, **inputs: Tensor) -> tuple[Tensor, ...]:
        """``visual_tokens`` features for each picture."""
        count = len(next(iter(inputs.values())))
        self.encoder_calls += [kind] * count
        return self._visual(count)

    def features_from_base(self, kind: str, tower_tokens: Tensor) -> Tensor:
        """The same features."""
        return tower_tokens

    def condition(self, kind: str, features: Tensor, control: Tensor) -> Tensor:
        """The same features: a script does not depend on them."""
        return features

    def run_language_model(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Hidden states [B, L, 4] whose first number is the id that comes next."""
        if past_key_values is None:
            raise UserError("the scripted model runs with a cache only")
        batch, length, _ = inputs_embeds.shape
        self.language_model_calls.append((batch, length))
        ids = inputs_embeds[..., :1].unsqueeze(1)  # [B, 1, L, 1]
        # A control token's embedding is a hidden state: marked by its last number.
        replaced = inputs_embeds[..., 3:].unsqueeze(1)
        control = float(min(self._table.control_ids, default=0))
        ids = torch.where(replaced > 0, torch.full_like(ids, control), ids)
        seen, _ = past_key_values.update(ids, ids, 0)  # [B, 1, S, 1]
        hidden = torch.zeros(batch, length, WIDTH)
        width = seen.shape[2]
        for b in range(batch):
            for i in range(length):
                if attention_mask is None:
                    count = width - length + i + 1
                else:
                    count = int(attention_mask[b, 0, i].sum())
                row = [int(v) for v in seen[b, 0, :count, 0].tolist()]
                hidden[b, i, 0] = self._choose(row)
                hidden[b, i, 3] = 1.0
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[n, 4] to [n, vocab]: ten for the scripted id, zero elsewhere."""
        logits = torch.zeros(*hidden.shape[:-1], len(self.tokenizer))
        return logits.scatter(-1, hidden[..., :1].long(), 10.0)

    def _from_script(self, row: Sequence[int]) -> int:
        n = len(self._opening)
        opened = [i + n for i in range(len(row) - n + 1) if list(row[i : i + n]) == self._opening]
        if not opened:
            return self._end
        turn = self._turns[min(len(opened), len(self._turns)) - 1]
        said = len(row) - opened[-1]
        return turn[said] if said < len(turn) else self._end
