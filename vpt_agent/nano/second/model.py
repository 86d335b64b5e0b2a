"""The second version's model with throw-away heads, and its batched training forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from vpt_agent.errors import CheckpointError
from vpt_agent.nano.alphabet import COLOURS, SHAPES
from vpt_agent.nano.domain.marks import MARKS
from vpt_agent.nano.domain.sight import PADDING
from vpt_agent.nano.domain.table import ENCODERS, TABLE
from vpt_agent.nano.model import DenseHeads, _pointing, build_model, text_states, tower_states
from vpt_agent.nano.views import MERGE
from vpt_agent.vision.encoders import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

    from vpt_agent.model import VPTForConditionalGeneration
    from vpt_agent.tokens.table import PerceptionTable

# As published a condition starts so long that f + (f . c) c is c many times over: what the
# encoder saw would be lost before anything was learnt.
CONDITION_START: Final = 0.15
WIDTHS: Final = (len(MARKS) + 1, len(COLOURS) + 1, len(SHAPES) + 1)
_TIED: Final = "vpt.lm_head.weight"
_NAMES: Final = ("mark", "colour", "shape")
Metrics = dict[str, float]


def build_second(
    tokenizer: Qwen2Tokenizer,
    table: PerceptionTable = TABLE,
    encoders: dict[str, dict[str, Any]] = ENCODERS,
) -> VPTForConditionalGeneration:
    """A fresh model of all kinds, float32: the first version's sizes and the small encoders."""
    from vpt_agent.model import VPTForConditionalGeneration
    from vpt_agent.model.configuration import VPTConfig, perception_manifest
    from vpt_agent.model.tokenizer import token_ids
    from vpt_agent.nano.ship import DOMAIN, image_policy

    base = build_model(tokenizer).config.to_dict()
    perception = perception_manifest(
        table,
        token_ids(tokenizer, table),
        images=image_policy(),
        regions="cover",
        trigger="free",
        untrained=(),
        domain=DOMAIN,
        tools={},
    )
    keep = ("text_config", "vision_config", "image_token_id", "video_token_id",
            "vision_start_token_id", "vision_end_token_id", "tie_word_embeddings",
            "initializer_range")  # fmt: skip
    # transformers 5.17 keeps it with the text's sizes only.
    base.setdefault("initializer_range", base["text_config"]["initializer_range"])
    config = VPTConfig(
        **{k: base[k] for k in keep}, perception=perception, encoders=encoders, positions="mrope"
    )
    config._attn_implementation = "sdpa"
    model = VPTForConditionalGeneration(config)
    with torch.no_grad():
        for kind in ("clip", "dino", "sam"):
            model.projector(kind).linear_condition.weight.mul_(CONDITION_START)
    model.tie_weights()
    return model


