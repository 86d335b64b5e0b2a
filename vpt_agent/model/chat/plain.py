"""Any other image-text-to-text model of transformers whose language model is a plain decoder.

LLaVA, SmolVLM and their like: positions count on by one, every token sees all before it, and a
picture's tokens depend on that picture alone. Each picture goes through the model's own processor
and its own code up to the decoder, where its rows (marks of rows and tiles included) are caught.
Whether a model is of this kind is not believed but computed, once, on a small conversation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.cache_utils import Cache

from vpt_agent.errors import CheckpointError
from vpt_agent.model.chat.base import StockModel
from vpt_agent.prompt.chat import ChatLayout, Shown
from vpt_agent.prompt.words import Ids
from vpt_agent.types import View

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""How far logits may differ from the model's own, as a share of their largest; by number type."""


class _Caught(Exception):  # noqa: N818 - ends a forward that has gone far enough
    pass


class StockPlain(StockModel):
    """A stock model without positions for pictures; ``processor`` is its own, ``image_token`` what
    stands for a picture in its text."""

    def __init__(self, net: Any, processor: Any, image_token: str) -> None:
        super().__init__(net)
        self.processor, self.image_token = processor, image_token
        self.decoder: Any = net.get_decoder()

    def look(self, views: Sequence[View]) -> list[Tensor]:
        """Rows [V, D] of each view: all that its picture is in the model's sequence."""
        return [self._rows([self.image_token], [view.image])[0] for view in views]

    def _rows(self, text: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
        """What the decoder is given for ``text`` with ``images``: [B, L, D]."""
        caught: list[Tensor] = []

        def catch(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            caught.append(given["inputs_embeds"])
            raise _Caught

        handle = self.decoder.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.net(**self.inputs(text, images))
        except _Caught:
            pass
        finally:
            handle.remove()
        return caught[0]

    def inputs(self, text: Sequence[str], images: Sequence[Image.Image]) -> Mapping[str, Any]:
        """What the model's own forward takes."""
        made = self.processor(
            text=list(text), images=list(images), return_tensors="pt", add_special_tokens=False
        )
        moved: Mapping[str, Any] = made.to(self.device, self.dtype)
        return moved

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, ...]:
        """Not this way: :meth:`look` sees pictures."""
        raise CheckpointError("this model has no patches of its own", where=type(self.net).__name__)

    def run_language_model(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor:
        """Final-norm hidden states [B, L, D] of ``inputs_embeds`` [B, L, D].

        ``position_ids`` [3, B, L], of which all three are the same; ``attention_mask`` bool
        [B, 1, L, S], or None where plain causal attention is the same.
        """
        mask = self.mask(inputs_embeds, attention_mask, past_key_values)
        output = self.decoder(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids[0],
            attention_mask=mask,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    @torch.inference_mode()
    def check(self, layout: ChatLayout) -> float:
        """Compute a small conversation both ways; the difference of the logits as a share of their
        largest. Raises :class:`CheckpointError` if it is more than :data:`TOLERANCE`."""
        image = Image.linear_gradient("L").convert("RGB").resize((96, 64))
        box = Image.new("RGB", (64, 64), "red")
        parts = layout.opening([Shown("a"), Shown("b")], "What is there?")
        waiting = [image, box]
        rows = []
        embed = self.get_input_embeddings()
        for part in parts:
            if isinstance(part, Ids):
                rows.append(embed(torch.tensor([part.ids], device=self.device))[0])
            else:
                rows.append(self._rows([self.image_token], [waiting.pop(0)])[0])
        embeds = torch.cat(rows)[None]
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is there?"}]
        text = layout.render([{"role": "user", "content": content}], None, True)
        theirs = self.net(**self.inputs([text], [image, box])).logits.float()
        positions = torch.arange(embeds.shape[1], device=self.device).expand(3, 1, -1)
        hidden = self.run_language_model(embeds, positions, None, None)
        ours = self.compute_logits(hidden).float()
        same = ours.shape == theirs.shape
        share = float((ours - theirs).abs().max() / theirs.abs().max()) if same else float("inf")
        if not share <= TOLERANCE.get(self.dtype, 1e-3):
            raise CheckpointError(
                "this model does not compute as a plain decoder, and its family is not known",
                where=type(self.net).__name__,
                got=f"logits off by {share:.2g} of their largest"
                if same
                else f"{ours.shape[1]} tokens for {theirs.shape[1]}",
                fix="serve it with an OpenAI-compatible server, and use "
                "PerceptionAgent.from_server",
            )
        return share
