"""The nano model: a small Qwen2-VL, and a batched form of its vision tower for training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vpt_agent.nano.alphabet import COLOURS, SHAPES
from vpt_agent.nano.tokenizer import token_id
from vpt_agent.nano.views import MEAN, MERGE, PATCH, STD
from vpt_agent.tokens.table import (
    END_OF_TEXT,
    IM_END,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration

WIDTH = 192
DEPTH = 4
HEADS = 6
# The heads that are shown where to look: the first key-value group of the third layer.
LOOKING = 3
LOOKING_LAYER = 2
# Colours and shapes, in the order of the dense labels.
NAMES = (len(COLOURS), len(SHAPES))


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    """A fresh nano model whose embedding rows match `tokenizer`."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    def token(name: str) -> int:
        return token_id(tokenizer, name)

    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        # Not 0.02: at this width the model then stays in a dead start for very long.
        "initializer_range": 0.06,
        # Slow enough that height and width barely turn: what a visual token holds can then be
        # matched wherever it lies, and where it lies is among what the tower puts into it. With
        # a base of 10 localising stayed at chance.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 6, 6],
        },
        "bos_token_id": None,
        "eos_token_id": token(IM_END),
        "pad_token_id": token(END_OF_TEXT),
    }
    vision: dict[str, Any] = {
        "depth": DEPTH,
        "embed_dim": WIDTH,
        "hidden_size": WIDTH,
        "num_heads": HEADS,
        "mlp_ratio": 4,
        "initializer_range": 0.06,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token(IMAGE_PAD),
        video_token_id=token(VIDEO_PAD),
        vision_start_token_id=token(VISION_START),
        vision_end_token_id=token(VISION_END),
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    config._attn_implementation = "sdpa"
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token(IM_END)
    model.generation_config.pad_token_id = token(END_OF_TEXT)
    return model


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; `cos` and `sin` cover half of the last axis, the other half repeats.

    Written with chunk, not slices: the gradient of a slice fills a whole tensor with zeros.
    """
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def _positions(grids: Tensor) -> Tensor:
    """Row and column of every patch, in the tower's 2 x 2 block order: (2, patches)."""
    parts = []
    for height, width in grids.tolist():
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        both = torch.stack((rows, columns)).reshape(2, height // 2, 2, width // 2, 2)
        parts.append(both.permute(0, 1, 3, 2, 4).reshape(2, -1))
    return torch.cat(parts, dim=1)


def _runs(grids: Tensor) -> list[tuple[int, int]]:
    """(images, patches of each) for stretches of images with equally many patches."""
    runs: list[tuple[int, int]] = []
    for height, width in grids.tolist():
        count = height * width
        if runs and runs[-1][1] == count:
            runs[-1] = (runs[-1][0] + 1, count)
        else:
            runs.append((1, count))
    return runs


LONG = 1000


def _mix(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Result and weights of attention over (batch, heads, length, 32); q and k come scaled.

    `seen` (batch, length, length), in place of `causal`, is true where a query sees a key.

    Plain matrix products: for such short rows they train 1.4 times faster on a CPU than the
    fused kernel, whose backward pass is slow.
    """
    with torch.autocast("cpu", enabled=False):
        v = v.to(q.dtype)
        scores = q @ k.transpose(-1, -2)
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None], -1e4)
        elif causal:
            length = scores.shape[-1]
            scores = scores + torch.full((length, length), -1e4, dtype=q.dtype).triu(1)
        weights = scores.softmax(-1)
        return weights @ v, weights


def _feed(mlp: Any, x: Tensor) -> Tensor:
    """The tower's MLP; x * sigmoid(1.702 x) is silu(1.702 x) / 1.702, folded into the weights."""
    first, second, scale = mlp.fc1, mlp.fc2, 1.702
    inner = functional.silu(functional.linear(x, first.weight * scale, first.bias * scale))
    return functional.linear(inner, second.weight / scale, second.bias)


def _halves(factors: tuple[Tensor, Tensor], axis: int, narrow: torch.dtype) -> list[Tensor]:
    """Half of cos and of sin, with the attention scale of 32-wide heads put into them."""
    width = factors[0].shape[-1]
    return [(t[..., : width // 2] * width**-0.25).to(narrow).unsqueeze(axis) for t in factors]


def _narrow(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _attend(
    attention: Any, x: Tensor, cos: Tensor, sin: Tensor, runs: list[tuple[int, int]]
) -> Tensor:
    qk, v = attention.qkv(x).split((2 * WIDTH, WIDTH), dim=-1)
    heads = attention.num_heads
    # Queries and keys turn alike, so they are turned together.
    qk = _rotate(qk.reshape(x.shape[0], 2 * heads, -1), cos, sin)
    v = v.reshape(x.shape[0], heads, -1)
    sizes = [images * count for images, count in runs]
    outputs = []
    for (images, count), both, values in zip(runs, qk.split(sizes), v.split(sizes), strict=True):
        q, k = both.reshape(images, count, 2 * heads, -1).transpose(1, 2).chunk(2, dim=1)
        values = values.reshape(images, count, heads, -1).transpose(1, 2)
        one = heads if count < LONG else 1  # heads at a time: long rows' weights fill the caches
        parts = zip(q.split(one, 1), k.split(one, 1), values.split(one, 1), strict=True)
        out = torch.cat([_mix(*part, causal=False)[0] for part in parts], dim=1)
        outputs.append(out.transpose(1, 2).reshape(images * count, -1))
    mixed: Tensor = attention.proj(torch.cat(outputs))
    return mixed


def tower_states(visual: Any, patches: Tensor, grids: Tensor) -> Tensor:
    """Last hidden state (patches, 192) of the vision tower, as its own forward would give.

    `patches` is uint8 (patches, 3 * 14 * 14) with one frame each, `grids` the patch rows and
    columns (images, 2). transformers runs the attention image by image; here images with
    equally many patches go together, which is several times faster in training.
    """
    mean = torch.tensor(MEAN).view(1, 3, 1)
    std = torch.tensor(STD).view(1, 3, 1)
    pixels = (patches.view(-1, 3, PATCH * PATCH).float() / 255.0 - mean) / std
    # Both frames are the same picture, so their weights can be added.
    kernel = visual.patch_embed.proj.weight.sum(dim=2).reshape(WIDTH, -1)
    x = functional.linear(pixels.view(patches.shape[0], -1), kernel).float()
    cos, sin = _halves(visual.rotary_pos_emb(x, _positions(grids).T), 1, _narrow(x))
    runs = _runs(grids)
    for block in visual.blocks:
        x = x + _attend(block.attn, block.norm1(x), cos, sin, runs)
        x = x + _feed(block.mlp, block.norm2(x))
    return x


def image_features(visual: Any, patches: Tensor, grids: Tensor) -> Tensor:
    """Visual tokens (patches / 4, 192) of all images, one after another."""
    merged: Tensor = visual.merger(tower_states(visual, patches, grids))
    return merged


def text_states(
    text: Any, x: Tensor, positions: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Last hidden state (batch, length, 192) of the language model, as its own forward gives.

    Also what the layer that looks reads (batch, length, 192) and the attention weights
    (batch, 3, length, length) of its first heads.

    `positions` is (3, batch, length). Padding must be on the right: under a causal mask it then
    needs no mask of its own; `seen` (batch, length, length) stands in for the causal one. The
    rotary factors are kept in the narrow type, because mixing types takes a slow path on CPUs.
    """
    cos, sin = _halves(text.rotary_emb(x, positions), 2, _narrow(x))
    batch, length, _ = x.shape
    read = looks = x
    for number, layer in enumerate(text.layers):
        attention = layer.self_attn
        y = layer.input_layernorm(x)
        q, k, v = (
            project(y).view(batch, length, -1, attention.head_dim)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        groups = attention.num_key_value_groups
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, weights = _mix(q, k, v, causal=True, seen=seen)
        if number == LOOKING_LAYER:
            read, looks = y, weights[:, :LOOKING]
        x = x + attention.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return text.norm(x), read, looks


def answer_states(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States of all patches of the images (patches, 192), then of the conversations what

    `text_states` gives.

    `image_index` gives, for every image pad in reading order, its row among the features.
    """
    core = model.model
    patches = tower_states(core.visual, batch["patches"], batch["grids"])
    features = core.visual.merger(patches)
    ids = batch["input_ids"]
    embeds = core.language_model.embed_tokens(ids)
    pads = (ids == model.config.image_token_id).unsqueeze(-1)
    chosen = features.float()[batch["image_index"]]
    embeds = embeds.masked_scatter(pads, chosen)
    return (patches, *text_states(core.language_model, embeds, batch["position_ids"]))


def _pointing(weights: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
    """Loss that makes some heads look at the asked tag while its cells are being said.

    `weights` is (batch, heads, length, length); `asking` (batch, length) marks the tokens that
    should look and `spot` (batch, length) the visual tokens on the tag, or (n, length) those for
    each of the tokens that look, if a row has several questions (`packed`). The generator knows
    both; left to itself the match of a word and a place took longer than all other training.
    """
    spot, asking = batch["spot"], batch["asking"]
    if "packed" not in batch:
        spot = spot[asking.nonzero()[:, 0]]
    chosen = (weights.float().transpose(1, 2)[asking] * spot[:, None]).sum(-1)  # (n, heads)
    return -(chosen + 1e-4).log().mean(), float(chosen.detach().mean())


def naming(model: Any, seen: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Loss that brings what a visual token on a tag holds near its colour's and shape's words.

    `seen` (batch, length, 192) is what the layer that looks reads, `names` the token ids of the
    colours and of the shapes. Without this loss the colours of tags, though the tower's states
    tell them, were never found by the attention that is asked for one.
    """
    on_image = seen[batch["input_ids"] == model.config.image_token_id].float()
    # A visual token is four patches; it lies on a tag where one of them does.
    labels = batch["whole_labels"].view(-1, MERGE * MERGE, 6)[..., :2].amax(1)
    labels = labels[batch["image_index"]]
    words = model.model.language_model.embed_tokens.weight
    loss, metrics, start = torch.zeros(()), {}, 0
    for name, count, wanted in zip(("says_colour", "says_shape"), NAMES, labels.T, strict=True):
        own, on = words[batch["names"][start : start + count]], wanted > 0
        start += count
        logits, wanted = on_image[on] @ own.T, wanted[on] - 1
        loss = loss + functional.cross_entropy(logits, wanted)
        metrics[name] = float((logits.argmax(-1) == wanted).float().mean())
    return loss, metrics


def answer_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Next-token loss over the labelled tokens, and the shares of right ones.

    With dense labels in the batch the model's `dense` heads go on naming patches: without
    them localising stays at chance for very long after the crops of the reading stage.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        patches, states, seen, looks = answer_states(model, batch)
        targets = batch["labels"][:, 1:]
        chosen = targets != -100
        logits = model.lm_head(states[:, :-1][chosen]).float()
    loss = functional.cross_entropy(logits, targets[chosen])
    right = (logits.argmax(-1) == targets[chosen]).float()
    # Text comes first among the ids, then seven special tokens and three more pads, then the
    # two region brackets and the coordinates.
    first = model.config.text_config.pad_token_id
    text, coordinate = targets[chosen] < first, targets[chosen] >= first + 12
    metrics = {"answer": float(right[text].mean()), "region": float(right[coordinate].mean())}
    if "crop_labels" in batch:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            near, far, found = model.dense(patches, batch)
        loss, metrics = loss + 0.1 * near + 0.5 * far, metrics | found
    if "asking" in batch:
        pointing, metrics["pointing"] = _pointing(looks, batch)
        said, found = naming(model, seen, batch)
        loss, metrics = loss + pointing + 0.5 * said, metrics | found
    return loss, metrics


_ZERO_IS_EMPTY = ("char", "slot", "colour", "shape")


def _dense_loss(
    names: tuple[str, ...], logits: Tensor, widths: tuple[int, ...], labels: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Weighted loss of several labels per patch and the share of right ones on tags."""
    loss = torch.zeros(())
    metrics: dict[str, float] = {}
    parts = logits.float().split(widths, dim=-1)
    for name, part, target in zip(names, parts, labels.T, strict=True):
        if not bool((target != -100).any()):
            continue
        # Most patches are empty: class 0 counts a tenth where it means "no tag".
        weight = torch.ones(part.shape[-1])
        if name in _ZERO_IS_EMPTY:
            weight[0] = 0.1
        # Characters are by far the slowest to come, and the others would drown them.
        share = {"char": 4.0, "shape": 1.0}.get(name, 0.3)
        loss = loss + share * functional.cross_entropy(part, target, weight, ignore_index=-100)
        real = target > (0 if name in _ZERO_IS_EMPTY else -1)
        metrics[name] = float((part.argmax(-1) == target)[real].float().mean())
    return loss, metrics


class DenseHeads(nn.Module):
    """Throw-away linear heads that name what each patch lies on.

    For a patch of a crop: the character and its place in the string, at its left and its right
    half. For a patch of a whole scene: the tag's colour, shape and four grid coordinates.
    """

    CROP = ("char", "slot", "char", "slot")
    CROP_WIDTHS = (33, 7, 33, 7)
    WHOLE = ("colour", "shape", "x0", "y0", "x1", "y1")
    WHOLE_WIDTHS = (11, 6, 16, 16, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.crop_head = nn.Linear(WIDTH, sum(self.CROP_WIDTHS))
        self.whole_head = nn.Linear(WIDTH, sum(self.WHOLE_WIDTHS))

    def forward(
        self, states: Tensor, batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Loss on crops, loss on whole scenes and shares of right labels.

        `states` is (patches, 192); a label of -100 in the batch is no label.
        """
        x = self.norm(states)
        near, metrics = _dense_loss(
            self.CROP, self.crop_head(x), self.CROP_WIDTHS, batch["crop_labels"]
        )
        far, more = _dense_loss(
            self.WHOLE, self.whole_head(x), self.WHOLE_WIDTHS, batch["whole_labels"]
        )
        return near, far, metrics | more


class DenseTower(nn.Module):
    """The vision tower with the throw-away heads of the first stage."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.dense = DenseHeads()

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Loss and shares of right labels."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = tower_states(self.visual, batch["patches"], batch["grids"])
            near, far, metrics = self.dense(states, batch)
        return near + far, metrics