class MarkHead(nn.Module):
    """Names what each cell of a re-encoding view bears: mark, colour and shape of its tag."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, sum(WIDTHS))

    def forward(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Metrics]:
        """Loss and shares of right labels where there are any; ``labels`` (cells, 3)."""
        logits = self.head(self.norm(states.float())).float().split(WIDTHS, dim=-1)
        loss, metrics = torch.zeros(()), {}
        for name, part, target in zip(_NAMES, logits, labels.T, strict=True):
            weight = torch.ones(part.shape[-1])
            weight[0] = 0.05 if name == "mark" else 0.1  # most cells are empty
            loss = loss + (3.0 if name == "mark" else 0.3) * functional.cross_entropy(
                part, target, weight, ignore_index=-100
            )
            real = target > 0
            metrics[name] = float((part.argmax(-1) == target)[real].float().mean())
        return loss, metrics


class Second(nn.Module):
    """The model and its heads; :meth:`forward` takes the batches of :mod:`.batches`."""

    def __init__(self, vpt: VPTForConditionalGeneration) -> None:
        super().__init__()
        self.vpt: Any = vpt
        self.dense = DenseHeads()
        text: int = vpt.config.text_config.hidden_size
        widths = {
            "clip": text,
            "dino": int(ENCODERS["detection"]["hidden_size"]),
            "sam": int(ENCODERS["seg"]["output_channels"]),
        }
        self.marks = nn.ModuleDict({kind: MarkHead(width) for kind, width in widths.items()})
        self.told = nn.ModuleDict({kind: MarkHead(text) for kind in ("clip", "sam")})

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As any module's, but the output embedding, which is the input embedding, only once."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name != _TIED}

    def load_weights(self, state: dict[str, Tensor], *, where: object = None) -> None:
        """Load what :meth:`state_dict` gave; anything else is a :class:`CheckpointError`.

        The heads on visual tokens, which the stage see does not have, may be missing.
        """
        missing, unexpected = self.load_state_dict(state, strict=False)
        lost = [name for name in missing if name != _TIED and not name.startswith("told.")]
        if lost or unexpected:
            raise CheckpointError(
                "these weights are not of the second version",
                where=where,
                got=[*lost, *unexpected][:10],
            )

    # --- what is seen ---------------------------------------------------------------------------

    def encoded(self, kind: str, pixels: Tensor) -> Tensor:
        """Encoder output of uint8 views (n, S, S, 3): tokens (n, V, W) or maps (n, W, H, H)."""
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        normed = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
        if kind == "sam":
            # Padding is exactly zero in the library; a norm would make much of what is nearly so.
            padding = (pixels == torch.tensor(PADDING, dtype=torch.uint8)).all(-1)
            normed = normed * ~padding[:, None]
        stacked = torch.stack(self.vpt.run_tower(kind, pixels=normed))
        return stacked

    def features(self, kind: str, encoded: Tensor) -> Tensor:
        """Visual tokens (n * V, D) before they are conditioned."""
        projector = self.vpt.projector(kind)
        return torch.cat([projector.features(one) for one in encoded])

    def _seen(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor, Metrics]:
        """Base features of all tower pictures, those of the other encoder, dense losses."""
        loss, metrics = torch.zeros(()), Metrics()
        kind = batch.get("kind", "")
        base = torch.zeros(0)
        if "patches" in batch:
            states = tower_states(self.vpt.visual, batch["patches"], batch["grids"])
            base = self.vpt.visual.merger(states).float()
            near, far, found = self.dense(states, batch)
            loss, metrics = loss + near + far, metrics | found
            if kind == "clip":
                again = batch["again_patches"]
                marks, found = self.marks["clip"](states[again], batch["again_labels"])
                loss = loss + marks
                metrics |= {f"clip_{k}": v for k, v in found.items()}
                if "projected_labels" in batch:
                    told, found = self.told["clip"](base, batch["projected_labels"])
                    loss, metrics = loss + told, {f"clip_token_{k}": v for k, v in found.items()}
        other = None
        if kind in ("dino", "sam"):
            tokens = self.encoded(kind, batch["pixels"])
            cells = tokens.flatten(0, 1) if kind == "dino" else tokens.permute(0, 2, 3, 1)
            marks, found = self.marks[kind](
                cells.reshape(-1, cells.shape[-1]), batch["again_labels"]
            )
            loss = loss + marks
            metrics |= {f"{kind}_{k}": v for k, v in found.items()}
            if "projected_labels" in batch:
                told, found = self.told[kind](
                    self.features(kind, tokens), batch["projected_labels"]
                )
                loss, metrics = loss + told, {f"{kind}_token_{k}": v for k, v in found.items()}
            if "again_index" in batch:
                other = self.features(kind, tokens).float()
        return base, other, loss, metrics

    # --- what is said ---------------------------------------------------------------------------

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
        """Loss and shares of right labels. Batches without ``input_ids`` have dense labels only."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            base, other, dense, metrics = self._seen(batch)
            if "input_ids" not in batch:
                return dense, metrics
            embeds, places, control = self._embeds(batch, base, other)
            text = self.vpt.model
            states, seen, looks = text_states(
                text, embeds, batch["position_ids"], batch.get("seen")
            )
            targets = batch["labels"][:, 1:]
            chosen = targets != -100
            logits = self.vpt.lm_head(states[:, :-1][chosen]).float()
        loss = functional.cross_entropy(logits, targets[chosen])
        right = (logits.argmax(-1) == targets[chosen]).float()
        name = batch["name"]
        metrics[f"{name}_said"] = float(loss.detach())
        first = batch["first_reply"][chosen]
        metrics[f"{name}_call"] = float(right[first].mean())
        metrics[f"{name}_answer"] = float(right[~first].mean())
        loss = loss + 0.3 * dense
        for spot in ("", "_again"):
            if f"spot{spot}" in batch and bool(batch[f"asking{spot}"].any()):
                both = {"spot": batch[f"spot{spot}"], "asking": batch[f"asking{spot}"]}
                both |= {"packed": batch["packed"]} if "packed" in batch else {}
                even = batch.get(f"even{spot}")
                pointing, metrics[f"{name}_pointing{spot}"] = shown(looks, both, even)
                loss = loss + pointing
        asked = [
            (f"{name}_asked{spot}", seen[batch[f"asking{spot}"]], batch[f"asking{spot}"])
            for spot in ("", "_again")
            if "names" in batch and f"asking{spot}" in batch
        ]
        if control is not None:
            first = torch.zeros_like(batch["input_ids"][:, 0]) == 0
            asked.append((f"{name}_control", control, first[:, None]))
        for key, told, at in asked:
            if len(told):
                wrong, metrics[key] = self._asked(batch, told, at.nonzero()[:, 0])
                loss = loss + wrong
        if places is not None:
            said, found = self._naming(seen[places], batch["token_labels"], batch["words"])
            loss, metrics = (
                loss + 0.5 * said,
                metrics | {f"{name}_{k}": v for k, v in found.items()},
            )
        return loss, metrics

    def _embeds(
        self, batch: dict[str, Any], base: Tensor, other: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Input embeddings with all pictures in place, where features lie, if any, and the rows'

        control states.
        """
        ids = batch["input_ids"]
        embeds = self.vpt.model.embed_tokens(ids)
        images = (ids == self.vpt.config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(images, base[batch["image_index"]])
        if "again_index" not in batch:
            return embeds, None, None
        kind, start = batch["kind"], batch["start"]
        rows = torch.arange(len(ids))
        # The control state needs the prefix only: what stands up to the action's start.
        end = int(start.max()) + 1
        prefix, *_ = text_states(self.vpt.model, embeds[:, :end], batch["position_ids"][:, :, :end])
        control = prefix[rows, start].float()
        condition = self.vpt.projector(kind).condition(control[:, None]).float()
        features = (base if other is None else other)[batch["again_index"]]
        places = ids == batch["placeholder"]
        own = condition[places.nonzero()[:, 0]]
        features = features + (features * own).sum(-1, keepdim=True) * own
        # Masked as published: of the question only the control state is left.
        embeds = embeds * (~batch["hidden"]).unsqueeze(-1)
        embeds = embeds.masked_scatter(places.unsqueeze(-1), features)
        at = torch.zeros_like(ids, dtype=torch.bool)
        at[rows, start + 1] = True
        return embeds.masked_scatter(at.unsqueeze(-1), control), places, control

    def _asked(self, batch: dict[str, Any], told: Tensor, rows: Tensor) -> tuple[Tensor, float]:
        """Loss that makes states tell which marks, colours, shapes and places a question names.

        ``told`` (n, D) are states of these rows. Left to themselves neither the control state nor
        the attention after the features took up what was asked: they looked at all marks alike.
        """
        ids, names = batch["input_ids"], batch["names"]
        questions = ids * ((batch["labels"] != -100).cumsum(1) == 0)
        wanted = (questions[:, :, None] == names).any(1)[rows].float()
        logits = told.float() @ self.vpt.model.embed_tokens.weight[names].T
        few = torch.tensor(10.0)  # one or two of some twenty names are wanted
        loss = functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=few)
        right = ((logits > 0) == (wanted > 0)).all(1).float().mean()
        return loss, float(right)

    def _naming(self, seen: Tensor, labels: Tensor, words: Tensor) -> tuple[Tensor, Metrics]:
        """As :func:`vpt_agent.nano.model.naming`, for features: marks, colours and shapes."""
        table = self.vpt.model.embed_tokens.weight
        loss, metrics, start = torch.zeros(()), {}, 0
        for name, width, wanted in zip(_NAMES, WIDTHS, labels.T, strict=True):
            own, on = table[words[start : start + width - 1]], wanted > 0
            start += width - 1
            if not bool(on.any()):
                continue
            logits = seen.float()[on] @ own.T
            weight = 2.0 if name == "mark" else 1.0
            loss = loss + weight * functional.cross_entropy(logits, wanted[on] - 1)
            metrics[f"says_{name}"] = float((logits.argmax(-1) == wanted[on] - 1).float().mean())
        return loss, metrics


def shown(looks: Tensor, batch: dict[str, Tensor], even: Tensor | None) -> tuple[Tensor, float]:
    """As :func:`vpt_agent.nano.model._pointing`; in rows of ``even`` (batch,) all spots alike.

    The attention on the spots together says nothing of how many of them are looked at: one mark of
    two was enough, and with all on the marks, and none elsewhere, they cannot be counted.
    """
    if even is None:
        return _pointing(looks, batch)
    spot, asking = batch["spot"], batch["asking"]
    rows = asking.nonzero()[:, 0]
    weights = looks.float().transpose(1, 2)[asking]  # (n, heads, length)
    on = spot[rows].float()[:, None]
    together = -((weights * on).sum(-1) + 1e-4).log()
    wanted = on / on.sum(-1, keepdim=True).clamp_min(1)
    apart = -(wanted * ((weights + 1e-4).log() - wanted.clamp_min(1e-9).log())).sum(-1)
    loss = torch.where(even[rows, None], apart, together).mean()
    return loss, float((weights * on).sum(-1).detach().mean())


def parameter_count(model: nn.Module) -> int:
    """Parameters that ship (tied ones once): the heads are thrown away."""
    return sum(p.numel() for p in model.parameters())


def token_labels(labels: Tensor, kind: str, side: int) -> Tensor:
    """(tokens, 3) of cells (cells, 3): what any cell of a visual token is labelled.

    ``side`` is the number of cells along a sam view's side; clip has blocks of four patches.
    """
    if kind == "clip":
        return labels.view(-1, MERGE * MERGE, 3).amax(1)
    if kind == "dino":
        return labels
    step = side // 16
    blocks = labels.view(-1, 16, step, 16, step, 3)
    return blocks.amax(dim=(2, 4)).reshape(-1, 3)
